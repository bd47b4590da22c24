"""What PPO, GRPO, RLOO and REINFORCE++ share: pure functions on ragged vectors of tokens (`_T`) and responses (`_N`).

Nothing here knows of processes or micro-batches: statistics are over the vector given, so an algorithm that means the
whole iteration calls them in `prepare`, which has it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from alignlab.core import AlignlabError, Batch, Group, Metrics, segment_count, segment_mean, segment_std, segment_sum

KLEstimator = Literal["k1", "k2", "k3"]
Aggregation = Literal["response", "token", "sum"]


def kl_estimate(logp: Tensor, ref_logp: Tensor, estimator: KLEstimator) -> Tensor:
    """KL(π‖π_ref) from tokens drawn from π, elementwise, in nats (Schulman 2020, "Approximating KL divergence").

    k1 = log π/π_ref is unbiased and may be negative; k2 = ½·(log π/π_ref)² is biased and ≥ 0; k3 = π_ref/π - 1 +
    log π/π_ref is unbiased and ≥ 0. As a loss, k2 has in expectation the gradient of KL(π‖π_ref), k3 that of
    KL(π_ref‖π) and k1 none (Hu et al. 2025, arXiv:2501.03262, appendix B.1). `logp` and `ref_logp` are of one shape.
    """
    log_ratio = logp - ref_logp
    if estimator == "k1":
        return log_ratio
    return 0.5 * log_ratio.square() if estimator == "k2" else torch.expm1(-log_ratio) + log_ratio


def shaped_reward(penalty_T: Tensor, response_T: Tensor, score_N: Tensor | None, step_T: Tensor | None) -> Tensor:
    """Reward of each token, shape (T,): -penalty, plus the step's reward, plus the response's score at its last token
    (Ziegler et al. 2019, arXiv:1909.08593, equation 2, by token). The score of a response without tokens is lost."""
    reward_T = -penalty_T if step_T is None else step_T - penalty_T
    if score_N is not None:
        length_N = segment_count(response_T, len(score_N))
        some_N = length_N > 0
        reward_T = reward_T.index_add(0, (length_N.cumsum(0) - 1)[some_N], score_N[some_N].to(reward_T))
    return reward_T


def gae(reward_T: Tensor, value_T: Tensor, response_T: Tensor, gamma: float, lam: float) -> Tensor:
    """Generalised advantages A_t = Σ_l (γλ)^l δ_{t+l}, δ_t = r_t + γ·V_{t+1} - V_t (Schulman et al. 2016,
    arXiv:1506.02438, equation 16), shape (T,). What follows the last token of a response is worth 0.

    Args:
        reward_T, value_T: what the choice of each token earned, and the value before it was chosen.
        response_T: whose token it is, ascending.
        gamma, lam: in [0, 1]; λ = 1 gives the discounted return minus the value.
    """
    next_T = torch.zeros_like(value_T)
    next_T[:-1] = torch.where(response_T[1:] == response_T[:-1], value_T[1:], 0.0)
    advantage_T = reward_T + gamma * next_T - value_T
    length_N = torch.unique_consecutive(response_T, return_counts=True)[1]
    end_N = length_N.cumsum(0)
    for back in range(2, int(length_N.max()) + 1 if len(length_N) else 0):  # all responses at once, from their ends
        token_N = (end_N - back)[length_N >= back]
        advantage_T[token_N] += gamma * lam * advantage_T[token_N + 1]
    return advantage_T


def whiten(x: Tensor, shift_mean: bool = True) -> Tensor:
    """x at variance 1 and mean 0, or at the mean it had where `shift_mean` is false; 0 where all values are equal.

    The variance is that of the population (no Bessel's correction), as in github.com/openai/lm-human-preferences.
    """
    if not len(x):
        return x
    mean = x.mean()
    whitened = (x - mean) * torch.rsqrt((x - mean).square().mean() + 1e-8)
    return whitened if shift_mean else whitened + mean


def clipped_surrogate(ratio: Tensor, advantage: Tensor, clip: float) -> Tensor:
    """-min(ρ·A, clip(ρ, 1-ε, 1+ε)·A), elementwise, ρ = π/π_old (Schulman et al. 2017, arXiv:1707.06347, equation 7)."""
    return -torch.minimum(ratio * advantage, ratio.clamp(1 - clip, 1 + clip) * advantage)


def clipped_value_loss(value: Tensor, old_value: Tensor, target: Tensor, clip: float) -> Tensor:
    """½·max((V - R)², (clip(V, V_old ± ε) - R)²), elementwise.

    From OpenAI's PPO code rather than the paper (Huang et al. 2022, "The 37 implementation details of PPO", detail 9).
    """
    near = old_value + (value - old_value).clamp(-clip, clip)
    return 0.5 * torch.maximum((value - target).square(), (near - target).square())


def group_advantage(reward_N: Tensor, group_N: Tensor, count: int, normalize: bool, eps: float = 1e-6) -> Tensor:
    """(r - mean) / (std + eps) within each group, with Bessel's correction (Shao et al. 2024, arXiv:2402.03300,
    section 4.1.2); r - mean where not `normalize` (Liu et al. 2025, arXiv:2503.20783). Shape (N,)."""
    centred_N = reward_N - segment_mean(reward_N, group_N, count)[group_N]
    return centred_N / (segment_std(reward_N, group_N, count)[group_N] + eps) if normalize else centred_N


def leave_one_out_advantage(reward_N: Tensor, group_N: Tensor, count: int) -> Tensor:
    """r minus the mean of the group's other rewards (Ahmadian et al. 2024, arXiv:2402.14740, section 2.3), shape (N,).
    That is k/(k-1) times r - mean; 0 in a group of one."""
    size_N = segment_count(group_N, count)[group_N]
    centred_N = reward_N - segment_mean(reward_N, group_N, count)[group_N]
    return centred_N * size_N / (size_N - 1).clamp(min=1)


def per_response(loss_T: Tensor, response_T: Tensor, count: int, aggregation: Aggregation) -> Tensor:
    """The mean over each response's tokens ("response"), their sum ("sum"), or the tokens as they are ("token")."""
    if aggregation == "token":
        return loss_T
    return (segment_mean if aggregation == "response" else segment_sum)(loss_T, response_T, count)


def explained_variance(predicted: Tensor, target: Tensor) -> float:
    """1 - Var(target - predicted) / Var(target): 1 for a perfect critic, 0 for a constant one, below 0 for a worse one;
    0 where the target does not vary."""
    spread = float(target.var(unbiased=False)) if len(target) else 0.0
    return 1 - float((target - predicted).var(unbiased=False)) / spread if spread > 0 else 0.0


def policy_metrics(logp_T: Tensor, old_logp_T: Tensor, clip: float | None = None) -> Metrics:
    """Health of an update, by token: the ratio (1 before the first), how often it is clipped, k3 of KL(π_old‖π)."""
    ratio_T = (logp_T - old_logp_T).exp().detach()
    found = {"ratio": ratio_T, "approx_kl": kl_estimate(old_logp_T, logp_T.detach(), "k3")}
    return found if clip is None else found | {"clip_fraction": ((ratio_T - 1).abs() > clip).float()}


def rollout_report(batch: Batch) -> dict[str, float]:
    """Of an iteration, before it is trained on: KL to the reference (k1, nats per response), share that ended."""
    if not batch.N:
        return {}
    kl_N = segment_sum((batch["old_logp_T"] - batch["ref_logp_T"]).double(), batch.response_T, batch.N)
    return {"kl": float(kl_N.mean()), "finished": float(batch.finished_N.double().mean())}


def require_siblings(groups: Sequence[Group], name: str) -> None:
    """Raises AlignlabError, with the record's origin, where there is only one response to a prompt."""
    for group in groups:
        if len(group.responses) == 1:
            raise AlignlabError(
                f"{group.origin or 'a group'}: {name} compares responses to the same prompt and there is only one: "
                "source.group_size must be at least 2"
            )
