"""RLOO, GRPO and REINFORCE++: exact policy gradients in a world of seven responses, published values, arithmetic."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from alignlab.algorithms.grpo import GRPO
from alignlab.algorithms.reinforce_pp import ReinforcePP
from alignlab.algorithms.rloo import RLOO
from alignlab.core import Algorithm, AlignlabError, Batch, ConfigError, Group, Outputs, Response, aggregate
from tests.algorithms.common import group
from tests.algorithms.enumerated import RESPONSES, drawn, expected_gradient, log_probs, objective, probabilities

Published = dict[str, dict[str, Any]]

REWARD = [0.2, 1.0, -0.7, 0.4, 0.9, -0.3, 0.5]


def policies() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    logits, ref = (torch.randn(3, 3, generator=generator, dtype=torch.float64) for _ in range(2))
    return logits.requires_grad_(), ref


def exact(logits: Tensor, ref: Tensor, beta: float) -> Tensor:
    return torch.autograd.grad(objective(logits, ref, REWARD, beta), logits)[0]


@pytest.mark.parametrize("k", [2, 3])
@pytest.mark.parametrize("beta", [0.0, 0.3])
def test_rloo_is_the_unbiased_gradient_of_the_objective(k: int, beta: float) -> None:
    """The expectation over all groups of k, each with its probability, is the analytic gradient: the baseline and the
    penalty in the reward bias nothing."""
    logits, ref = policies()
    found = expected_gradient(RLOO(kl_coef=beta), lambda i: drawn(logits, ref, REWARD, i), logits, k)
    torch.testing.assert_close(found, -exact(logits, ref, beta), atol=1e-7, rtol=0)
    assert float(found.abs().max()) > 0.05, "or there is nothing to be right about"


@pytest.mark.parametrize("beta", [0.1, 1.0])
def test_the_gradient_of_rloo_is_zero_at_the_optimum(beta: float) -> None:
    """π_ref·exp(r/β): each response's shaped reward is the same there, so every group's gradient is 0, not the mean
    alone. Here the optimum is a policy that the logits can express: any is."""
    _, ref = policies()
    p = (probabilities(ref).log() + torch.tensor(REWARD, dtype=torch.float64) / beta).softmax(-1)
    mass = {r: float(v) for r, v in zip(RESPONSES, p, strict=True)}
    first = [mass[(0,)], sum(v for r, v in mass.items() if r[0] == 1), sum(v for r, v in mass.items() if r[0] == 2)]
    rows = [first, *([mass[(a, b)] for b in (0, 1, 2)] for a in (1, 2))]
    logits = torch.tensor(rows, dtype=torch.float64).log().requires_grad_()
    made = drawn(logits, ref, REWARD, [0, 3, 4, 6])
    (prepared,) = RLOO(kl_coef=beta).prepare([made])
    assert [r.columns["advantage"] for r in prepared.responses] == pytest.approx([0.0] * 4, abs=1e-6)


@pytest.mark.parametrize("k", [2, 3])
def test_dr_grpo_is_the_unbiased_gradient_of_the_reward_up_to_a_factor(k: int) -> None:
    """Rewards minus the group's mean, own included: (k - 1)/k of the gradient. The paper's GRPO is not so."""
    logits, ref = policies()

    def found(**settings: Any) -> Tensor:
        return expected_gradient(GRPO(kl_coef=0.0, **settings), lambda i: drawn(logits, ref, REWARD, i), logits, k)

    unbiased = -exact(logits, ref, beta=0.0) * (k - 1) / k
    torch.testing.assert_close(found(normalize=False, aggregation="sum"), unbiased, atol=1e-7, rtol=0)
    for settings in ({"normalize": False}, {"aggregation": "sum"}, {}):
        biased = found(**settings)
        cosine = torch.cosine_similarity(biased.flatten(), unbiased.flatten(), dim=0)
        assert 0.5 < float(cosine) < 0.9999


# ------------------------------------------------------------------ by hand and as published


def two_responses() -> Group:
    return group(
        {"reward": 1.0, "old_logp": [-1.0, -2.0], "ref_logp": [-1.5, -2.5]},
        {"reward": 0.0, "old_logp": [-1.0, -1.0], "ref_logp": [-0.5, -0.5]},
        {"reward": 0.5, "old_logp": [-3.0, -1.0], "ref_logp": [-3.0, -1.0]},
        length=2,
    )


LOGP = [-1.1, -2.0, -1.0, -1.3, -3.0, -0.9]


def losses(algorithm: Algorithm, groups: list[Group], logp: Sequence[float]) -> tuple[list[float], dict[str, Tensor]]:
    logp_T = torch.tensor(logp)
    outputs = Outputs(logp_T=logp_T, entropy_T=torch.full_like(logp_T, 0.25))
    found, metrics = algorithm.loss(outputs, Batch(algorithm.prepare(groups)))
    return found.tolist(), metrics


def test_rloo_by_hand() -> None:
    """β = 0.1; log-ratios to the reference +1, −1 and 0: shaped rewards 0.9, 0.1, 0.5."""
    algorithm = RLOO(kl_coef=0.1)
    found, metrics = losses(algorithm, [two_responses()], LOGP)
    advantages = [0.9 - 0.3, 0.1 - 0.7, 0.5 - 0.5]
    assert found == pytest.approx([-advantages[0] * -3.1, -advantages[1] * -2.3, 0.0], abs=1e-6)
    assert algorithm.report == pytest.approx({"kl": 0.0, "finished": 1.0, "shaped_reward": 0.5})
    assert metrics["entropy"].tolist() == [0.25] * 6
    assert metrics["ratio"].tolist() == pytest.approx(torch.tensor([-0.1, 0, 0, -0.3, 0, 0.1]).exp().tolist())
    assert algorithm.unit == "response"


def test_grpo_by_hand() -> None:
    """Rewards 1, 0, 0.5: mean 0.5, deviation 0.5. One ratio is above 1.2, where it would gain nothing more."""
    logp = [-0.7, -2.0, -1.0, -1.3, -3.0, -0.9]
    found, metrics = losses(GRPO(clip=0.2, kl_coef=0.5), [two_responses()], logp)
    ratio = torch.tensor([0.3, 0, 0, -0.3, 0, 0.1]).exp().tolist()
    policy = [-1.2, -1.0, 1.0, 0.8, 0.0, 0.0]  # the second response's ratio of 0.74 is held at 0.8
    assert ratio[0] > 1.2 and ratio[3] < 0.8
    difference = torch.tensor([-1.5, -2.5, -0.5, -0.5, -3.0, -1.0]) - torch.tensor(logp)
    kl = (difference.exp() - 1 - difference).tolist()
    per_token = [p + 0.5 * k for p, k in zip(policy, kl, strict=True)]
    assert found == pytest.approx([statistics.fmean(per_token[i : i + 2]) for i in (0, 2, 4)], abs=1e-5)
    assert metrics["kl_loss"].tolist() == pytest.approx(kl, abs=1e-6)
    assert metrics["clip_fraction"].tolist() == [1, 0, 0, 1, 0, 0]


@pytest.mark.parametrize(("aggregation", "unit"), [("response", "response"), ("sum", "response"), ("token", "token")])
def test_grpo_aggregates_tokens_as_its_setting_says(aggregation: Any, unit: str) -> None:
    """Advantages ±0.5 of a response with one token and one with three."""
    groups = [Group([1], [Response([2] * n, columns={"reward": r}) for n, r in ((1, 1.0), (3, 0.0))])]
    for response in groups[0].responses:
        response.columns |= {c: [-1.0] * response.loss_tokens for c in ("old_logp", "ref_logp")}
    algorithm = GRPO(normalize=False, aggregation=aggregation)
    found, _ = losses(algorithm, groups, [-1.0] * 4)
    assert algorithm.unit == unit
    expected = {"response": [-0.5, 0.5], "sum": [-0.5, 1.5], "token": [-0.5, 0.5, 0.5, 0.5]}
    assert found == pytest.approx(expected[aggregation])
    mean = float(aggregate(torch.tensor(found), Batch(groups).count(algorithm.unit)))
    assert mean == pytest.approx({"response": 0.0, "sum": 0.5, "token": 0.25}[aggregation])


def test_a_grpo_step_equals_cs336(published: Published) -> None:
    """Two responses of a group, of which about half of the tokens bear loss; theirs is divided by 2 micro-batches."""
    drawn_from_42 = []
    for draw in (lambda: torch.randn(2, 10), lambda: torch.rand(2, 1), lambda: torch.rand(2, 10)):
        torch.manual_seed(42)
        drawn_from_42.append(draw())
    logp, reward, mask = drawn_from_42
    old, mask = 2 * logp, mask > 0.5  # their old log-probs add the same draw once more
    responses = [
        Response(
            [2] * 10,
            mask[i].tolist(),
            {"reward": float(reward[i]), "old_logp": old[i][mask[i]].tolist(), "ref_logp": [0.0] * int(mask[i].sum())},
        )
        for i in range(2)
    ]
    algorithm = GRPO(clip=0.1, kl_coef=0.0, normalize=False)
    logp.requires_grad_()
    outputs = Outputs(logp_T=logp[mask], entropy_T=torch.zeros(int(mask.sum())))
    loss, _ = algorithm.loss(outputs, Batch(algorithm.prepare([Group([1], responses)])))
    mean = aggregate(loss, 2) / 2
    (gradient,) = torch.autograd.grad(mean, logp)
    assert float(mean) == pytest.approx(published["grpo_step_loss_cs336"]["expected"], abs=1e-6)
    torch.testing.assert_close(gradient, torch.tensor(published["grpo_step_grad_cs336"]["expected"]))


@pytest.mark.parametrize("name", ["reinforce_nemo", "naive_pg_cs336"])
def test_rloo_s_loss_is_plain_reinforce(name: str, published: Published) -> None:
    """-A·log π, of responses of one token, as there."""
    fixture = published[name]
    if name == "reinforce_nemo":
        advantage, logp = (torch.tensor(fixture["inputs"][k]) for k in ("adv", "curr"))
    else:
        torch.manual_seed(42)
        logp = torch.randn(2, 10)
        torch.manual_seed(42)
        advantage = torch.rand(2, 1).expand(2, 10)
    responses = [{"advantage": a, "old_logp": [0.0]} for a in advantage.flatten().tolist()]
    outputs = Outputs(logp_T=logp.flatten(), entropy_T=torch.zeros(logp.numel()))
    found, _ = RLOO().loss(outputs, Batch([group(*responses)]))
    if name == "reinforce_nemo":
        assert float(found.mean()) == pytest.approx(fixture["expected"], abs=fixture["atol"])
    else:
        torch.testing.assert_close(found, torch.tensor(fixture["expected"]).flatten(), atol=1e-5, rtol=0)


def prepared_tokens(algorithm: Algorithm, groups: list[Group]) -> list[float]:
    return [a for g in algorithm.prepare(groups) for r in g.responses for a in r.columns["advantage"]]  # type: ignore[union-attr]


def whitened(values: list[float]) -> list[float]:
    mean, deviation = statistics.fmean(values), statistics.pstdev(values)
    return [(v - mean) / deviation for v in values]


def test_reinforce_pp_by_hand() -> None:
    """What is still to come at each token, penalty included, whitened over the tokens of both groups at once."""
    groups = [two_responses(), group({"reward": 3.0, "old_logp": [-1.0], "ref_logp": [-2.0]})]
    to_come = [1 - 0.1, 1 - 0.05, 0 + 0.1, 0 + 0.05, 0.5, 0.5, 3.0 - 0.1]
    found = prepared_tokens(ReinforcePP(kl_coef=0.1), groups)
    assert found == pytest.approx(whitened(to_come), abs=1e-5)


def test_reinforce_pp_with_baseline_by_hand() -> None:
    """Rewards minus their group's mean, whitened over tokens; k2 in the loss."""
    longer = group(*({"reward": r, "old_logp": [-1.0] * 4, "ref_logp": [-1.0] * 4} for r in (3.0, 5.0)), length=4)
    groups = [two_responses(), longer]
    algorithm = ReinforcePP(kl_coef=0.5, baseline=True)
    by_token = [v for v, n in zip((0.5, -0.5, 0.0, -1.0, 1.0), (2, 2, 2, 4, 4), strict=True) for _ in range(n)]
    assert prepared_tokens(algorithm, groups) == pytest.approx(whitened(by_token), abs=1e-5)
    found, _ = losses(algorithm, [two_responses()], [-1.0, -2.0, -1.0, -1.0, -3.0, -1.0])
    b = whitened([0.5, -0.5, 0.0])
    kl = [0.5 * 0.25, 0.5 * 0.25, 0.0]
    assert found == pytest.approx([-v + 0.5 * k for v, k in zip(b, kl, strict=True)], abs=1e-5)


def test_without_baseline_reinforce_pp_takes_single_responses() -> None:
    """And its loss is a mean over each response's tokens."""
    single = [group({"reward": 1.0, "old_logp": [-1.0, -1.0], "ref_logp": [-1.0, -1.0]}, length=2)]
    single.append(group({"reward": 0.0, "old_logp": [-1.0], "ref_logp": [-1.0]}))
    found, _ = losses(ReinforcePP(), single, [-1.0] * 3)
    a = whitened([1.0, 1.0, 0.0])
    assert found == pytest.approx([-a[0], -a[2]], abs=1e-5)


# ------------------------------------------------------------------ all of them


EVERY = [RLOO(), GRPO(), GRPO(normalize=False, aggregation="token"), ReinforcePP(), ReinforcePP(baseline=True)]


def some_groups() -> list[Group]:
    logits, ref = policies()
    return [drawn(logits, ref, REWARD, i) for i in ([0, 1, 2], [3, 4], [5, 6, 0], [2, 6])]


@pytest.mark.parametrize("algorithm", EVERY, ids=lambda a: type(a).__name__)
def test_the_order_of_groups_and_the_split_of_a_batch_change_nothing(algorithm: Algorithm) -> None:
    forwards, backwards = algorithm.prepare(some_groups()), algorithm.prepare(some_groups()[::-1])[::-1]
    for a, b in zip(forwards, backwards, strict=True):
        for one, other in zip(a.responses, b.responses, strict=True):
            assert one.columns["advantage"] == pytest.approx(other.columns["advantage"], abs=1e-9)

    def loss(groups: list[Group]) -> Tensor:
        logp = torch.cat([log_probs(policies()[0].detach() * 1.3, r.token_ids) for g in groups for r in g.responses])
        return algorithm.loss(Outputs(logp_T=logp, entropy_T=logp), Batch(groups))[0]

    torch.testing.assert_close(loss(forwards), torch.cat([loss([g]) for g in forwards]))


@pytest.mark.parametrize("algorithm", EVERY, ids=lambda a: type(a).__name__)
def test_gradients_are_those_of_finite_differences(algorithm: Algorithm) -> None:
    batch = Batch(algorithm.prepare(some_groups()))
    noise = torch.randn(batch.T, generator=torch.Generator().manual_seed(3)).double()

    def loss(logp_T: Tensor) -> Tensor:
        return algorithm.loss(Outputs(logp_T=logp_T, entropy_T=logp_T.detach()), batch)[0]

    assert torch.autograd.gradcheck(loss, ((batch["old_logp_T"].double() + 0.3 * noise).requires_grad_(),))


@pytest.mark.parametrize("algorithm", EVERY, ids=lambda a: type(a).__name__)
def test_needs_and_reads_and_a_missing_reward_is_named(algorithm: Algorithm) -> None:
    assert set(algorithm.needs) == {"ref_logp", "old_logp", "reward"}
    assert algorithm.reads == {"logp", "entropy"}
    assert algorithm.prepare([]) == []
    assert algorithm.check(group({}, {})) is None
    unscored = group(*({"ref_logp": [0.0], "old_logp": [0.0]} for _ in range(2)))
    with pytest.raises(AlignlabError, match=r"^data\.jsonl:3: no column 'reward'"):
        algorithm.prepare([unscored])


@pytest.mark.parametrize("algorithm", [RLOO(), GRPO(), ReinforcePP(baseline=True)], ids=lambda a: type(a).__name__)
def test_a_single_response_is_refused(algorithm: Algorithm) -> None:
    alone = group({"reward": 1.0, "ref_logp": [0.0], "old_logp": [0.0]})
    with pytest.raises(AlignlabError, match=r"^data\.jsonl:3: .* at least 2"):
        algorithm.prepare([alone])
    if not isinstance(algorithm, ReinforcePP):
        assert "at least 2 responses" in str(algorithm.check(alone))


def test_groups_of_equal_rewards_are_counted_as_uninformative() -> None:
    groups = [group(*({"reward": r, "ref_logp": [0.0], "old_logp": [0.0]} for r in rewards)) for rewards in
              ((1.0, 1.0), (0.0, 1.0), (2.0, 2.0), (3.0, 3.0))]  # fmt: skip
    algorithm = GRPO()
    algorithm.prepare(groups)
    assert algorithm.report["informative_groups"] == 0.25
    assert [r.columns["advantage"] for r in groups[0].responses] == [0.0, 0.0], "0/eps, not 0/0"


@pytest.mark.parametrize(
    ("make", "key"),
    [(lambda: RLOO(kl_coef=-0.1), "kl_coef"), (lambda: GRPO(clip=0.0), "clip"), (lambda: GRPO(clip=1.0), "clip"),
     (lambda: GRPO(kl_coef=-1.0), "kl_coef"), (lambda: GRPO(kl_estimator="k1"), "kl_estimator=.k1"),
     (lambda: ReinforcePP(clip=1.5), "clip"), (lambda: ReinforcePP(kl_coef=-1.0), "kl_coef")],
)  # fmt: skip
def test_values_out_of_range_are_refused_by_name(make: Any, key: str) -> None:
    with pytest.raises(ConfigError, match=rf"^algorithm\.{key}"):
        make()
