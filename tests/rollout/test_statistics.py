"""Samples follow the exact distribution: every sequence of a tiny language is enumerated and counted."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import pytest
from scipy import stats

from alignlab.core import Group
from alignlab.models import PackedModel
from alignlab.rollout import LocalRollout
from tests.rollout.tiny import EOS, network, plain_logits, tokenizer

VOCABULARY, LENGTH, SAMPLES = 7, 3, 6000
PROMPT = [3, 5, 4]


def next_token(logits: list[float], temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0) -> dict[int, float]:
    """The filtered distribution, in plain Python."""
    weight = {i: math.exp(x / temperature) for i, x in enumerate(logits)}
    order = sorted(weight, key=lambda i: -weight[i])[: top_k or None]
    total = sum(weight[i] for i in order)
    kept, mass = [], 0.0
    for i in order:
        if mass < top_p:
            kept.append(i)
        mass += weight[i] / total
    total = sum(weight[i] for i in kept)
    return {i: weight[i] / total for i in kept}


def enumerate_sequences(net: Any, settings: dict[str, float]) -> dict[tuple[int, ...], float]:
    """Probability of every complete response: ended by the end token, or cut at LENGTH tokens."""
    found: dict[tuple[int, ...], float] = {}
    open_: dict[tuple[int, ...], float] = {(): 1.0}
    for _ in range(LENGTH):
        longer: dict[tuple[int, ...], float] = {}
        for prefix, p in open_.items():
            logits = plain_logits(net, [*PROMPT, *prefix])[-1].double().tolist()
            for token, q in next_token(logits, **settings).items():  # type: ignore[arg-type]
                (found if token == EOS else longer)[(*prefix, token)] = p * q
        open_ = longer
    return found | open_


@pytest.mark.parametrize(
    "settings",
    [{}, {"temperature": 0.6}, {"top_k": 3}, {"top_p": 0.7}, {"temperature": 1.5, "top_k": 5, "top_p": 0.9}],
    ids=str,
)
def test_frequencies_are_the_enumerated_probabilities(settings: dict[str, float]) -> None:
    net = network("llama", spread=0.25, seed=4, vocab_size=VOCABULARY)
    expected = enumerate_sequences(net, settings)
    assert math.isclose(sum(expected.values()), 1, abs_tol=1e-9)
    engine = LocalRollout(max_new_tokens=LENGTH, **settings).sampler(PackedModel(net, tokenizer()))  # type: ignore[arg-type]
    responses = engine.sample([Group(PROMPT)], SAMPLES, seed=1)[0].responses
    for response in responses[:300]:
        logp = sum(response.columns["behaviour_logp"])  # type: ignore[arg-type]
        assert logp == pytest.approx(math.log(expected[tuple(response.token_ids)]), abs=1e-4)
    counts = Counter(tuple(r.token_ids) for r in responses)
    assert set(counts) <= set(expected), "nothing impossible is drawn"
    usual = [y for y, p in expected.items() if p * SAMPLES >= 5]
    observed = [counts[y] for y in usual] + [SAMPLES - sum(counts[y] for y in usual)]
    wanted = [expected[y] * SAMPLES for y in usual]
    wanted.append(SAMPLES - sum(wanted))
    if wanted[-1] < 5:  # too few of the rare ones for a class of their own
        wanted[-2] += wanted.pop()
        observed[-2] += observed.pop()
    assert len(wanted) > 5
    assert stats.chisquare(observed, wanted, sum_check=False).pvalue > 0.01
