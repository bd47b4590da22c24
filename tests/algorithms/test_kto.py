"""KTO: hand arithmetic, what is desirable, and a baseline that belongs to the iteration, not to a micro-batch."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from alignlab.algorithms.desirability import desirability
from alignlab.algorithms.kto import KTO, MISMATCHED, baseline, kto_loss
from alignlab.core import AlignlabError, Batch, ConfigError, Group, Outputs, Response, aggregate
from tests.algorithms.common import group


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def one(prompt: int, ratio: float, desirable: float | None = None, **columns: float) -> Group:
    """A prompt and a response of two tokens, whose log π/π_ref was and is `ratio`."""
    known: dict[str, Any] = {} if desirable is None else {"desirable": desirable}
    old = [-1.0 + ratio, -2.0]
    columns_ = {**known, **columns, "ref_logp": [-1.0, -2.0], "old_logp": old}
    return Group([prompt], [Response([prompt, 2], columns=columns_)], f"data.jsonl:{prompt}")


def fill(groups: list[Group], ratios: dict[tuple[int, int], float]) -> None:
    """Log-probs of what is mismatched, by prompt and first token of the response, as the loop would fill them in."""
    for g in groups:
        for r in g.responses:
            if MISMATCHED in r.columns:
                n = len(r.token_ids)
                r.columns["ref_logp"] = [-1.0] * n
                r.columns["old_logp"] = [-1.0 + ratios[g.prompt_ids[0], r.token_ids[0]]] + [-1.0] * (n - 1)


def losses(algorithm: KTO, groups: list[Group]) -> torch.Tensor:
    logp = [v for g in groups for r in g.responses for v in r.columns["old_logp"]]  # type: ignore[union-attr]
    return algorithm.loss(Outputs(logp_T=torch.tensor(logp, dtype=torch.float64)), Batch(groups))[0]


def test_kto_by_hand() -> None:
    """Gains over the baseline 0.5 of 1.5, −0.5 and −2.5, with beta = 0.2, λ_D = 1, λ_U = 1.5."""
    ratio_N, z_N = torch.tensor([2.0, 0.0, -2.0]), torch.full((3,), 0.5)
    found = kto_loss(ratio_N, z_N, torch.tensor([1.0, 0.0, 1.0]), 0.2, (1.0, 1.5))
    assert found.tolist() == pytest.approx([1 - sigmoid(0.3), 1.5 * (1 - sigmoid(0.1)), 1 - sigmoid(-0.5)])


def test_kto_of_an_iteration_by_hand() -> None:
    """Prompts 1, 2, 3, each with the response of the one before: mean ratio (0.6 + 0.9 − 0.3) / 3 = 0.4."""
    algorithm = KTO(beta=0.5, weight_undesirable=2.0)
    groups = algorithm.arrange([one(1, 1.0, 1), one(2, 0.2, 0), one(3, -1.0, 1)])
    fill(groups, {(1, 3): 0.6, (2, 1): 0.9, (3, 2): -0.3})
    prepared = algorithm.prepare(groups)
    assert [g.columns["z_ref"] for g in prepared] == pytest.approx([0.4] * 3)
    assert algorithm.report["z_ref"] == pytest.approx(0.4)
    assert losses(algorithm, prepared).tolist() == pytest.approx(
        [1 - sigmoid(0.5 * 0.6), 2 * (1 - sigmoid(0.5 * 0.2)), 1 - sigmoid(0.5 * -1.4)], rel=1e-6
    )
    _, metrics = algorithm.loss(Outputs(logp_T=torch.tensor([0.0, -2, -0.8, -2, -2.0, -2])), Batch(prepared))
    assert metrics["reward_desirable"].tolist() == pytest.approx([0.5, -0.5])
    assert metrics["reward_undesirable"].tolist() == pytest.approx([0.1])
    assert metrics["desirable"].tolist() == [1.0, 0.0, 1.0]


def test_the_baseline_is_never_below_zero() -> None:
    algorithm = KTO()
    groups = algorithm.arrange([one(1, 0.0, 1), one(2, 0.0, 0)])
    fill(groups, {(1, 2): -3.0, (2, 1): 1.0})
    assert baseline(groups) == 0.0
    fill(groups, {(1, 2): -1.0, (2, 1): 3.0})
    assert baseline(groups) == pytest.approx(1.0)


def test_the_baseline_does_not_depend_on_the_split_of_the_batch() -> None:
    """And differs from what each micro-batch would have found: 2 for the first two groups, 0 for the last two."""
    algorithm = KTO(beta=1.0)
    groups = algorithm.arrange([one(i, 0.5 * i, i % 2) for i in (1, 2, 3, 4)])
    fill(groups, {(1, 4): 2.0, (2, 1): 2.0, (3, 2): -1.0, (4, 3): -1.0})
    assert baseline(groups) == pytest.approx(0.5)
    assert [baseline(groups[:2]), baseline(groups[2:])] == [2.0, 0.0], "what it must not be"
    prepared = algorithm.prepare(groups)
    whole = losses(algorithm, prepared)
    for cut in ([2, 2], [1, 3], [1, 1, 1, 1]):
        parts, start = [], 0
        for size in cut:
            parts.append(losses(algorithm, prepared[start : start + size]))
            start += size
        assert torch.cat(parts).tolist() == pytest.approx(whole.tolist())
        total = sum(float(aggregate(part, 4)) for part in parts)
        assert total == pytest.approx(float(aggregate(whole, 4)))
    wrong = torch.cat([losses(algorithm, algorithm.prepare(part)) for part in (groups[:2], groups[2:])])
    assert whole.tolist() != pytest.approx(wrong.tolist(), rel=1e-3)


def test_the_baseline_has_no_gradient() -> None:
    """It is a column. The gradient is that of beta·σ′ alone."""
    algorithm = KTO(beta=0.5)
    groups = algorithm.arrange([one(1, 1.0, 1), one(2, 0.0, 0)])
    fill(groups, {(1, 2): 1.0, (2, 1): 1.0})
    prepared = algorithm.prepare(groups)
    logp = torch.tensor([0.0, -2.0, -1.0, -2.0], dtype=torch.float64, requires_grad=True)
    algorithm.loss(Outputs(logp_T=logp), Batch(prepared))[0].sum().backward()
    slope = [0.5 * sigmoid(x) * (1 - sigmoid(x)) for x in (0.0, -0.5)]
    assert logp.grad is not None
    assert logp.grad.tolist() == pytest.approx([-slope[0]] * 2 + [slope[1]] * 2)


def test_mismatched_responses_come_from_other_prompts_and_are_removed_again() -> None:
    algorithm = KTO()
    given = [one(1, 0.0, 1), one(2, 0.0, 0), one(2, 0.0, 1), one(3, 0.0, 1)]
    arranged = algorithm.arrange(given)
    assert [[r.token_ids[0] for r in g.responses] for g in arranged] == [[1, 3], [2, 1], [2, 1], [3, 2]]
    assert [len(g.responses) for g in given] == [1] * 4, "what was given is left as it is"
    fill(arranged, {(1, 3): 0.0, (2, 1): 0.0, (3, 2): 0.0})
    prepared = algorithm.prepare(arranged)
    assert [[r.token_ids[0] for r in g.responses] for g in prepared] == [[1], [2], [2], [3]]
    assert all("z_ref" not in g.columns for g in given)
    assert given[3].responses[0].columns["desirable"] == 1


def test_winners_are_no_more_frequent_among_the_mismatched() -> None:
    pairs = [Group([i], [Response([10 + i]), Response([20 + i])]) for i in range(4)]
    taken = [g.responses[-1].token_ids[0] for g in KTO().arrange(pairs)]
    assert taken == [13, 20, 11, 22]


def test_mismatched_responses_make_no_text_longer_than_the_longest() -> None:
    """A model's longest sequence may be what the longest record has: the long response loses its end."""
    long, short = Group([1], [Response([5] * 9, [False] * 8 + [True])]), Group([2] * 8, [Response([6])])
    arranged = KTO().arrange([long, short])
    assert [len(r.token_ids) for r in arranged[0].responses] == [9, 1]
    assert [len(r.token_ids) for r in arranged[1].responses] == [1, 2]
    assert arranged[1].responses[1].loss_tokens == 2, "what is left of a mask without loss is none"


@pytest.mark.parametrize("given", [[one(1, 3.0, 1)], [one(1, 3.0, 1), one(1, 2.0, 0)]], ids=["single", "equal"])
def test_a_single_prompt_takes_the_last_baseline_and_none_is_refused(given: list[Group]) -> None:
    """A run of batches of one would train on a baseline of 0 throughout."""
    algorithm = KTO()
    arranged = algorithm.arrange(given)
    assert [len(g.responses) for g in arranged] == [1] * len(given)
    with pytest.raises(AlignlabError, match=r"one prompt only: training\.batch_size must be at least 2"):
        algorithm.prepare(arranged)
    resumed = KTO()
    resumed.state = {"z_ref": 0.7}
    assert [g.columns["z_ref"] for g in resumed.prepare(arranged)] == [0.7] * len(given)


def signs(*columns: dict[str, float], threshold: float | None = None, mean: float = 0.0) -> list[int]:
    return desirability(group(*columns), threshold, mean)


def test_the_first_column_there_decides_what_is_desirable() -> None:
    assert signs({"desirable": 0.0, "score": 5.0}, {"desirable": 1.0, "score": 1.0}) == [-1, 1], "it says so"
    assert signs({"score": 1.0}, {"score": 0.0}) == [1, -1]
    assert signs({"preference": 0.3}, {"preference": 0.7}) == [-1, 1]
    assert signs({"preference": 0.5}, {"preference": 0.5}) == [0, 0]
    assert signs({"score": 1.0}, {"score": 1.0}) == [0, 0]
    assert signs(*({"score": s} for s in (3.0, 1.0, 2.0, 0.0))) == [1, -1, 1, -1]
    assert signs(*({"score": s} for s in (0.0, 1.0, 2.0))) == [-1, 0, 1]
    assert signs({"lost_to": -1.0}, {"lost_to": 0.0}, {"lost_to": 0.0}) == [1, -1, -1]
    assert signs({"reward": 1.0}, {"reward": 0.0}, threshold=0.0) == [1, -1], "above, not at"
    assert signs({"reward": 1.0}, {"reward": 0.5}, {"reward": 0.0}, mean=0.5) == [1, 0, -1]
    assert signs({"reward": 0.3}, mean=0.1) == [1], "a single response too"


def test_an_unscored_response_of_a_record_is_neither() -> None:
    made = group({}, {"reward": 1.0}, {"reward": 0.0})
    made.responses[1].source = made.responses[2].source = "policy"
    assert desirability(made, 0.5, 0.0) == [0, 1, -1]
    made.responses[0].source = "policy"
    with pytest.raises(AlignlabError, match=r"^data\.jsonl:3: KTO needs a column .*'desirable'.*scoring="):
        desirability(made, 0.5, 0.0)


def going_on(threshold: float | None = None) -> KTO:
    """One that has a baseline already: the records at hand have no mismatched responses."""
    algorithm = KTO(threshold=threshold)
    algorithm.state = {"z_ref": 0.0}
    return algorithm


def test_rewards_are_judged_by_the_mean_of_the_iteration() -> None:
    """1, 2 and 6: only the last is above the mean; equal rewards say nothing."""
    kept = going_on().prepare([one(1, 0.0, reward=1.0), one(2, 0.0, reward=2.0), one(3, 0.0, reward=6.0)])
    assert [g.responses[0].columns["desirable"] for g in kept] == [0.0, 0.0, 1.0]
    assert going_on().prepare([one(i, 0.0, reward=0.1) for i in (1, 2, 3)]) == []
    kept = going_on(threshold=1.5).prepare([one(1, 0.0, reward=1.0), one(2, 0.0, reward=2.0)])
    assert [g.responses[0].columns["desirable"] for g in kept] == [0.0, 1.0]


def test_desirability_is_decided_anew_in_each_iteration() -> None:
    """The mean is another one each time, and records are there again in the next epoch."""
    record = one(1, 0.0, reward=2.0)
    (first,) = [g for g in going_on().prepare([record, one(2, 0.0, reward=0.0)]) if g.origin == record.origin]
    (second,) = [g for g in going_on().prepare([record, one(2, 0.0, reward=9.0)]) if g.origin == record.origin]
    assert [g.responses[0].columns["desirable"] for g in (first, second)] == [1.0, 0.0]
    assert "desirable" not in record.responses[0].columns


def test_kto_refuses_records_without_a_response_or_a_label() -> None:
    assert KTO.unit == "response"
    assert set(KTO.needs) == {"ref_logp", "old_logp"}
    assert KTO().check(group({})) is None
    assert "needs at least 1 response " in str(KTO().check(Group([1])))
    with pytest.raises(AlignlabError, match=r"^data\.jsonl:3: KTO needs a column"):
        desirability(group({}), None, 0.0)


@pytest.mark.parametrize("key", ["beta", "weight_desirable", "weight_undesirable"])
def test_values_out_of_range_are_refused_by_name(key: str) -> None:
    with pytest.raises(ConfigError, match=rf"^algorithm\.{key}=0"):
        KTO(**{key: 0.0})  # type: ignore[arg-type]
