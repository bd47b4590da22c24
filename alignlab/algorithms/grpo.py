"""Group Relative Policy Optimization (Shao et al. 2024, arXiv:2402.03300) and Dr. GRPO (Liu et al. 2025,
arXiv:2503.20783)."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from alignlab.algorithms.importance import PolicyGradient, weighted
from alignlab.algorithms.policy_gradient import (
    Aggregation,
    KLEstimator,
    clipped_surrogate,
    group_advantage,
    kl_estimate,
    per_response,
    policy_metrics,
    require_siblings,
    rollout_report,
)
from alignlab.core import Batch, Group, Metrics, Outputs, require, segment_max


class GRPO(PolicyGradient):
    """PPO's clipped objective with the siblings' rewards in the place of a critic, and the KL penalty in the loss.

    The penalty acts on each token by itself, not on what it leads to, and k3 as a loss pulls along the gradient of
    KL(π_ref‖π): the optimum is near, but is not, π_ref·exp(r/β). RLOO's is.

    Args:
        clip: ε of the ratio, in (0, 1).
        kl_coef: weight of the penalty, >= 0. Where rewards are divided by their deviation, so is its meaning.
        kl_estimator: "k3" (the paper's equation 4) or "k2", whose gradient is that of KL(π‖π_ref).
        normalize: divide by the group's standard deviation; false is Dr. GRPO.
        aggregation: a mean over each response's tokens, then over responses ("response", the paper), over all tokens
            ("token"), or the sum over each response's tokens and the mean over responses ("sum", Dr. GRPO, whose
            constant divisor is left to the learning rate).
    """

    needs = ("ref_logp", "old_logp", "reward")
    reads = frozenset({"logp", "entropy"})

    def __init__(
        self,
        clip: float = 0.2,
        kl_coef: float = 0.04,
        kl_estimator: KLEstimator = "k3",
        normalize: bool = True,
        aggregation: Aggregation = "response",
    ) -> None:
        require(0 < clip < 1, "algorithm.clip", clip, "must be in (0, 1)")
        require(kl_coef >= 0, "algorithm.kl_coef", kl_coef, "must be >= 0")
        require(kl_estimator != "k1", "algorithm.kl_estimator", kl_estimator, "as a loss it has no gradient: k2 or k3")
        self.clip, self.kl_coef, self.kl_estimator = clip, kl_coef, kl_estimator
        self.normalize, self.aggregation = normalize, aggregation
        self.unit = "token" if aggregation == "token" else "response"

    def check(self, group: Group) -> str | None:
        return None if len(group.responses) >= 2 else "GRPO needs at least two responses to compare"

    def prepare(self, groups: Sequence[Group]) -> list[Group]:
        require_siblings(groups, "GRPO")
        batch = Batch(groups)
        if not batch.N:
            return list(groups)
        reward_N = batch["reward_N"].double()
        advantage_N = group_advantage(reward_N, batch.group_N, batch.G, self.normalize)
        batch.fill("advantage_N", advantage_N)
        different_G = segment_max(advantage_N.abs(), batch.group_N, batch.G) > 0
        self.report = rollout_report(batch) | {"informative_groups": float(different_G.double().mean())}
        return list(groups)

    def loss(self, outputs: Outputs, batch: Batch) -> tuple[Tensor, Metrics]:
        """Equation 3, negated."""
        ratio_T = (outputs.logp_T - batch["old_logp_T"]).exp()
        policy_T = weighted(clipped_surrogate(ratio_T, batch["advantage_N"][batch.response_T], self.clip), batch)
        kl_T = kl_estimate(outputs.logp_T, batch["ref_logp_T"], self.kl_estimator)
        loss = per_response(policy_T + self.kl_coef * kl_T, batch.response_T, batch.N, self.aggregation)
        return loss, policy_metrics(outputs.logp_T, batch["old_logp_T"], self.clip) | {
            "policy_loss": policy_T,
            "kl_loss": kl_T,
            "entropy": outputs.entropy_T,
        }
