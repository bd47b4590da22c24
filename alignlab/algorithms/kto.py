"""Kahneman-Tversky Optimization (Ethayarajh et al. 2024, arXiv:2402.01306): single responses, desirable or not."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from statistics import fmean

import torch
from torch import Tensor

from alignlab.algorithms.desirability import desirability
from alignlab.core import Algorithm, AlignlabError, Batch, Group, Metrics, Outputs, Response, require

MISMATCHED = "mismatched"
"""Column of responses that were written for another prompt: they serve to estimate the baseline."""


def kto_loss(
    log_ratio_N: Tensor, z_ref_N: Tensor, desirable_N: Tensor, beta: float, weights: tuple[float, float] = (1.0, 1.0)
) -> Tensor:
    """λ_y − v(x, y), equation 8 (7 in the first version), per response, in [0, λ_y], shape (N,).

    Args:
        log_ratio_N: log π/π_ref, summed over tokens, in nats, shape (N,).
        z_ref_N: the baseline, an estimate of KL(π‖π_ref), in nats, >= 0, without gradient, shape (N,).
        desirable_N: whether the response is desirable: 1 or 0, or bool, shape (N,).
        beta: how soon gains and losses saturate, > 0.
        weights: λ_D and λ_U, > 0.
    """
    gain_N = beta * (log_ratio_N - z_ref_N)
    return torch.where(desirable_N > 0, weights[0] * torch.sigmoid(-gain_N), weights[1] * torch.sigmoid(gain_N))


def baseline(groups: Sequence[Group]) -> float | None:
    """z_ref (section 4.1), in nats: max(0, mean of log π/π_ref over the mismatched responses), from their columns
    `old_logp` and `ref_logp`; None if there are none."""
    ratios = [
        sum(map(float, r.columns["old_logp"])) - sum(map(float, r.columns["ref_logp"]))  # type: ignore[arg-type]
        for g in groups
        for r in g.responses
        if MISMATCHED in r.columns
    ]
    return max(0.0, fmean(ratios)) if ratios else None


class KTO(Algorithm):
    """Raises desirable responses above a baseline and pushes undesirable ones below it.

    The baseline is one number for each iteration, estimated from all its prompts; where these are all equal, as in the
    last batch of an epoch that has one record left, the last estimate holds. The first of these columns that a
    group has decides which responses are desirable: `desirable` (1 or 0); `lost_to`, `preference` or `score`
    (responses that win more often than they lose); `reward` (responses above `threshold`). Responses that win as often
    as they lose, or have exactly the mean reward, are left out.

    Args:
        beta: how soon gains and losses saturate, > 0.
        weight_desirable: λ_D, > 0.
        weight_undesirable: λ_U, > 0. The paper advises λ_D·n_D / (λ_U·n_U) in [1, 4/3]; n: number of responses.
        threshold: reward above which a response is desirable; None: the mean reward of the iteration.

    Raises:
        ConfigError: a value is out of its range.
    """

    needs = ("ref_logp", "old_logp")
    min_responses = 1

    def __init__(
        self,
        beta: float = 0.1,
        weight_desirable: float = 1.0,
        weight_undesirable: float = 1.0,
        threshold: float | None = None,
    ) -> None:
        weights = {"weight_desirable": weight_desirable, "weight_undesirable": weight_undesirable}
        for name, value in {"beta": beta, **weights}.items():
            require(value > 0, f"algorithm.{name}", value, "must be > 0")
        self.beta, self.weights, self.threshold = beta, (weight_desirable, weight_undesirable), threshold

    def arrange(self, groups: Sequence[Group]) -> list[Group]:
        """Add a mismatched response to each group: one to the prompt before it (for the first group: the last prompt).
        It is cut so that no text becomes longer than the longest that was there."""
        groups = [g for g in groups if g.responses]
        longest = max((len(g.prompt_ids) + len(r.token_ids) for g in groups for r in g.responses), default=0)
        found = []
        for i, group in enumerate(groups):
            before = (groups[i - k] for k in range(1, len(groups)))
            if other := next((g for g in before if g.prompt_ids != group.prompt_ids), None):
                # Not always the first response: in many data sets that is the winner.
                y = other.responses[i % len(other.responses)]
                room = longest - len(group.prompt_ids)
                mask = y.loss_mask[:room] if y.loss_mask and any(y.loss_mask[:room]) else None
                taken = Response(y.token_ids[:room], mask, {MISMATCHED: 1.0}, y.finished, y.text, y.source)
                group = group.with_responses([*group.responses, taken])
            found.append(group)
        return found

    def prepare(self, groups: Sequence[Group]) -> list[Group]:
        estimate = baseline(groups)
        if estimate is not None:
            self.state = {"z_ref": estimate}
        elif groups and "z_ref" not in self.state:
            raise AlignlabError(
                f"{groups[0].place}: KTO takes its baseline from responses to other prompts, and this iteration has "
                "one prompt only: training.batch_size must be at least 2, and the data hold different prompts"
            )
        z_ref = self.state.get("z_ref", 0.0)
        groups = [g.with_responses([r for r in g.responses if MISMATCHED not in r.columns]) for g in groups]
        rewards = [r.columns["reward"] for g in groups for r in g.responses if "reward" in r.columns]
        found = []
        for group in groups:
            signs = desirability(group, self.threshold, fmean(rewards) if rewards else 0.0)  # type: ignore[arg-type]
            known = [(r, sign) for r, sign in zip(group.responses, signs, strict=True) if sign]
            marked = [replace(r, columns={**r.columns, "desirable": float(sign > 0)}) for r, sign in known]
            if marked:
                found.append(replace(group, responses=marked, columns={**group.columns, "z_ref": z_ref}))
        self.report = {"z_ref": z_ref}
        return found

    def loss(self, outputs: Outputs, batch: Batch) -> tuple[Tensor, Metrics]:
        log_ratio_N = batch.sum(outputs.logp_T - batch["ref_logp_T"])
        z_ref_N, desirable_N = batch["z_ref_G"][batch.group_N], batch["desirable_N"]
        loss_N = kto_loss(log_ratio_N, z_ref_N, desirable_N, self.beta, self.weights)
        return loss_N, {
            "reward_desirable": self.beta * log_ratio_N[desirable_N > 0],
            "reward_undesirable": self.beta * log_ratio_N[desirable_N == 0],
            "desirable": desirable_N,
        }
