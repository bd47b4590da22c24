"""REINFORCE++ (Hu et al. 2025, arXiv:2501.03262v9): no critic; advantages normalised over the whole iteration."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from alignlab.algorithms.advantages import gae, group_advantage, shaped_reward, whiten
from alignlab.algorithms.importance import weighted
from alignlab.algorithms.policy_gradient import (
    clipped_surrogate,
    kl_estimate,
    per_response,
    policy_metrics,
    require_siblings,
    rollout_report,
)
from alignlab.core import Algorithm, Batch, Group, Metrics, Outputs, require


class ReinforcePP(Algorithm):
    """PPO's clipped objective, a mean over each response's tokens and then over responses (equation 1).

    The advantage of a token is the return from there on, with the KL penalty in it: A_t = r − β·Σ_{i>=t}
    log(π_old/π_ref)_i, normalised over all tokens of the iteration (equations 4 and 5). With `baseline` it is the
    reward minus the mean of the group, the same for each of a response's tokens, normalised over all tokens of the
    iteration as in the authors' code (github.com/OpenRLHF/OpenRLHF); then the penalty is in the loss, as
    ½·β·log(π/π_ref)² (k2; equations 6 to 8).

    Args:
        clip: ε, largest distance from 1 at which the ratio π/π_old still counts, in (0, 1).
        kl_coef: β, price of a nat of KL to the reference, in units of reward, >= 0; with `baseline` the weight of the
            penalty in the loss.
        baseline: "REINFORCE++ with baseline", for several responses per prompt.

    Raises:
        ConfigError: a value is out of its range.
    """

    needs = ("ref_logp", "old_logp", "reward")
    reads = frozenset({"logp", "entropy"})
    off_policy_correction = True

    def __init__(self, clip: float = 0.2, kl_coef: float = 0.01, baseline: bool = False) -> None:
        require(0 < clip < 1, "algorithm.clip", clip, "must be in (0, 1)")
        require(kl_coef >= 0, "algorithm.kl_coef", kl_coef, "must be >= 0")
        self.clip, self.kl_coef, self.baseline = clip, kl_coef, baseline
        self.min_responses = 2 if baseline else 0

    def prepare(self, groups: Sequence[Group]) -> list[Group]:
        batch = Batch(groups)
        reward_N = batch["reward_N"].double()
        if self.baseline:
            require_siblings(groups, "REINFORCE++ with baseline")
            advantage_N = group_advantage(reward_N, batch.group_N, batch.G, normalize=False)
            batch.fill("advantage_T", whiten(advantage_N[batch.response_T]))
        else:
            penalty_T = self.kl_coef * (batch["old_logp_T"] - batch["ref_logp_T"]).double()
            earned_T = shaped_reward(penalty_T, batch.response_T, reward_N, None)
            no_value_T = earned_T.new_zeros(batch.T)
            batch.fill("advantage_T", whiten(gae(earned_T, no_value_T, batch.response_T, gamma=1.0, lam=1.0)))
        self.report = rollout_report(batch)
        return list(groups)

    def loss(self, outputs: Outputs, batch: Batch) -> tuple[Tensor, Metrics]:
        ratio_T = (outputs.logp_T - batch["old_logp_T"]).exp()
        policy_T = weighted(clipped_surrogate(ratio_T, batch["advantage_T"], self.clip), batch)
        loss_T = policy_T
        if self.baseline:
            loss_T = policy_T + self.kl_coef * kl_estimate(outputs.logp_T, batch["ref_logp_T"], "k2")
        loss_N = per_response(loss_T, batch.response_T, batch.N, "response")
        return loss_N, policy_metrics(outputs.logp_T, batch["old_logp_T"], self.clip) | {
            "policy_loss": policy_T,
            "entropy": outputs.entropy_T,
        }
