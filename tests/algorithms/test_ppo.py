"""PPO: hand arithmetic, the exact policy gradient, one whitening for all, its controller, step 0 of a real model."""

from __future__ import annotations

import math
import statistics
from typing import Any

import pytest
import torch
from torch import Tensor

from alignlab.algorithms.ppo import PPO, adapted
from alignlab.core import AlignlabError, Batch, ConfigError, Group, Outputs, Response, aggregate
from alignlab.models import add_value_head
from alignlab.scoring import fill_outputs
from tests import tiny
from tests.algorithms.enumerated import RESPONSES, drawn, gradient, objective, probabilities


def responses() -> list[Group]:
    """Two prompts: one with a finished response of two tokens, one with an unfinished response of one."""
    first = {"reward": 1.0, "old_logp": [-1.0, -2.0], "ref_logp": [-1.5, -1.0], "old_value": [0.25, 0.5]}
    second = {"reward": -0.5, "old_logp": [-3.0], "ref_logp": [-1.0], "old_value": [0.125]}
    return [
        Group([1], [Response([2, 3], columns=dict(first))], "data.jsonl:1"),
        Group([1], [Response([2], columns=dict(second), finished=False)], "data.jsonl:2"),
    ]


def whitened(values: list[float]) -> list[float]:
    mean, deviation = statistics.fmean(values), statistics.pstdev(values)
    return [(v - mean) / deviation for v in values]


def column(groups: list[Group], name: str) -> list[float]:
    return [v for g in groups for r in g.responses for v in r.columns[name]]  # type: ignore[union-attr]


def evaluate(algorithm: PPO, groups: list[Group], **outputs: list[float]) -> tuple[Tensor, dict[str, Tensor]]:
    return algorithm.loss(Outputs(**{k: torch.tensor(v) for k, v in outputs.items()}), Batch(groups))


def test_advantages_and_targets_by_hand() -> None:
    """β = 0.1, γ = 0.9, λ = 0.5. Rewards −0.05, 0.1 + 1 and 0.2 − 0.5."""
    algorithm = PPO(kl_coef=0.1, gamma=0.9, lam=0.5)
    found = algorithm.prepare(responses())
    second = 1.1 - 0.5
    first = -0.05 + 0.9 * 0.5 - 0.25 + 0.45 * second
    alone = -0.3 - 0.125
    assert column(found, "advantage") == pytest.approx(whitened([first, second, alone]), abs=1e-6)
    targets = [first + 0.25, 1.1, -0.3]
    assert column(found, "value_target") == pytest.approx(targets, abs=1e-6), "not whitened"
    unexplained = statistics.pvariance([first, second, alone]) / statistics.pvariance(targets)
    assert algorithm.report == pytest.approx(
        {"kl": (0.5 - 1.0 - 2.0) / 2, "finished": 0.5, "kl_coef": 0.1, "explained_variance": 1 - unexplained}, abs=1e-6
    )


def test_advantages_have_mean_0_and_variance_1() -> None:
    groups = responses()
    for group in groups:
        group.responses[0].columns["reward"] = 50.0
    advantages = column(PPO(kl_coef=0.0).prepare(groups), "advantage")
    assert statistics.fmean(advantages) == pytest.approx(0.0, abs=1e-6)
    assert statistics.pstdev(advantages) == pytest.approx(1.0)


def test_the_loss_by_hand() -> None:
    """Ratios e^0.3 (clipped at 1.2), 1 and e^-0.1; values beyond, at and within ε of the old ones."""
    groups = responses()
    for group, advantage, target in ((groups[0], [2.0, -1.0], [1.0, 0.0]), (groups[1], [1.0], [0.0])):
        group.responses[0].columns |= {"advantage": advantage, "value_target": target}
    found, metrics = evaluate(
        PPO(clip=0.2, value_weight=0.5, entropy_weight=0.1), groups,
        logp_T=[-0.7, -2.0, -3.1], value_T=[0.75, 0.5, 0.2], entropy_T=[1.0, 2.0, 3.0],
    )  # fmt: skip
    policy = [-2.0 * 1.2, 1.0, -math.exp(-0.1)]
    value = [0.5 * 0.55**2, 0.5 * 0.25, 0.5 * 0.04]
    assert metrics["policy_loss"].tolist() == pytest.approx(policy)
    assert metrics["value_loss"].tolist() == pytest.approx(value, abs=1e-6)
    assert metrics["clip_fraction"].tolist() == [1, 0, 0]
    assert metrics["entropy"].tolist() == [1, 2, 3]
    total = [p + 0.5 * v - 0.1 * e for p, v, e in zip(policy, value, [1, 2, 3], strict=True)]
    assert found.tolist() == pytest.approx(total, abs=1e-6)
    assert PPO.unit == "token"


def known_fractions() -> tuple[Tensor, list[int]]:
    """A policy whose responses have probabilities in sixteenths, and each of them as often as that of 16 draws."""
    rows = [[0.5, 0.25, 0.25], [0.25, 0.5, 0.25], [0.25, 0.25, 0.5]]
    logits = torch.tensor(rows, dtype=torch.float64).log().requires_grad_()
    counts = (probabilities(logits) * 16).round().int().tolist()
    assert sum(counts) == 16 and min(counts) >= 1
    return logits, [i for i, n in enumerate(counts) for _ in range(n)]


@pytest.mark.parametrize("beta", [0.0, 0.25])
def test_the_first_minibatch_has_the_exact_policy_gradient(beta: float) -> None:
    """On the policy's exact distribution, with a critic that says 0 and γ = λ = 1, the gradient is that of E[r] − β·KL,
    divided by the advantages' deviation and the mean length: whitening changes its length, not where it points."""
    logits, indices = known_fractions()
    ref = torch.randn(3, 3, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    reward = [0.2, 1.0, -0.7, 0.4, 0.9, -0.3, 0.5]
    groups = [drawn(logits, ref, reward, [i]) for i in indices]
    to_come = []
    for group in groups:
        known = group.responses[0].columns
        kl = [a - b for a, b in zip(known["old_logp"], known["ref_logp"], strict=True)]  # type: ignore[arg-type]
        to_come += [known["reward"] - beta * sum(kl[t:]) for t in range(len(kl))]  # type: ignore[operator]
    (exact,) = torch.autograd.grad(objective(logits, ref, reward, beta), logits)
    found = gradient(PPO(gamma=1.0, lam=1.0, kl_coef=beta, value_weight=0.0), groups, logits)
    length = sum(len(RESPONSES[i]) for i in indices) / 16
    torch.testing.assert_close(found, -exact / (statistics.pstdev(to_come) * length), atol=1e-5, rtol=0)
    assert float(exact.abs().max()) > 0.01


# ------------------------------------------------------------------ whitening is global


def many(count: int = 12) -> list[Group]:
    generator = torch.Generator().manual_seed(0)

    def values(n: int, mean: float = 0.0) -> list[float]:
        return (torch.randn(n, generator=generator) + mean).tolist()

    made = []
    for i in range(count):
        n = 1 + i % 4
        columns: dict[str, Any] = {"old_logp": values(n, -2), "ref_logp": values(n, -2), "old_value": values(n)}
        made.append(Group([1], [Response([2] * n, columns=columns | {"reward": values(1, 3 * (i % 2))[0]})]))
    return made


@pytest.mark.parametrize("settings", [{}, {"whiten_rewards": True}])
def test_advantages_are_whitened_once_for_the_whole_iteration(settings: dict[str, Any]) -> None:
    """Per process, micro-batch or minibatch the result would depend on who is together with whom."""
    together = PPO(**settings).prepare(many())
    backwards = PPO(**settings).prepare(many()[::-1])[::-1]
    assert column(together, "advantage") == pytest.approx(column(backwards, "advantage"), abs=1e-9)
    halves = PPO(**settings).prepare(many()[::2]), PPO(**settings).prepare(many()[1::2])
    assert column(halves[0], "advantage") != pytest.approx(column(together[::2], "advantage"), abs=0.05)
    first, second = (statistics.fmean(column(part, "advantage")) for part in (together[::2], together[1::2]))
    assert abs(first - second) > 0.1, "minibatches keep the means they have within the iteration"


def test_the_loss_does_not_depend_on_the_split_of_the_batch() -> None:
    groups = PPO().prepare(many())
    batch = Batch(groups)
    outputs = {
        k: torch.randn(batch.T, generator=torch.Generator().manual_seed(9)) for k in ("logp", "value", "entropy")
    }

    def loss(part: list[Group], start: int, end: int) -> Tensor:
        return PPO().loss(Outputs(**{f"{k}_T": v[start:end] for k, v in outputs.items()}), Batch(part))[0]

    first = Batch(groups[:5]).T
    parts = torch.cat([loss(groups[:5], 0, first), loss(groups[5:], first, batch.T)])
    assert torch.equal(parts, loss(groups, 0, batch.T))


def test_whitened_rewards_keep_their_mean() -> None:
    """With γ = λ = 1 and a critic that says 0, a target is the sum of the rewards that are left."""
    groups = responses()
    for group in groups:
        group.responses[0].columns["old_value"] = [0.0] * group.responses[0].loss_tokens
    found = PPO(kl_coef=0.1, lam=1.0, whiten_rewards=True).prepare(groups)
    rewards = [-0.05, 1.1, -0.3]
    a, b, c = (v + statistics.fmean(rewards) for v in whitened(rewards))
    assert column(found, "value_target") == pytest.approx([a + b, b, c], abs=1e-5)


# ------------------------------------------------------------------ rewards


def test_missing_eos_score_replaces_the_score_of_an_unfinished_response() -> None:
    found = PPO(kl_coef=0.0, lam=1.0, missing_eos_score=-7.0).prepare(responses())
    assert column(found, "value_target") == pytest.approx([1.0, 1.0, -7.0])
    assert found[1].responses[0].columns["reward"] == -0.5, "what the scorer said stays"


@pytest.mark.parametrize(
    ("rewards", "targets"),
    [("outcome", [1.0, 1.0, -0.5]), ("steps", [0.75, 0.5, 2.0]), ("both", [1.75, 1.5, 1.5])],
)
def test_step_rewards_are_earned_where_steps_end(rewards: Any, targets: list[float]) -> None:
    groups = responses()
    groups[0].responses[0].columns["step_reward"] = [0.25, 0.5]
    groups[1].responses[0].columns["step_reward"] = [2.0]
    algorithm = PPO(kl_coef=0.0, lam=1.0, rewards=rewards)
    assert column(algorithm.prepare(groups), "value_target") == pytest.approx(targets)
    wanted = {"outcome": {"reward"}, "steps": {"step_reward"}, "both": {"reward", "step_reward"}}[rewards]
    assert set(algorithm.needs) == {"ref_logp", "old_logp", "old_value", *wanted}


def test_a_missing_reward_is_named() -> None:
    with pytest.raises(AlignlabError, match=r"^data\.jsonl:1: no column 'step_reward'"):
        PPO(rewards="steps").prepare(responses())


@pytest.mark.parametrize("estimator", ["k2", "k3"])
def test_each_kl_estimator_gives_its_penalty(estimator: Any) -> None:
    difference = [0.5, -1.0, -2.0]
    kl = [0.5 * d * d if estimator == "k2" else math.exp(-d) - 1 + d for d in difference]
    found = PPO(kl_coef=0.1, lam=1.0, kl_estimator=estimator).prepare(responses())
    a, b, c = (-0.1 * k for k in kl)
    assert column(found, "value_target") == pytest.approx([a + b + 1, b + 1, c - 0.5], abs=1e-6)


def test_a_response_without_a_loss_bearing_token_changes_no_advantage() -> None:
    silent = Group([1], [Response([2], [False], {"reward": 9.0, "old_logp": [], "ref_logp": [], "old_value": []})])
    with_it = PPO(kl_coef=0.0).prepare([responses()[0], silent, responses()[1]])
    assert column(with_it, "advantage") == column(PPO(kl_coef=0.0).prepare(responses()), "advantage")
    assert PPO().prepare([silent]) == [silent]
    assert PPO().prepare([]) == []


def test_values_are_clipped_at_a_distance_of_their_own() -> None:
    """Values 0.75, 0.5, 0.2 for old ones that the test above clips at 0.2; not at all, each counts as it is."""
    groups = responses()
    for group, target in ((groups[0], [1.0, 0.0]), (groups[1], [0.0])):
        group.responses[0].columns |= {"advantage": [0.0] * len(target), "value_target": target}
    given = {"logp_T": [-1.0, -2.0, -3.0], "value_T": [0.75, 0.5, 0.2], "entropy_T": [0.0] * 3}
    for clip in (0.1, 0.9):
        _, free = evaluate(PPO(clip=clip, value_clip=None), groups, **given)
        assert free["value_loss"].tolist() == pytest.approx([0.5 * 0.0625, 0.5 * 0.25, 0.5 * 0.04], abs=1e-6)
        _, bound = evaluate(PPO(clip=clip, value_clip=0.2), groups, **given)
        assert bound["value_loss"].tolist() == pytest.approx([0.5 * 0.55**2, 0.5 * 0.25, 0.5 * 0.04], abs=1e-6)


# ------------------------------------------------------------------ the adaptive coefficient


def test_the_adaptive_kl_coefficient_by_hand() -> None:
    """(KL, target, responses): 50 % too much and 90 % too little count as 20 %; a tenth counts as it is."""
    assert adapted(0.2, 9.0, 6.0, 500, 10_000) == pytest.approx(0.2 * (1 + 0.2 * 0.05))
    assert adapted(0.2, 0.6, 6.0, 500, 10_000) == pytest.approx(0.2 * (1 - 0.2 * 0.05))
    assert adapted(0.2, 6.6, 6.0, 1000, 10_000) == pytest.approx(0.2 * (1 + 0.1 * 0.1))
    assert adapted(0.2, -5.0, 6.0, 10**6, 10_000) == pytest.approx(0.2 * 0.8), "never negative, however many"
    assert adapted(0.2, 9.0, 6.0, 500, 1000) == pytest.approx(0.2 * (1 + 0.2 * 0.5))


def test_the_adaptive_kl_coefficient_follows_the_kl_and_survives_a_resume() -> None:
    """Each iteration uses the one left by the last; one that goes on from the state is no different."""
    groups = responses()
    for group in groups:
        group.responses[0].columns["ref_logp"] = [-9.0] * group.responses[0].loss_tokens  # KL (15 + 6) / 2
    algorithm = PPO(kl_coef=0.1, kl_target=2.0)
    factor = 1 + 0.2 * 2 / 10_000
    coefficients = []
    for _ in range(3):
        algorithm.prepare(groups)
        coefficients.append(algorithm.report["kl_coef"])
    assert coefficients == pytest.approx([0.1, 0.1 * factor, 0.1 * factor**2], rel=1e-12)
    resumed = PPO(kl_coef=0.1, kl_target=2.0)
    resumed.state = dict(algorithm.state)
    assert column(resumed.prepare(groups), "value_target") == column(algorithm.prepare(groups), "value_target")
    assert resumed.report["kl_coef"] == pytest.approx(0.1 * factor**3, rel=1e-12)
    fixed = PPO(kl_coef=0.1)
    fixed.prepare(groups)
    assert not fixed.state


# ------------------------------------------------------------------ gradients, settings, a real model


def test_gradients_are_those_of_finite_differences() -> None:
    groups = PPO().prepare(many())
    batch = Batch(groups)
    generator = torch.Generator().manual_seed(4)
    inputs = [batch["old_logp_T"].double(), batch["old_value_T"].double(), torch.ones(batch.T).double()]
    inputs = [(x + 0.3 * torch.randn(batch.T, generator=generator).double()).requires_grad_() for x in inputs]

    def loss(logp_T: Tensor, value_T: Tensor, entropy_T: Tensor) -> Tensor:
        algorithm = PPO(entropy_weight=0.2, value_weight=0.7)
        return algorithm.loss(Outputs(logp_T=logp_T, value_T=value_T, entropy_T=entropy_T), batch)[0]

    assert torch.autograd.gradcheck(loss, inputs)


def test_the_rest_of_an_iteration_is_skipped_above_target_kl() -> None:
    assert PPO(target_kl=0.1).enough({"approx_kl": 0.11})
    assert not PPO(target_kl=0.1).enough({"approx_kl": 0.1})
    assert not PPO().enough({"approx_kl": 1e9})


def test_reads_and_critic_follow_the_settings() -> None:
    assert PPO().reads == {"logp", "entropy", "value"}
    assert PPO(entropy_weight=0.01).reads == {"logp", "entropy", "value", "entropy_grad"}
    assert (PPO().critic, PPO(critic="own").critic) == ("shared", "own")


@pytest.mark.parametrize("name", ["llama", "bloom"])
def test_the_first_step_of_a_real_model_has_kl_0_and_ratio_1(name: str) -> None:
    """The policy is the reference and its own past: KL 0, ratio 1, nothing clipped, to the last bit; the value loss is
    half the squared advantage before whitening."""
    model = tiny.model(name)
    model.layout = "packed" if name == "llama" else "plain"
    add_value_head(model)
    groups = tiny.groups([(5, [3, 4]), (7, [2, 6]), (2, [1, 1])])
    for i, response in enumerate(r for g in groups for r in g.responses):
        response.columns["reward"] = float(i)
    fill_outputs(model, groups, {"logp": "ref_logp"}, 10_000)
    fill_outputs(model, groups, {"logp": "old_logp", "value": "old_value"}, 10_000)
    algorithm = PPO()
    prepared = algorithm.prepare(groups)
    assert algorithm.report["kl"] == 0.0
    batch = Batch(prepared)
    loss, metrics = algorithm.loss(Outputs(**model(model.lay_out(prepared), algorithm.reads)), batch)
    assert metrics["ratio"].tolist() == [1.0] * batch.T
    assert metrics["approx_kl"].tolist() == metrics["clip_fraction"].tolist() == [0.0] * batch.T
    expected = 0.5 * (batch["value_target_T"] - batch["old_value_T"]).square()
    torch.testing.assert_close(metrics["value_loss"], expected)
    assert float(aggregate(metrics["policy_loss"], batch.T)) == pytest.approx(0.0, abs=1e-6)
    gradients = tiny.gradients(model, aggregate(loss, batch.T))
    assert any("value_head" in k for k in gradients) and any("value_head" not in k for k in gradients)


@pytest.mark.parametrize(
    ("settings", "key"),
    [({"clip": 0.0}, "clip=0.0"), ({"clip": 1.0}, "clip"), ({"gamma": 1.1}, "gamma=1.1"), ({"lam": -0.1}, "lam"),
     ({"value_weight": -1.0}, "value_weight"), ({"kl_coef": -1.0}, "kl_coef"), ({"kl_target": 0.0}, "kl_target"),
     ({"entropy_weight": -1.0}, "entropy_weight"), ({"target_kl": 0.0}, "target_kl")],
)  # fmt: skip
def test_values_out_of_range_are_refused_by_name(settings: dict[str, Any], key: str) -> None:
    with pytest.raises(ConfigError, match=rf"^algorithm\.{key}"):
        PPO(**settings)
