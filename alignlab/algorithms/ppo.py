"""Proximal Policy Optimization (Schulman et al. 2017, arXiv:1707.06347) for language models (Ziegler et al. 2019,
arXiv:1909.08593): each token is an action. Its reward is the KL penalty; the last token also earns the score."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal, get_args

from torch import Tensor

from alignlab.algorithms.advantages import gae, shaped_reward, whiten
from alignlab.algorithms.importance import weighted
from alignlab.algorithms.policy_gradient import (
    KLEstimator,
    clipped_surrogate,
    clipped_value_loss,
    explained_variance,
    kl_estimate,
    policy_metrics,
    rollout_report,
)
from alignlab.core import Algorithm, Batch, Group, Metrics, Outputs, require, require_choice


def adapted(kl_coef: float, kl: float, target: float, samples: int, horizon: int) -> float:
    """The KL coefficient of the next iteration: β·(1 + K·e), e = clip(KL/target − 1, ±0.2) (Ziegler et al., section
    2.2). K is 0.1 in the paper; in the authors' code and here it is samples / horizon, at most 1.

    Args:
        kl_coef: β of this iteration.
        kl: KL to the reference, measured over this iteration, in nats per response.
        target: KL that is wanted, in nats per response, > 0.
        samples: number of responses in this iteration.
        horizon: responses in which the coefficient changes by about 20 % at most, > 0.
    """
    error = min(max(kl / target - 1, -0.2), 0.2)
    return kl_coef * (1 + error * min(samples / horizon, 1.0))


class PPO(Algorithm):
    """Clipped policy gradient with a critic.

    The loss is a mean over all tokens of the minibatch, so a long response weighs more than a short one. The number of
    epochs is `source.ppo_epochs`; a minibatch has `training.batch_size` groups.

    Args:
        clip: ε, largest distance from 1 at which the ratio π/π_old still counts, in (0, 1).
        value_clip: largest distance from the old value at which a value still counts, in units of reward, > 0; None:
            the value loss is not clipped.
        value_weight: weight of the value loss, >= 0.
        gamma: discount, in [0, 1].
        lam: λ of generalised advantage estimation, in [0, 1].
        kl_coef: price of a nat of KL to the reference, in units of reward, >= 0. With `kl_target`, its initial value.
        kl_estimator: of the penalty: "k1", "k2" or "k3". The sum of k1 over a response is an unbiased KL(π‖π_ref).
        kl_target: KL that kl_coef is adapted to, in nats per response, > 0; None: kl_coef is constant.
        kl_horizon: responses in which kl_coef is adapted by about 20 % at most, > 0.
        rewards: what is earned besides the penalty. "outcome": the column `reward`, at the last token. "steps": the
            column `step_reward`, at the end of each step. "both": their sum.
        whiten_rewards: scale the rewards of all tokens of the iteration to variance 1; their mean stays.
        missing_eos_score: replaces the outcome of a response that did not end by itself; None: no replacement.
        entropy_weight: weight of an entropy bonus, >= 0.
        target_kl: skip the rest of an iteration when KL(π_old‖π) exceeds this, in nats per token, > 0; None: never.
        critic: the value head is on the policy's own trunk ("shared") or on a trunk of its own ("own").

    Raises:
        ConfigError: a value is out of its range.
    """

    unit = "token"
    off_policy_correction = True

    def __init__(
        self,
        clip: float = 0.2,
        value_clip: float | None = 0.2,
        value_weight: float = 0.1,
        gamma: float = 1.0,
        lam: float = 0.95,
        kl_coef: float = 0.05,
        kl_estimator: KLEstimator = "k1",
        kl_target: float | None = None,
        kl_horizon: int = 10_000,
        rewards: Literal["outcome", "steps", "both"] = "outcome",
        whiten_rewards: bool = False,
        missing_eos_score: float | None = None,
        entropy_weight: float = 0.0,
        target_kl: float | None = None,
        critic: Literal["shared", "own"] = "shared",
    ) -> None:
        require(0 < clip < 1, "algorithm.clip", clip, "must be in (0, 1)")
        for name, share in (("gamma", gamma), ("lam", lam)):
            require(0 <= share <= 1, f"algorithm.{name}", share, "must be in [0, 1]")
        for name, weight in (("value_weight", value_weight), ("kl_coef", kl_coef), ("entropy_weight", entropy_weight)):
            require(weight >= 0, f"algorithm.{name}", weight, "must be >= 0")
        require(kl_horizon > 0, "algorithm.kl_horizon", kl_horizon, "must be > 0")
        for name, limit in (("value_clip", value_clip), ("kl_target", kl_target), ("target_kl", target_kl)):
            require(limit is None or limit > 0, f"algorithm.{name}", limit, "must be > 0")
        require_choice("algorithm.kl_estimator", kl_estimator, get_args(KLEstimator))
        require_choice("algorithm.rewards", rewards, ("outcome", "steps", "both"))
        require_choice("algorithm.critic", critic, ("shared", "own"))
        self.clip, self.value_clip, self.value_weight = clip, value_clip, value_weight
        self.gamma, self.lam = gamma, lam
        self.kl_coef, self.kl_estimator, self.kl_target, self.kl_horizon = kl_coef, kl_estimator, kl_target, kl_horizon
        self.whiten_rewards, self.missing_eos_score, self.target_kl = whiten_rewards, missing_eos_score, target_kl
        self.entropy_weight, self.critic = entropy_weight, critic
        self.outcome, self.steps = rewards != "steps", rewards != "outcome"
        earned = (("reward",) if self.outcome else ()) + (("step_reward",) if self.steps else ())
        self.needs = ("ref_logp", "old_logp", "old_value", *earned)
        self.reads = frozenset({"logp", "entropy", "value", *(("entropy_grad",) if entropy_weight else ())})

    def prepare(self, groups: Sequence[Group]) -> list[Group]:
        """Advantages and value targets of all tokens. Advantages are whitened over the whole iteration."""
        batch = Batch(groups)
        if not batch.T:
            return list(groups)
        kl_coef = self.state.get("kl_coef", self.kl_coef)
        old_T, value_T = batch["old_logp_T"].double(), batch["old_value_T"].double()
        penalty_T = kl_coef * kl_estimate(old_T, batch["ref_logp_T"].double(), self.kl_estimator)
        score_N = batch["reward_N"].double() if self.outcome else None
        if score_N is not None and self.missing_eos_score is not None:
            score_N = score_N.where(batch.finished_N, score_N.new_tensor(self.missing_eos_score))
        step_T = batch["step_reward_T"].double() if self.steps else None
        reward_T = shaped_reward(penalty_T, batch.response_T, score_N, step_T)
        if self.whiten_rewards:
            reward_T = whiten(reward_T, shift_mean=False)
        advantage_T = gae(reward_T, value_T, batch.response_T, self.gamma, self.lam)
        target_T = advantage_T + value_T
        batch.fill("advantage_T", whiten(advantage_T))
        batch.fill("value_target_T", target_T)
        report = {"kl_coef": kl_coef, "explained_variance": explained_variance(value_T, target_T)}
        self.report = rollout_report(batch) | report
        if self.kl_target is not None:
            self.state = {"kl_coef": adapted(kl_coef, self.report["kl"], self.kl_target, batch.N, self.kl_horizon)}
        return list(groups)

    def loss(self, outputs: Outputs, batch: Batch) -> tuple[Tensor, Metrics]:
        ratio_T = (outputs.logp_T - batch["old_logp_T"]).exp()
        policy_T = weighted(clipped_surrogate(ratio_T, batch["advantage_T"], self.clip), batch)
        value_T = clipped_value_loss(outputs.value_T, batch["old_value_T"], batch["value_target_T"], self.value_clip)
        loss_T = policy_T + self.value_weight * value_T - self.entropy_weight * outputs.entropy_T
        return loss_T, policy_metrics(outputs.logp_T, batch["old_logp_T"], self.clip) | {
            "policy_loss": policy_T,
            "value_loss": value_T,
            "entropy": outputs.entropy_T,
        }

    def enough(self, metrics: Mapping[str, float]) -> bool:
        return self.target_kl is not None and metrics.get("approx_kl", 0.0) > self.target_kl
