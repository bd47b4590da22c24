"""REINFORCE leave-one-out: Ahmadian et al. (2024, arXiv:2402.14740), after Kool et al. (2019)."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from alignlab.algorithms.importance import PolicyGradient, weighted
from alignlab.algorithms.policy_gradient import (
    leave_one_out_advantage,
    policy_metrics,
    require_siblings,
    rollout_report,
)
from alignlab.core import Batch, Group, Metrics, Outputs, require, segment_sum


class RLOO(PolicyGradient):
    """The policy gradient itself: a response is one action, its reward r - β·log(π/π_ref), its baseline the mean of its
    siblings' rewards. At the first update on an iteration's responses the gradient is an unbiased estimate of that of
    E[r] - β·KL(π‖π_ref), whose optimum is π_ref·exp(r/β). Later ones are REINFORCE on slightly old samples, without
    ratio or clipping, as in the paper.

    Args:
        kl_coef: β, price of a nat of KL to the reference, in units of reward, >= 0.
    """

    needs = ("ref_logp", "old_logp", "reward")
    reads = frozenset({"logp", "entropy"})

    def __init__(self, kl_coef: float = 0.05) -> None:
        require(kl_coef >= 0, "algorithm.kl_coef", kl_coef, "must be >= 0")
        self.kl_coef = kl_coef

    def check(self, group: Group) -> str | None:
        return None if len(group.responses) >= 2 else "RLOO needs at least two responses to compare"

    def prepare(self, groups: Sequence[Group]) -> list[Group]:
        require_siblings(groups, "RLOO")
        batch = Batch(groups)
        log_ratio_T = batch["old_logp_T"].double() - batch["ref_logp_T"].double()
        shaped_N = batch["reward_N"].double() - self.kl_coef * segment_sum(log_ratio_T, batch.response_T, batch.N)
        batch.fill("advantage_N", leave_one_out_advantage(shaped_N, batch.group_N, batch.G))
        self.report = rollout_report(batch) | {"shaped_reward": float(shaped_N.mean()) if batch.N else 0.0}
        return list(groups)

    def loss(self, outputs: Outputs, batch: Batch) -> tuple[Tensor, Metrics]:
        """-A·log π(y|x) per response (section 2.3)."""
        logp_N = segment_sum(weighted(outputs.logp_T, batch), batch.response_T, batch.N)
        return -batch["advantage_N"] * logp_N, policy_metrics(outputs.logp_T, batch["old_logp_T"]) | {
            "entropy": outputs.entropy_T
        }
