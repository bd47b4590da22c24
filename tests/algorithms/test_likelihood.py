"""SFT and rejection sampling: maximum likelihood of responses given, or of the best of those drawn."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from alignlab.algorithms.rejection_sampling import RejectionSampling
from alignlab.algorithms.sft import SFT
from alignlab.core import AlignlabError, Batch, ConfigError, Group, Outputs, Response, aggregate
from tests import tiny
from tests.algorithms.common import group, loss


def test_sft_by_hand() -> None:
    groups = [group({}, length=2), group({}, length=1)]
    found, metrics = SFT().loss(Outputs(logp_T=torch.tensor([-1.0, -2.0, -6.0])), Batch(groups))
    assert found.tolist() == metrics["nll"].tolist() == [1.0, 2.0, 6.0]
    assert float(aggregate(found, Batch(groups).count(SFT.unit))) == 3.0, "a mean over tokens, not over responses"


def test_sft_is_the_published_token_mean(published: dict[str, dict[str, Any]]) -> None:
    """tunix's masked mean of losses, as log-probs of responses of which some tokens bear no loss."""
    fixture = published["agg_token_mean_tunix"]
    rows = zip(fixture["inputs"]["loss"], fixture["inputs"]["mask"], strict=True)
    groups, logp = [], []
    for values, mask in rows:
        groups.append(Group([1], [Response([2] * 3, [bool(m) for m in mask])]))
        logp += [-v for v, m in zip(values, mask, strict=True) if m]
    mean = aggregate(loss(SFT(), groups, logp_T=logp), Batch(groups).count("token"))
    assert float(mean) == pytest.approx(fixture["expected"], abs=fixture["atol"])


def test_sft_equals_the_loss_of_transformers() -> None:
    """One sequence whose labels are -100 but for the loss-bearing tokens."""
    model = tiny.model()
    one = tiny.some_groups()[:1]
    one[0].responses = one[0].responses[1:2]  # the one with a loss mask
    prompt, response = one[0].prompt_ids, one[0].responses[0]
    assert response.loss_mask is not None
    ids = torch.tensor([prompt + response.token_ids])
    labels = ids.clone()
    labels[0, [True] * len(prompt) + [not m for m in response.loss_mask]] = -100
    expected = model.network(input_ids=ids, labels=labels).loss
    found = SFT().loss(Outputs(**model(model.lay_out(one))), Batch(one))[0]
    mean = aggregate(found, Batch(one).count("token"))
    torch.testing.assert_close(mean, expected)
    ours, theirs = tiny.gradients(model.network, mean), tiny.gradients(model.network, expected)
    for name, gradient in theirs.items():
        torch.testing.assert_close(ours[name], gradient, atol=1e-6, rtol=1e-4)


def test_sft_refuses_a_record_without_a_response() -> None:
    assert SFT().check(group({})) is None
    assert "needs at least 1 response " in str(SFT().check(Group([1])))


def drawn(*rewards: float) -> Group:
    made = group(*({"reward": r} for r in rewards))
    for i, response in enumerate(made.responses):
        response.text = str(i)
    return made


def kept(keep: int, *rewards: float) -> list[str]:
    (result,) = RejectionSampling(keep).prepare([drawn(*rewards)])
    return [r.text for r in result.responses]


def test_best_is_the_highest_reward_and_the_first_of_equals() -> None:
    assert kept(1, 0.5, 2.0, -1.0) == ["1"]
    assert kept(1, 1.0, 3.0, 3.0, 3.0) == ["1"]
    assert kept(1, -5.0, -7.0) == ["0"]
    assert kept(1, 1.0, 1.0 + 1e-12) == ["1"], "in double precision"
    assert kept(2, 0.5, 2.0, -1.0, 2.0) == ["1", "3"]
    assert kept(3, 1.0, 2.0) == ["1", "0"], "there are no more"


@pytest.mark.parametrize("seed", range(5))
def test_best_equals_argmax(seed: int) -> None:
    rewards = torch.randint(0, 6, (16,), generator=torch.Generator().manual_seed(seed)).float().tolist()
    expected = max(range(16), key=lambda i: (rewards[i], -i))
    assert kept(1, *rewards) == [str(expected)]


def test_groups_keep_their_prompt_and_empty_ones_are_dropped() -> None:
    first, empty, last = drawn(1.0, 2.0), Group([9]), drawn(4.0, 3.0)
    first.extra = {"answer": "42"}
    before = [len(g.responses) for g in (first, empty, last)]
    result = RejectionSampling().prepare([first, empty, last])
    assert [g.responses[0].text for g in result] == ["1", "0"]
    assert [len(g.responses) for g in (first, empty, last)] == before, "what was drawn is left as it is"
    assert (result[0].prompt_ids, result[0].origin, result[0].extra) == (first.prompt_ids, first.origin, first.extra)


def test_rejection_sampling_has_the_loss_of_sft_on_the_best() -> None:
    result = RejectionSampling().prepare([drawn(1.0, 2.0), drawn(2.0, 0.0)])
    assert loss(RejectionSampling(), result, logp_T=[-1.0, -3.0]).tolist() == [1.0, 3.0]
    assert RejectionSampling.unit == "token"
    assert RejectionSampling().check(Group([1])) is None, "a prompt to draw for has no responses yet"


def test_a_missing_reward_is_named() -> None:
    half = drawn(1.0, 2.0)
    del half.responses[1].columns["reward"]
    with pytest.raises(AlignlabError, match=r"^data\.jsonl:3: .*`reward`.*scoring="):
        RejectionSampling().prepare([drawn(1.0), half])
    assert RejectionSampling.needs == ("reward",)


def test_values_out_of_range_are_refused_by_name() -> None:
    with pytest.raises(ConfigError, match=r"^algorithm\.keep=0: must be at least 1"):
        RejectionSampling(keep=0)
