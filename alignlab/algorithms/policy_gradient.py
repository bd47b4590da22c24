"""What PPO, GRPO, RLOO and REINFORCE++ share in their losses and metrics: pure functions on flat vectors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from alignlab.core import AlignlabError, Batch, Group, Metrics, segment_mean, segment_sum

KLEstimator = Literal["k1", "k2", "k3"]
Aggregation = Literal["response", "token", "sum"]


def kl_estimate(logp: Tensor, ref_logp: Tensor, estimator: KLEstimator) -> Tensor:
    """KL(π‖π_ref) from tokens drawn from π, elementwise, in nats (Schulman 2020, "Approximating KL divergence").

    k1 = log π/π_ref is unbiased and may be negative; k2 = ½·(log π/π_ref)² is biased and ≥ 0; k3 = π_ref/π - 1 +
    log π/π_ref is unbiased and ≥ 0. The expected gradient of k2 as a loss is that of KL(π‖π_ref), of k3 that of
    KL(π_ref‖π), of k1 zero (Hu et al. 2025, arXiv:2501.03262, appendix B.1).

    Args:
        logp, ref_logp: log-probs of the tokens under π and π_ref, in nats, of one shape.
        estimator: "k1", "k2" or "k3".
    """
    log_ratio = logp - ref_logp
    if estimator == "k1":
        return log_ratio
    return 0.5 * log_ratio.square() if estimator == "k2" else torch.expm1(-log_ratio) + log_ratio


def clipped_surrogate(ratio: Tensor, advantage: Tensor, clip: float) -> Tensor:
    """−min(ρ·A, clip(ρ, 1−ε, 1+ε)·A), elementwise (Schulman et al. 2017, arXiv:1707.06347, equation 7).

    Args:
        ratio: ρ = π/π_old, > 0, any shape.
        advantage: A, of the same shape.
        clip: ε, in (0, 1).
    """
    return -torch.minimum(ratio * advantage, ratio.clamp(1 - clip, 1 + clip) * advantage)


def clipped_value_loss(value: Tensor, old_value: Tensor, target: Tensor, clip: float | None) -> Tensor:
    """½·max((V − R)², (clip(V, V_old ± ε) − R)²), elementwise. R is the target. With ε = None it is ½·(V − R)².

    From OpenAI's PPO code rather than the paper (Huang et al. 2022, "The 37 implementation details of PPO", detail 9).
    """
    if clip is None:
        return 0.5 * (value - target).square()
    near = old_value + (value - old_value).clamp(-clip, clip)
    return 0.5 * torch.maximum((value - target).square(), (near - target).square())


def per_response(loss_T: Tensor, response_T: Tensor, count: int, aggregation: Aggregation) -> Tensor:
    """The mean over each response's tokens ("response"), their sum ("sum"), or the tokens as they are ("token")."""
    if aggregation == "token":
        return loss_T
    return (segment_mean if aggregation == "response" else segment_sum)(loss_T, response_T, count)


def explained_variance(predicted: Tensor, target: Tensor) -> float:
    """1 − Var(target − predicted) / Var(target): 1 for a perfect critic, 0 for a constant one, below 0 for a worse one.
    0 if the target is constant."""
    spread = float(target.var(unbiased=False)) if len(target) else 0.0
    return 1 - float((target - predicted).var(unbiased=False)) / spread if spread > 0 else 0.0


def policy_metrics(logp_T: Tensor, old_logp_T: Tensor, clip: float | None = None) -> Metrics:
    """Metrics of an update, by token: the ratio π/π_old, how often it is clipped, and k3 of KL(π_old‖π) in nats. Before
    the first update of an iteration they are 1, 0 and 0."""
    ratio_T = (logp_T - old_logp_T).exp().detach()
    found = {"ratio": ratio_T, "approx_kl": kl_estimate(old_logp_T, logp_T.detach(), "k3")}
    return found if clip is None else found | {"clip_fraction": ((ratio_T - 1).abs() > clip).float()}


def rollout_report(batch: Batch) -> dict[str, float]:
    """Metrics of an iteration's samples: KL to the reference (k1, in nats per response), share that ended by itself."""
    if not batch.N:
        return {}
    kl_N = batch.sum((batch["old_logp_T"] - batch["ref_logp_T"]).double())
    return {"kl": float(kl_N.mean()), "finished": float(batch.finished_N.double().mean())}


def require_siblings(groups: Sequence[Group], name: str) -> None:
    """Raise AlignlabError, with the record's origin, if there is only one response to a prompt."""
    for group in groups:
        if len(group.responses) == 1:
            raise AlignlabError(
                f"{group.place}: {name} compares responses to the same prompt and there is only one: "
                "source.group_size must be at least 2"
            )
