"""What the policy-gradient algorithms share: hand arithmetic, published values, slow loops, closed forms, gradients."""

from __future__ import annotations

import math
import random
import statistics
from typing import Any

import pytest
import torch
from torch import Tensor

from alignlab.algorithms.advantages import gae, group_advantage, leave_one_out_advantage, shaped_reward, whiten
from alignlab.algorithms.policy_gradient import (
    clipped_surrogate,
    clipped_value_loss,
    explained_variance,
    kl_estimate,
    per_response,
    policy_metrics,
    require_siblings,
    rollout_report,
)
from alignlab.core import AlignlabError, Batch, Group, segments
from tests.algorithms.common import group

Published = dict[str, dict[str, Any]]


def double(values: Any) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


# ------------------------------------------------------------------ divergences


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_kl_estimates_are_the_published_ones(estimator: Any, published: Published) -> None:
    inputs, fixture = published["kl_k1_nemo"]["inputs"], published[f"kl_{estimator}_nemo"]
    found = kl_estimate(double(inputs["logp"]), double(inputs["ref"]), estimator)
    assert found.tolist() == pytest.approx(fixture["expected"], abs=fixture["atol"])


@pytest.mark.parametrize(("estimator", "name"), [("k1", "kl_penalty_kl_trl"), ("k2", "kl_penalty_mse_trl")])
def test_kl_penalties_equal_trl(estimator: Any, name: str, published: Published) -> None:
    inputs = published["kl_penalty_kl_trl"]["inputs"]
    found = kl_estimate(double(inputs["logp"]), double(inputs["ref"]), estimator)
    torch.testing.assert_close(found, double(published[name]["expected"]), atol=1e-6, rtol=0)


def two_policies() -> tuple[Tensor, Tensor]:
    logits, ref = double([0.3, -1.0, 0.8, 0.1]).requires_grad_(), double([-0.5, 0.7, 0.2, 0.0])
    return logits.log_softmax(-1), ref.log_softmax(-1)


@pytest.mark.parametrize("estimator", ["k1", "k3"])
def test_k1_and_k3_are_unbiased(estimator: Any) -> None:
    logp, ref = two_policies()
    kl = (logp.exp() * (logp - ref)).sum()
    assert float((logp.exp() * kl_estimate(logp, ref, estimator)).sum()) == pytest.approx(float(kl))


def test_expected_gradients_of_the_kl_estimates_as_losses() -> None:
    """Summed over all actions with the probabilities of the sampler, which are not differentiated."""
    logits = double([0.3, -1.0, 0.8, 0.1]).requires_grad_()
    ref = double([-0.5, 0.7, 0.2, 0.0]).log_softmax(-1)

    def gradient(value: Tensor) -> list[float]:
        return torch.autograd.grad(value, logits)[0].tolist()

    def expected(estimator: Any) -> Tensor:
        logp = logits.log_softmax(-1)
        return (logp.exp().detach() * kl_estimate(logp, ref, estimator)).sum()

    logp = logits.log_softmax(-1)
    assert gradient(expected("k1")) == pytest.approx([0.0] * 4, abs=1e-12)
    assert gradient(expected("k2")) == pytest.approx(gradient((logp.exp() * (logp - ref)).sum()))
    logp = logits.log_softmax(-1)
    assert gradient(expected("k3")) == pytest.approx(gradient((ref.exp() * (ref - logp)).sum()))


def test_k3_of_nearly_equal_policies_is_not_lost_to_rounding() -> None:
    found = kl_estimate(torch.tensor([-1.0 + 1e-3]), torch.tensor([-1.0]), "k3")
    assert float(found) == pytest.approx(0.5e-6, rel=1e-3, abs=0)
    assert float(kl_estimate(torch.tensor(-2.5), torch.tensor(-2.5), "k3")) == 0.0


# ------------------------------------------------------------------ rewards and advantages


def test_shaped_rewards_equal_torchtune(published: Published) -> None:
    fixture = published["kl_shaped_rewards_torchtune"]
    logp, ref = (double(fixture["inputs"][k]).flatten() for k in ("logp", "ref"))
    penalty_T = fixture["inputs"]["kl_coeff"] * kl_estimate(logp, ref, "k1")
    found = shaped_reward(penalty_T, segments([3, 3, 3]), double(fixture["inputs"]["scores"]), None)
    torch.testing.assert_close(found, double(fixture["expected"]).flatten(), atol=1e-6, rtol=0)


def test_scores_go_to_last_tokens_and_steps_where_they_are() -> None:
    """Of four responses one has no token: its score is nobody's, least of all its neighbour's."""
    penalty_T, step_T = double([0.5, 0.25, 0.0, 1.0]), double([0.0, 2.0, 3.0, 0.0])
    response_T, score_N = torch.tensor([0, 0, 2, 3]), double([10.0, 20.0, 30.0, 40.0])
    assert shaped_reward(penalty_T, response_T, score_N, None).tolist() == [-0.5, 9.75, 30.0, 39.0]
    assert shaped_reward(penalty_T, response_T, None, step_T).tolist() == [-0.5, 1.75, 3.0, -1.0]
    assert shaped_reward(penalty_T, response_T, score_N, step_T).tolist() == [-0.5, 11.75, 33.0, 39.0]


def test_returns_equal_torchtune(published: Published) -> None:
    fixture = published["gae_returns_torchtune"]
    inputs = fixture["inputs"]
    reward, value = double(inputs["rewards"]).flatten(), double(inputs["values"]).flatten()
    found = gae(reward, value, segments([4]), inputs["gamma"], inputs["lam"]) + value
    assert found.tolist() == pytest.approx(fixture["expected"][0], abs=fixture["atol"])


@pytest.mark.parametrize("lam", ["1.0", "0.7", "0.4"])
def test_advantages_equal_rlax(lam: str, published: Published) -> None:
    """Its second row ends an episode before the last step (discount 0): two responses here. Ours are worth nothing
    after the end, so what rlax bootstraps from is given as reward."""
    fixture = published[f"gae_rlax_lambda{lam}"]
    inputs = fixture["inputs"]
    assert inputs["discount"][1][3] == 0
    for row, lengths in ((0, [5]), (1, [4, 1])):
        reward, value = double(inputs["r"][row]), double(inputs["v"][row])
        gamma = inputs["discount"][row][0]
        reward[-1] += gamma * value[-1]
        found = gae(reward, value[:-1], segments(lengths), gamma, inputs["lam"])
        assert found.tolist() == pytest.approx(fixture["expected"][row], abs=fixture["atol"])


def ragged(seed: int) -> tuple[list[int], Tensor, Tensor]:
    rng = random.Random(seed)
    lengths = [rng.choice([0, 1, 2, 5, 9]) for _ in range(rng.randrange(1, 9))]
    count = sum(lengths)
    return lengths, double([rng.gauss(0, 1) for _ in range(count)]), double([rng.gauss(1, 2) for _ in range(count)])


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 0.95), (0.9, 0.5), (0.7, 1.0), (1.0, 1.0), (0.8, 0.0)])
def test_gae_is_the_sum_of_its_definition(seed: int, gamma: float, lam: float) -> None:
    lengths, reward, value = ragged(seed)
    expected, start = [], 0
    for length in lengths:
        r, v = reward[start : start + length].tolist(), [*value[start : start + length].tolist(), 0.0]
        delta = [r[t] + gamma * v[t + 1] - v[t] for t in range(length)]
        expected += [sum((gamma * lam) ** k * delta[t + k] for k in range(length - t)) for t in range(length)]
        if lam == 1:  # the return minus the value, however good the critic
            for t in range(length):
                to_come = sum(gamma**k * r[t + k] for k in range(length - t))
                assert expected[start + t] == pytest.approx(to_come - v[t])
        start += length
    before = reward.clone(), value.clone()
    found = gae(reward, value, segments(lengths), gamma, lam)
    assert found.tolist() == pytest.approx(expected)
    assert torch.equal(reward, before[0]) and torch.equal(value, before[1])


def test_whitening_gives_mean_0_and_variance_1() -> None:
    x = [1.0, 2.0, 4.0, 9.0]
    deviation = statistics.pstdev(x)
    removed = [(v - 4) / deviation for v in x]
    assert whiten(double(x)).tolist() == pytest.approx(removed, abs=1e-7)
    assert whiten(double(x), shift_mean=False).tolist() == pytest.approx([v + 4 for v in removed], abs=1e-7)
    assert whiten(double([3.0, 3.0])).tolist() == [0.0, 0.0]
    assert whiten(double([3.0]), shift_mean=False).tolist() == [3.0]
    assert whiten(torch.zeros(0)).tolist() == []


def test_whitening_removes_the_mean() -> None:
    x = torch.randn(1000, generator=torch.Generator().manual_seed(0)).double() * 3 + 50
    assert float(whiten(x).mean()) == pytest.approx(0.0, abs=1e-9)
    assert float(whiten(x, shift_mean=False).mean()) == pytest.approx(float(x.mean()))
    for shift in (True, False):
        assert float(whiten(x, shift).var(unbiased=False)) == pytest.approx(1.0)


def test_group_advantages_are_the_published_ones(published: Published) -> None:
    """Their deviation has Bessel's correction."""
    fixture = published["group_norm_rewards_cs336"]
    reward_N = double(fixture["inputs"]["rewards"])
    group_N = segments([fixture["inputs"]["group"]] * 2)
    found = group_advantage(reward_N, group_N, 2, normalize=True, eps=fixture["inputs"]["eps"])
    assert found.tolist() == pytest.approx(fixture["expected"], abs=fixture["atol"])
    plain = group_advantage(reward_N, group_N, 2, normalize=False)
    assert plain.tolist() == pytest.approx([-0.075, 0.225, -0.275, 0.125, 0.45, 0.25, -0.25, -0.45])


def test_advantages_of_groups_of_any_size_by_hand() -> None:
    reward_N, group_N = double([1.0, 5.0, 2.0, 2.0, 2.0, 7.0]), torch.tensor([0, 0, 1, 1, 1, 3])
    deviation = math.sqrt(8)
    expected = [-2 / deviation, 2 / deviation, 0, 0, 0, 0]
    assert group_advantage(reward_N, group_N, 4, True).tolist() == pytest.approx(expected, abs=1e-6)
    assert leave_one_out_advantage(reward_N, group_N, 4).tolist() == [-4, 4, 0, 0, 0, 0]


def test_leave_one_out_equals_tunix_and_its_definition(published: Published) -> None:
    fixture = published["rloo_adv_tunix"]
    reward_N = double(fixture["inputs"]["rewards"])
    found = leave_one_out_advantage(reward_N, segments([fixture["inputs"]["k"]] * 2), 2)
    assert found.tolist() == pytest.approx(fixture["expected"], abs=fixture["atol"])
    rewards = [0.3, -2.0, 5.0, 1.0]
    others = [statistics.fmean(rewards[:i] + rewards[i + 1 :]) for i in range(4)]
    found = leave_one_out_advantage(double(rewards), segments([4]), 1)
    assert found.tolist() == pytest.approx([r - b for r, b in zip(rewards, others, strict=True)])


# ------------------------------------------------------------------ losses


def test_the_surrogate_equals_nemo(published: Published) -> None:
    fixture = published["ppo_clip_nemo"]
    inputs = fixture["inputs"]
    ratio = (double(inputs["curr"]) - double(inputs["prev"])).exp()
    found = clipped_surrogate(ratio, double(inputs["adv"]), inputs["eps"])
    assert float(found.mean()) == pytest.approx(fixture["expected"], abs=fixture["atol"])


def test_the_surrogate_equals_rlax(published: Published) -> None:
    """Actions 0, 1 and 2 in the three states, with these advantages and, in its second row, their opposites."""
    fixture = published["ppo_clip_rlax"]
    inputs = fixture["inputs"]
    taken = [[0, 1, 2], [0, 1, 2]]
    ratio = (double(inputs["logits"]).log_softmax(-1) - double(inputs["old"]).log_softmax(-1)).exp()[taken]
    rows = [clipped_surrogate(ratio, sign * double(inputs["adv"]), inputs["eps"]).mean() for sign in (1, -1)]
    assert [float(row) for row in rows] == pytest.approx(fixture["expected"], abs=fixture["atol"])


def cs336() -> tuple[Tensor, Tensor, Tensor]:
    """Log-probs, old log-probs and rewards of that course's fixtures, which are drawn from seed 42."""
    drawn = []
    for draw in (lambda: torch.randn(2, 10), lambda: torch.randn(2, 10), lambda: torch.rand(2, 1)):
        torch.manual_seed(42)
        drawn.append(draw())
    logp, noise, reward = drawn
    return logp, logp + noise, reward


@pytest.mark.parametrize("size", ["large", "small"])
def test_the_surrogate_equals_cs336(size: str, published: Published) -> None:
    fixture = published[f"grpo_clip_{size}_cs336"]
    logp, old, reward = cs336()
    ratio = (logp - old).exp()
    found = clipped_surrogate(ratio, (reward - reward.mean(0)).expand_as(ratio), fixture["inputs"]["cliprange"])
    torch.testing.assert_close(found, torch.tensor(fixture["expected"]), atol=fixture["atol"], rtol=0)


def test_the_surrogate_is_the_pessimistic_bound_in_all_four_corners() -> None:
    """(ratio, advantage) → loss, at ε = 0.2: the pessimistic bound in all four corners."""
    cases = {(1.5, 1.0): -1.2, (0.5, 1.0): -0.5, (1.5, -1.0): 1.5, (0.5, -1.0): 0.8, (1.1, 2.0): -2.2}
    ratio, advantage = double([list(case) for case in cases]).T
    assert clipped_surrogate(ratio, advantage, 0.2).tolist() == pytest.approx(list(cases.values()))


def test_value_loss_by_hand() -> None:
    """Target 1, old value 0, ε = 0.2. The clipped value counts where it is the farther one."""
    value = double([0.1, 0.5, 1.0, -0.5])
    found = clipped_value_loss(value, torch.zeros(4), torch.ones(4), 0.2)
    assert found.tolist() == pytest.approx([0.5 * 0.81, 0.5 * 0.64, 0.5 * 0.64, 0.5 * 2.25])


def test_gradients_are_those_of_finite_differences() -> None:
    generator = torch.Generator().manual_seed(0)
    logp, ref, old, target = (torch.randn(12, generator=generator).double() for _ in range(4))
    logp.requires_grad_()
    for estimator in ("k1", "k2", "k3"):
        assert torch.autograd.gradcheck(lambda x, e=estimator: kl_estimate(x, ref, e), (logp,))
    assert torch.autograd.gradcheck(lambda x: clipped_surrogate((x - old).exp(), target, 0.2), (logp,))
    assert torch.autograd.gradcheck(lambda x: clipped_value_loss(x, old, target, 0.2), (logp,))
    response_T = segments([5, 0, 7])
    for how in ("response", "token", "sum"):
        assert torch.autograd.gradcheck(lambda x, h=how: per_response(x * x, response_T, 3, h), (logp,))


def test_a_clipped_gain_and_a_clipped_value_have_no_gradient() -> None:
    ratio = double([1.5, 0.5, 1.5, 0.5]).requires_grad_()
    advantage = double([1.0, -1.0, -1.0, 1.0])
    (gradient,) = torch.autograd.grad(clipped_surrogate(ratio, advantage, 0.2).sum(), ratio)
    assert gradient.tolist() == [0, 0, 1, -1]
    value = double([0.5, -0.5]).requires_grad_()
    (gradient,) = torch.autograd.grad(clipped_value_loss(value, torch.zeros(2), torch.ones(2), 0.2).sum(), value)
    assert gradient.tolist() == [0, -1.5]


@pytest.mark.parametrize(
    ("how", "name"), [("token", "agg_token_mean_tunix"), ("response", "agg_seq_mean_token_mean_tunix")]
)
def test_aggregations_equal_tunix(how: Any, name: str, published: Published) -> None:
    inputs = published["agg_token_mean_tunix"]["inputs"]
    mask = torch.tensor(inputs["mask"]).bool()
    loss_T, response_T = double(inputs["loss"])[mask], segments(mask.sum(1))
    found = per_response(loss_T, response_T, 2, how).mean()
    assert float(found) == pytest.approx(published[name]["expected"], abs=1e-6)


def test_aggregations_are_the_published_masked_means(published: Published) -> None:
    inputs = published["masked_mean_tunix"]["inputs"]
    mask = torch.tensor(inputs["mask"]).bool()
    x_T, response_T = double(inputs["x"])[mask], segments(mask.sum(1))
    assert float(per_response(x_T, response_T, 2, "token").mean()) == published["masked_mean_tunix"]["expected"]
    by_row = per_response(x_T, response_T, 2, "response").tolist()
    assert by_row == pytest.approx(published["masked_mean_axis1_tunix"]["expected"], abs=1e-6)
    assert float(x_T.var()) == pytest.approx(published["masked_var_tunix"]["expected"], abs=1e-5)
    torch.manual_seed(42)
    logits = torch.randn(2, 10, 100)
    torch.manual_seed(42)
    mask = torch.rand(2, 10, 100) > 0.5
    sums = per_response(logits[mask], segments(mask.sum(-1).flatten()), 20, "sum") / 42
    fixture = published["masked_normalize_cs336"]
    torch.testing.assert_close(sums, torch.tensor(fixture["expected"]).flatten(), atol=fixture["atol"], rtol=0)


# ------------------------------------------------------------------ figures


def test_explained_variance_is_1_for_a_perfect_critic_and_0_for_a_constant_one() -> None:
    target = double([1.0, 2.0, 3.0, 6.0])
    assert explained_variance(target, target) == 1.0
    assert explained_variance(target + 5, target) == 1.0, "a constant error is no variance"
    assert explained_variance(torch.full((4,), 3.0), target) == 0.0
    assert explained_variance(-target, target) == pytest.approx(-3.0)
    assert explained_variance(double([1.0, 2.0]), double([4.0, 4.0])) == 0.0
    assert explained_variance(torch.zeros(0), torch.zeros(0)) == 0.0


def test_policy_metrics_by_hand() -> None:
    old = double([-1.0, -2.0, -0.5, -3.0])
    found = policy_metrics(old + double([0.0, 0.1, -0.3, 0.5]).requires_grad_(), old, 0.2)
    ratios = [1.0, math.exp(0.1), math.exp(-0.3), math.exp(0.5)]
    assert found["ratio"].tolist() == pytest.approx(ratios)
    assert found["clip_fraction"].tolist() == [0, 0, 1, 1]
    assert found["approx_kl"].tolist() == pytest.approx([r - 1 - math.log(r) for r in ratios])
    assert not any(v.requires_grad for v in found.values())
    assert "clip_fraction" not in policy_metrics(old, old)


def test_rollout_report_by_hand() -> None:
    """KL is summed over a response's tokens, then averaged over responses: not over tokens."""
    groups = [
        group({"old_logp": [-1.0, -2.0], "ref_logp": [-1.5, -4.0]}, length=2),
        group({"old_logp": [-1.0], "ref_logp": [-0.5]}),
    ]
    groups[1].responses[0].finished = False
    assert rollout_report(Batch(groups)) == {"kl": pytest.approx((2.5 - 0.5) / 2), "finished": 0.5}
    assert rollout_report(Batch([Group([1])])) == {}


def test_a_single_response_is_refused_with_its_origin() -> None:
    require_siblings([group({}, {}), Group([1])], "RLOO")
    with pytest.raises(AlignlabError, match=r"^data\.jsonl:3: RLOO .* source\.group_size must be at least 2"):
        require_siblings([group({}, {}), group({})], "RLOO")
