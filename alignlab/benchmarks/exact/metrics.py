"""What a policy is worth, computed from the probabilities of all completions rather than estimated.

Policies are log-probs over all completions of each prompt, `logp_XY`: float64, shape (X, Y), in nats, each row
normalised; -inf is allowed for a policy that is measured, not for the reference it is measured against. Prompts have
equal weight. Divergences are in nats per response.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from alignlab.core.errors import require

NO_KL = 1e-8
"""Below this KL, in nats, a policy counts as the reference itself: rounding of float32 logits."""


def policy_metrics(logp_XY: Tensor, ref_logp_XY: Tensor, reward_XY: Tensor, beta: float) -> dict[str, float]:
    """All metrics of a policy, by name.

    `reward`, `kl` and `entropy` (nats per response) and `win_rate` (against the reference) of the policy; `objective`
    J, `objective_score`, `frontier_efficiency` (nan where the policy is the reference); for comparison
    `reference_reward`, `reference_entropy`, and `optimum_reward` and `optimum_kl` of the best policy at this `beta`.
    """
    best = optimum(ref_logp_XY, reward_XY, beta)
    return {
        "reward": expectation(logp_XY, reward_XY),
        "kl": kl_divergence(logp_XY, ref_logp_XY),
        "entropy": entropy(logp_XY),
        "win_rate": win_rate(logp_XY, ref_logp_XY, reward_XY),
        "objective": objective(logp_XY, ref_logp_XY, reward_XY, beta),
        "objective_score": objective_score(logp_XY, ref_logp_XY, reward_XY, beta),
        "frontier_efficiency": frontier_efficiency(logp_XY, ref_logp_XY, reward_XY),
        "reference_reward": expectation(ref_logp_XY, reward_XY),
        "reference_entropy": entropy(ref_logp_XY),
        "optimum_reward": expectation(best, reward_XY),
        "optimum_kl": kl_divergence(best, ref_logp_XY),
    }


def expectation(logp_XY: Tensor, value_XY: Tensor) -> float:
    """E_x E_{y~π}[value]; the expected reward, where the value is the reward. Impossible completions count nothing."""
    p_XY = logp_XY.exp()
    return (p_XY * value_XY).where(p_XY > 0, p_XY.new_zeros(())).sum(-1).mean().item()


def kl_divergence(logp_XY: Tensor, ref_logp_XY: Tensor) -> float:
    """KL(π‖π_ref) ≥ 0, in nats per response, the mean over prompts."""
    return max(0.0, expectation(logp_XY, logp_XY - ref_logp_XY))


def entropy(logp_XY: Tensor) -> float:
    """Entropy of the response given the prompt, in nats, the mean over prompts."""
    return expectation(logp_XY, -logp_XY)


def objective(logp_XY: Tensor, ref_logp_XY: Tensor, reward_XY: Tensor, beta: float) -> float:
    """J(π) = E[r] - β·KL(π‖π_ref): what alignment maximises (Ziegler et al. 2019, arXiv:1909.08593, eq. 2)."""
    return expectation(logp_XY, reward_XY) - beta * kl_divergence(logp_XY, ref_logp_XY)


def optimum(ref_logp_XY: Tensor, reward_XY: Tensor, beta: float) -> Tensor:
    """π*(y|x) = π_ref(y|x)·exp(r(x, y)/β) / Z(x), the maximum of J (Rafailov et al. 2023, arXiv:2305.18290, eq. 4).

    Args:
        ref_logp_XY: the reference.
        reward_XY: the rewards, float64, shape (X, Y).
        beta: price of a nat of KL, > 0, in units of reward.

    Returns:
        Its log-probs, shape (X, Y).
    """
    require(beta > 0, "beta", beta, "must be > 0")
    return (ref_logp_XY + reward_XY / beta).log_softmax(-1)


def optimal_objective(ref_logp_XY: Tensor, reward_XY: Tensor, beta: float) -> float:
    """J* = β·E_x log Z(x), the highest J there is."""
    require(beta > 0, "beta", beta, "must be > 0")
    return beta * (ref_logp_XY + reward_XY / beta).logsumexp(-1).mean().item()


def objective_score(logp_XY: Tensor, ref_logp_XY: Tensor, reward_XY: Tensor, beta: float) -> float:
    """(J(π) - J(π_ref)) / (J* - J(π_ref)): 0 is the reference, 1 the optimum; below 0 is worse than doing nothing.

    nan where the reward is the same for all completions, since there is nothing to gain.
    """
    start = expectation(ref_logp_XY, reward_XY)
    best = optimal_objective(ref_logp_XY, reward_XY, beta) - start
    gained = objective(logp_XY, ref_logp_XY, reward_XY, beta) - start
    return gained / best if best > 1e-12 else math.nan


def greedy(ref_logp_XY: Tensor, reward_XY: Tensor) -> Tensor:
    """The reference restricted to each prompt's best completions: the limit of `optimum` for β → 0, shape (X, Y)."""
    best = reward_XY == reward_XY.amax(-1, keepdim=True)
    return ref_logp_XY.where(best, ref_logp_XY.new_full((), -math.inf)).log_softmax(-1)


def frontier(ref_logp_XY: Tensor, reward_XY: Tensor, kl: float) -> float:
    """R*(KL): the highest expected reward of any policy whose mean KL over the prompts is at most `kl`.

    It is reached by `optimum` at the one β, common to all prompts, that spends just `kl`, which is found by bisection.
    0 gives the reference's own reward; beyond the KL of `greedy` it is the mean of the prompts' highest rewards.

    Args:
        ref_logp_XY: the reference.
        reward_XY: the rewards, float64, shape (X, Y).
        kl: nats per response, ≥ 0.
    """
    require(kl >= 0, "kl", kl, "must be >= 0")
    if kl == 0:
        return expectation(ref_logp_XY, reward_XY)
    best = greedy(ref_logp_XY, reward_XY)
    if kl >= kl_divergence(best, ref_logp_XY) * (1 - 1e-12):
        return reward_XY.amax(-1).mean().item()

    def at(inverse_beta: float) -> Tensor:
        return (ref_logp_XY + reward_XY * inverse_beta).log_softmax(-1)

    low, high = 0.0, 1.0
    while kl_divergence(at(high), ref_logp_XY) < kl and high < 1e15:
        low, high = high, 2 * high
    while high - low > 1e-13 * high:
        middle = (low + high) / 2
        if kl_divergence(at(middle), ref_logp_XY) < kl:
            low = middle
        else:
            high = middle
    return expectation(at(high), reward_XY)


def frontier_efficiency(logp_XY: Tensor, ref_logp_XY: Tensor, reward_XY: Tensor) -> float:
    """(E_π[r] - E_ref[r]) / (R*(KL(π)) - E_ref[r]): the share of the gain that its KL could have bought; at most 1.

    nan where the policy is the reference (KL below 1e-8 nats): it has spent nothing, so there is no share to speak of,
    and the quotient would be that of two rounding errors. nan too where all rewards are the same.
    """
    kl = kl_divergence(logp_XY, ref_logp_XY)
    if kl < NO_KL:
        return math.nan
    start = expectation(ref_logp_XY, reward_XY)
    possible = frontier(ref_logp_XY, reward_XY, kl) - start
    return (expectation(logp_XY, reward_XY) - start) / possible if possible > 1e-12 else math.nan


def best_of_n(ref_logp_XY: Tensor, reward_XY: Tensor, n: int) -> Tensor:
    """The distribution of the best of n independent samples, ties broken at random among the n, shape (X, Y).

    With F(v) the probability that a sample's reward is at most v and p(v) that it is v, the best reward is v with
    probability F(v)^n - F(v-)^n, and the tied samples of that reward are as the reference has them, so

        log π_n(y) = log π_ref(y) + (n - 1) log F + log[(1 - (1 - d)^n) / d],   d = p(v) / F(v),  v = r(y),

    which for rewards without ties is the formula of Beirami et al. 2024 (arXiv:2401.01879, lemma 1).

    Args:
        ref_logp_XY: the distribution sampled from.
        reward_XY: the rewards, float64, shape (X, Y). Ties are rewards equal bit for bit.
        n: number of samples, ≥ 1.
    """
    require(n >= 1, "n", n, "must be >= 1")
    rows = []
    for logp_Y, reward_Y in zip(ref_logp_XY, reward_XY, strict=True):
        _, level_Y, p_R = _levels(logp_Y, reward_Y)
        cumulative_R = p_R.cumsum(0)
        d_R = (p_R / cumulative_R).nan_to_num(0.0)  # 0/0: levels below any that ever occur
        share_R = (-torch.expm1(n * torch.log1p(-d_R)) / d_R).where(d_R > 0, d_R.new_full((), n))
        ratio_R = torch.special.xlogy(n - 1, cumulative_R) + share_R.log()
        rows.append(logp_Y + ratio_R[level_Y])
    return torch.stack(rows).log_softmax(-1)


def best_of_n_kl_bound(n: int) -> float:
    """log n - (n - 1)/n: the KL of best-of-n without ties at the limit of many outcomes, and an upper bound always
    (Beirami et al. 2024, arXiv:2401.01879, theorem 1), in nats."""
    require(n >= 1, "n", n, "must be >= 1")
    return math.log(n) - (n - 1) / n


def win_rate(logp_XY: Tensor, other_logp_XY: Tensor, reward_XY: Tensor) -> float:
    """P(r(y) > r(y')) + ½·P(r(y) = r(y')) for y ~ π and y' ~ other at the same prompt, in [0, 1]."""
    beaten = torch.empty_like(reward_XY)
    for x, (logp_Y, reward_Y) in enumerate(zip(other_logp_XY, reward_XY, strict=True)):
        _, level_Y, p_R = _levels(logp_Y, reward_Y)
        beaten[x] = (p_R.cumsum(0) - p_R / 2)[level_Y]
    return expectation(logp_XY, beaten)


def _levels(logp_Y: Tensor, reward_Y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The different rewards R ascending, which of them each completion has (Y,), and the probability of each (R,)."""
    value_R, level_Y = torch.unique(reward_Y, return_inverse=True)
    return value_R, level_Y, logp_Y.new_zeros(len(value_R)).index_add(0, level_Y, logp_Y.exp())
