"""Search over steps: it finds the best path it can see, and without a choice it is plain sampling."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch

from alignlab.core import AlignlabError, ConfigError, Environment, Group
from alignlab.models import PackedModel
from alignlab.rollout import LocalRollout, StepSearch
from alignlab.rollout.batching import Row
from alignlab.rollout.local import LocalSampler
from tests.rollout.tiny import EOS, PIECES, Scripted, ids, model, plain_logp, prompts, tokenizer


class Scores:
    """A reward by the response's tokens."""

    fills = ("reward",)

    def __init__(self, function: Any = lambda tokens: float(len(tokens))) -> None:
        self.function, self.seen = function, 0

    def score(self, groups: Sequence[Group]) -> None:
        for group in groups:
            for response in group.responses:
                self.seen += 1
                response.columns["reward"] = float(self.function(response.token_ids))


@pytest.fixture(scope="module")
def llama() -> PackedModel:
    """A model that writes newlines and ends rather often."""
    made = model("llama")
    made.network.lm_head.weight.data[[EOS, PIECES.index("\n")]] *= 2
    return made


def engine(packed: PackedModel, **settings: object) -> LocalSampler:
    return LocalRollout(**{"max_new_tokens": 12, **settings}).sampler(packed)  # type: ignore[arg-type]


def same(one: Sequence[Group], other: Sequence[Group]) -> None:
    for a, b in zip(one, other, strict=True):
        assert (a.prompt_ids, a.origin) == (b.prompt_ids, b.origin)
        for r, s in zip(a.responses, b.responses, strict=True):
            assert (r.token_ids, r.finished, r.text, r.source) == (s.token_ids, s.finished, s.text, s.source)
            assert r.columns["behaviour_logp"] == pytest.approx(s.columns["behaviour_logp"], abs=1e-4)


# Rows that pause


@pytest.mark.parametrize("settings", [{}, {"min_new_tokens": 5}, {"temperature": 0.7, "top_k": 5}, {"stop": ["b"]}])
@pytest.mark.parametrize("every", [1, 3])
def test_drawn_in_several_goes_a_row_is_the_same(llama: PackedModel, settings: dict[str, Any], every: int) -> None:
    given = prompts(3, 9, 5)
    sampler = engine(llama, **settings)
    expected = sampler.sample(given, 4, 2)
    rows = sampler.rows(given, 4, 2)
    count = 0
    while going := [r for r in rows if not r.finished and len(r.tokens) < r.limit]:
        # Rows pause at different times, so they are gone on with at different lengths.
        sampler.extend(going, lambda row: (len(row.tokens) + row.sample) % every == 0)
        count += 1
    assert count > 2
    found = [g.with_responses([r.response() for r in rows[4 * i : 4 * i + 4]]) for i, g in enumerate(given)]
    same(found, expected)
    assert sampler.generated_tokens == 2 * sum(len(r.token_ids) for g in expected for r in g.responses)


# Without a choice


@pytest.mark.parametrize("settings", [{}, {"min_new_tokens": 4}, {"stop": ["b"]}, {"temperature": 0.5}])
def test_one_beam_and_one_step_are_plain_sampling(llama: PackedModel, settings: dict[str, Any]) -> None:
    given = [*prompts(3, 9, 5), prompts(3)[0]]  # the first comes twice
    scores = Scores()
    search, drawing = StepSearch(scores, beams=1, expand=1), engine(llama, **settings)
    assert isinstance(search, Environment)
    found = search.rollout(drawing, given, 3, 7)
    same(found, engine(llama, **settings).sample(given, 3, 7))
    assert any("\n" in r.text.strip() for g in found for r in g.responses), "of several steps"
    assert scores.seen == 12, "there is nothing to choose: what was found is scored, once"


def test_contract(llama: PackedModel) -> None:
    given = prompts(3, 9)
    given[0].prompt, given[0].extra = "p", {"gold": 1}
    search, drawing = StepSearch(Scores(), beams=2, expand=3), engine(llama)
    found = search.rollout(drawing, given, 2, 0)
    assert [(g.prompt_ids, g.prompt, g.extra) for g in found] == [(g.prompt_ids, g.prompt, g.extra) for g in given]
    for group in found:
        assert len(group.responses) == 2
        for response in group.responses:
            assert response.columns.keys() == {"behaviour_logp", "reward"}
            expected = plain_logp(llama.network, group.prompt_ids, response.token_ids)
            assert response.columns["behaviour_logp"] == pytest.approx(expected, abs=1e-4)
            assert response.finished == (response.token_ids[-1] == EOS)
            assert len(response.token_ids) <= 12
    same(StepSearch(Scores(), beams=2, expand=3).rollout(engine(llama), given, 2, 0), found)
    alone = [StepSearch(Scores(), beams=2, expand=3).rollout(engine(llama), [g], 2, 0)[0] for g in given]
    same(alone, found)
    assert StepSearch(Scores()).rollout(engine(llama), [], 1, 0) == []


def test_every_token_drawn_is_counted(llama: PackedModel) -> None:
    drawing = engine(llama)
    drawn: list[int] = []
    extend = drawing.extend

    def counted(rows: Sequence[Row], *rest: Any) -> None:
        before = sum(len(r.tokens) for r in rows)
        extend(rows, *rest)
        drawn.append(sum(len(r.tokens) for r in rows) - before)

    drawing.extend = counted  # type: ignore[method-assign,assignment]
    found = StepSearch(Scores(), 2, 2).rollout(drawing, prompts(4), 1, 0)
    assert drawing.generated_tokens == sum(drawn) > len(found[0].responses[0].token_ids)


# With a choice

LETTERS = "def"


@pytest.fixture(scope="module")
def tree() -> PackedModel:
    """A policy for which every step is one of three letters, all as probable, and a newline."""
    net = Scripted({})
    table = torch.full((len(PIECES), len(PIECES)), -1e9)
    letters = [PIECES.index(x) for x in LETTERS]
    newline = PIECES.index("\n")
    for last in range(len(PIECES)):
        table[last, newline if last in letters else letters] = 0.0
    net.table = table
    return PackedModel(net, tokenizer())


def value(tokens: Sequence[int]) -> float:
    """Of letters: steps count as digits, "d" 0, "e" 1, "f" 2, so the best path is all "f"."""
    letters = [PIECES[t] for t in tokens if PIECES[t] in LETTERS]
    return sum(LETTERS.index(x) / 3 ** (i + 1) for i, x in enumerate(letters))


@pytest.mark.parametrize("beams", [1, 2, 3])
def test_the_best_path_is_found(tree: PackedModel, beams: int) -> None:
    """Four steps of three letters; of 12 draws each one is missed once in 130: a miss is a worse path, so none here."""
    search, drawing = StepSearch(Scores(value), beams=beams, expand=24), engine(tree, max_new_tokens=8)
    found = search.rollout(drawing, prompts(2, 3), 2, 0)
    assert {r.text for g in found for r in g.responses} == {"f\nf\nf\nf\n"}
    logp = found[0].responses[0].columns["behaviour_logp"]
    assert logp == pytest.approx([math.log(1 / 3), 0.0] * 4, abs=1e-5)


def test_a_garden_path_needs_more_than_one_beam(tree: PackedModel) -> None:
    """A first step that looks second best leads to the best end: one beam walks past it, two do not."""

    def tricky(tokens: Sequence[int]) -> float:
        text = "".join(PIECES[t] for t in tokens)
        return {"f": 1.0, "e": 0.9, "d": 0.0}[text[0]] if len(text) <= 2 else 2.0 * text.startswith("e\nd")

    def found(beams: int) -> str:
        search, drawing = StepSearch(Scores(tricky), beams=beams, expand=24), engine(tree, max_new_tokens=4)
        return search.rollout(drawing, prompts(2), 1, 0)[0].responses[0].text

    assert found(1).startswith("f")
    assert found(2) == "e\nd\n", "the two beams differ, though most of the draws are alike"


def test_the_draws_of_a_search_are_independent(tree: PackedModel) -> None:
    """Each of the draws is one of the three letters alike: over many searches the first beam's steps are uniform."""
    search, drawing = StepSearch(Scores(lambda tokens: 0.0), beams=2, expand=2), engine(tree, max_new_tokens=6)
    texts = [r.text for g in search.rollout(drawing, prompts(2), 900, 0) for r in g.responses]
    counts = [sum(t.replace("\n", "") == "".join(w) for t in texts) for w in itertools.product(LETTERS, repeat=3)]
    assert sum(counts) == 900
    chi = sum((c - 900 / 27) ** 2 / (900 / 27) for c in counts)
    assert chi < 54, "the 0.1 % quantile with 26 degrees of freedom"

    drawing = engine(tree, max_new_tokens=4)
    seen: list[tuple[str, ...]] = []  # what the four draws of each search said, at the first and the second step
    extend = drawing.extend

    def watched(rows: Sequence[Row], *rest: Any) -> None:
        extend(rows, *rest)
        letters = [PIECES[row.tokens[-2]] for row in rows]
        seen.extend(tuple(letters[i : i + 4]) for i in range(0, len(letters), 4))

    drawing.extend = watched  # type: ignore[method-assign,assignment]
    StepSearch(Scores(lambda tokens: 0.0), 1, 4).rollout(drawing, prompts(2), 600, 1)
    assert len(seen) == 1200
    for i, j in itertools.combinations(range(4), 2):
        equal = sum(some[i] == some[j] for some in seen) / len(seen)
        assert equal == pytest.approx(1 / 3, abs=4 * (2 / 9 / len(seen)) ** 0.5), (i, j)


def test_a_finished_solution_competes_with_those_that_go_on() -> None:
    """After "d" the policy ends, after "e" it goes on: the shorter one wins where it scores more."""
    net = Scripted({})
    net.table = torch.full((len(PIECES), len(PIECES)), -1e9)
    newline = PIECES.index("\n")
    for last in range(len(PIECES)):
        net.table[last, ids("d|e")] = 0.0
    net.table[PIECES.index("d")] = -1e9
    net.table[PIECES.index("d"), EOS] = 0.0
    net.table[PIECES.index("e")] = -1e9
    net.table[PIECES.index("e"), newline] = 0.0
    packed = PackedModel(net, tokenizer())

    def found(sign: float) -> str:
        scores = Scores(lambda tokens: sign * len(tokens))
        search, drawing = StepSearch(scores, beams=3, expand=8), engine(packed, max_new_tokens=6)
        return search.rollout(drawing, prompts(2), 1, 0)[0].responses[0].text

    assert found(-1.0) == "d"
    assert found(1.0).startswith("e\ne\n"), "as long as may be"


def test_refusals(llama: PackedModel) -> None:
    with pytest.raises(ConfigError, match=r"environment\.beams=0"):
        StepSearch(Scores(), beams=0)
    with pytest.raises(ConfigError, match=r"environment\.expand=0"):
        StepSearch(Scores(), expand=0)
    scores = Scores()
    scores.fills = ("score",)  # type: ignore[assignment]
    with pytest.raises(AlignlabError, match=r"environment\.scorer: fills score, not 'reward'"):
        StepSearch(scores)
