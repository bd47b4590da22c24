"""REINFORCE leave-one-out: Ahmadian et al. (2024, arXiv:2402.14740), after Kool et al. (2019)."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from alignlab.algorithms.advantages import leave_one_out_advantage
from alignlab.algorithms.importance import weighted
from alignlab.algorithms.policy_gradient import policy_metrics, require_siblings, rollout_report
from alignlab.core import Algorithm, Batch, Group, Metrics, Outputs, require


class RLOO(Algorithm):
    """The plain policy gradient. A whole response is one action. Its reward is r − β·log(π/π_ref), its baseline the
    mean reward of its siblings.

    At the first update of an iteration the gradient is an unbiased estimate of that of E[r] − β·KL(π‖π_ref), whose
    optimum is π_ref·exp(r/β), normalised. Later updates of the iteration use slightly old samples, without ratio or
    clipping, as in the paper.

    Args:
        kl_coef: β, price of a nat of KL to the reference, in units of reward, >= 0.

    Raises:
        ConfigError: kl_coef is negative.
    """

    needs = ("ref_logp", "old_logp", "reward")
    reads = frozenset({"logp", "entropy"})
    min_responses = 2
    off_policy_correction = True

    def __init__(self, kl_coef: float = 0.05) -> None:
        require(kl_coef >= 0, "algorithm.kl_coef", kl_coef, "must be >= 0")
        self.kl_coef = kl_coef

    def prepare(self, groups: Sequence[Group]) -> list[Group]:
        require_siblings(groups, "RLOO")
        batch = Batch(groups)
        log_ratio_N = batch.sum(batch["old_logp_T"].double() - batch["ref_logp_T"].double())
        shaped_N = batch["reward_N"].double() - self.kl_coef * log_ratio_N
        batch.fill("advantage_N", leave_one_out_advantage(shaped_N, batch.group_N, batch.G))
        self.report = rollout_report(batch) | {"shaped_reward": float(shaped_N.mean()) if batch.N else 0.0}
        return list(groups)

    def loss(self, outputs: Outputs, batch: Batch) -> tuple[Tensor, Metrics]:
        """−A·log π(y|x) per response (section 2.3)."""
        loss_N = -batch["advantage_N"] * batch.sum(weighted(outputs.logp_T, batch))
        return loss_N, policy_metrics(outputs.logp_T, batch["old_logp_T"]) | {"entropy": outputs.entropy_T}
