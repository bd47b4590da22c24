"""Group Relative Policy Optimization (Shao et al. 2024, arXiv:2402.03300) and Dr. GRPO (Liu et al. 2025,
arXiv:2503.20783)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import get_args

from torch import Tensor

from alignlab.algorithms.advantages import group_advantage
from alignlab.algorithms.importance import weighted
from alignlab.algorithms.policy_gradient import (
    Aggregation,
    KLEstimator,
    clipped_surrogate,
    kl_estimate,
    per_response,
    policy_metrics,
    require_siblings,
    rollout_report,
)
from alignlab.core import Algorithm, Batch, Group, Metrics, Outputs, require, require_choice, segment_max


class GRPO(Algorithm):
    """PPO's clipped objective. The rewards of siblings replace the critic; the KL penalty is in the loss.

    The optimum is near π_ref·exp(r/β), but not equal to it (that of RLOO is), for two reasons: the penalty of a token
    ignores the tokens that follow it, and the gradient of k3 as a loss is that of KL(π_ref‖π).

    Args:
        clip: ε, largest distance from 1 at which the ratio π/π_old still counts, in (0, 1).
        kl_coef: weight of the KL penalty, >= 0. With `normalize` it is in units of the group's standard deviation.
        kl_estimator: "k3" (the paper's equation 4) or "k2", whose gradient is that of KL(π‖π_ref).
        normalize: divide advantages by the group's standard deviation; False: Dr. GRPO.
        aggregation: how token losses become one loss. "response": mean over the tokens of each response, then over
            responses (the paper). "token": mean over all tokens. "sum": sum over the tokens of each response, then
            mean over responses (Dr. GRPO; its constant divisor is left to the learning rate).

    Raises:
        ConfigError: a value is out of its range.
    """

    needs = ("ref_logp", "old_logp", "reward")
    reads = frozenset({"logp", "entropy"})
    min_responses = 2
    off_policy_correction = True

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
        require_choice("algorithm.kl_estimator", kl_estimator, ("k2", "k3"))
        require_choice("algorithm.aggregation", aggregation, get_args(Aggregation))
        self.clip, self.kl_coef, self.kl_estimator = clip, kl_coef, kl_estimator
        self.normalize, self.aggregation = normalize, aggregation
        self.unit = "token" if aggregation == "token" else "response"

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
