"""Kahneman-Tversky Optimization (Ethayarajh et al. 2024, arXiv:2402.01306): from what is desirable, not from pairs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from math import isclose
from statistics import fmean

import torch
from torch import Tensor

from alignlab.core import Algorithm, AlignlabError, Batch, Group, Metrics, Outputs, Response, require, segment_sum
from alignlab.core.order import RANKS, compared, ranked

MISMATCHED = "mismatched"
"""Column of the responses that were written for another prompt and are there for the baseline alone."""


def kto_loss(
    ratio_N: Tensor, z_ref_N: Tensor, desirable_N: Tensor, beta: float, weights: tuple[float, float] = (1.0, 1.0)
) -> Tensor:
    """λ_y − v(x, y), equation 8 (7 in the first version), per response, in [0, λ_y].

    Args:
        ratio_N: log π/π_ref, summed over tokens, shape (N,).
        z_ref_N: the baseline, an estimate of KL(π‖π_ref) in nats, >= 0, without gradient, shape (N,).
        desirable_N: 1 or 0, or bool, shape (N,).
        beta: how soon gains and losses saturate, > 0.
        weights: λ_D and λ_U, > 0.
    """
    gain_N = beta * (ratio_N - z_ref_N)
    return torch.where(desirable_N > 0, weights[0] * torch.sigmoid(-gain_N), weights[1] * torch.sigmoid(gain_N))


def baseline(groups: Sequence[Group]) -> float:
    """z_ref (section 4.1): max(0, mean of log π/π_ref over prompts with a response to another prompt), in nats; 0
    where there is no such response. Needs their `old_logp` and `ref_logp`."""
    ratios = [
        sum(r.columns["old_logp"]) - sum(r.columns["ref_logp"])  # type: ignore[arg-type]
        for g in groups
        for r in g.responses
        if MISMATCHED in r.columns
    ]
    return max(0.0, fmean(ratios)) if ratios else 0.0


class KTO(Algorithm):
    """Learns to raise desirable responses above, and to push undesirable ones below, a baseline common to all.

    The baseline is taken over all prompts of an iteration, and held while the iteration lasts. Which responses are
    desirable: those whose `desirable` is not 0; without that column, by `lost_to`, `preference` or `score` those that
    win more often than they lose (of a pair, the winner); else those whose `reward` is above `threshold`. What wins
    as often as it loses, or has exactly the mean reward, is left out.

    Args:
        beta: how soon gains and losses saturate, > 0.
        weight_desirable: λ_D, > 0.
        weight_undesirable: λ_U, > 0. The paper advises λ_D·n_D / (λ_U·n_U) in [1, 4/3], n being their numbers.
        threshold: reward above which a response is desirable; None: the iteration's mean.
    """

    unit = "response"
    needs = ("ref_logp", "old_logp")

    def __init__(
        self,
        beta: float = 0.1,
        weight_desirable: float = 1.0,
        weight_undesirable: float = 1.0,
        threshold: float | None = None,
    ) -> None:
        require(beta > 0, "algorithm.beta", beta, "must be > 0")
        require(weight_desirable > 0, "algorithm.weight_desirable", weight_desirable, "must be > 0")
        require(weight_undesirable > 0, "algorithm.weight_undesirable", weight_undesirable, "must be > 0")
        self.beta, self.weights, self.threshold = beta, (weight_desirable, weight_undesirable), threshold

    def check(self, group: Group) -> str | None:
        return None if group.responses else "there is no response to learn from"

    def arrange(self, groups: Sequence[Group]) -> list[Group]:
        """To each group a response to the prompt before it, to the first one of the last; cut off where a row would
        become longer than the longest that was there, which may be all that the model can read."""
        groups = [g for g in groups if g.responses]
        longest = max((len(g.prompt_ids) + len(r.token_ids) for g in groups for r in g.responses), default=0)
        found = []
        for i, group in enumerate(groups):
            before = (groups[i - k] for k in range(1, len(groups)))
            if other := next((g for g in before if g.prompt_ids != group.prompt_ids), None):
                # Places go round: winners come first in many data sets, and shall not be the more frequent for it.
                y = other.responses[i % len(other.responses)]
                room = longest - len(group.prompt_ids)
                mask = y.loss_mask[:room] if y.loss_mask and any(y.loss_mask[:room]) else None
                taken = Response(y.token_ids[:room], mask, {MISMATCHED: 1.0}, y.finished, y.text, y.source)
                group = group.with_responses([*group.responses, taken])
            found.append(group)
        return found

    def prepare(self, groups: Sequence[Group]) -> list[Group]:
        z_ref = baseline(groups)
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
        ratio_N = segment_sum(outputs.logp_T - batch["ref_logp_T"], batch.response_T, batch.N)
        z_ref_N, desirable_N = batch["z_ref_G"][batch.group_N], batch["desirable_N"]
        loss_N = kto_loss(ratio_N, z_ref_N, desirable_N, self.beta, self.weights)
        return loss_N, {
            "reward_desirable": self.beta * ratio_N[desirable_N > 0],
            "reward_undesirable": self.beta * ratio_N[desirable_N == 0],
            "desirable": desirable_N,
        }


def desirability(group: Group, threshold: float | None, mean: float) -> list[int]:
    """For each response 1 (desirable), -1 (undesirable) or 0 (neither): see `KTO`. `mean` is that of the rewards.

    Raises:
        AlignlabError: nothing says which are.
    """
    columns = [r.columns for r in group.responses]
    if any("desirable" in c for c in columns):
        return [0 if "desirable" not in c else 1 if c["desirable"] else -1 for c in columns]
    ranks = {name for c in columns for name in c if name in RANKS} - {"reward"}
    if ranks and len(columns) > 1 and ranked(group)[0] != "reward":
        wins = [0] * len(columns)
        for winner, loser, probability, _ in compared(group):
            wins[winner] += probability > 0.5
            wins[loser] -= probability > 0.5
        return [(w > 0) - (w < 0) for w in wins]
    missing = [r for r in group.responses if "reward" not in r.columns]
    if len(missing) == len(columns) or any(r.source != "data" for r in missing):
        raise AlignlabError(
            f"{group.origin or 'a group'}: KTO needs to know which responses are desirable: a column 'desirable', "
            "a 'score' or 'preference' where there are several, or a 'reward' (see `scoring`)"
        )
    rewards: list[float | None] = [c.get("reward") for c in columns]  # type: ignore[misc]
    if threshold is None:
        return [0 if r is None or isclose(r, mean) else 1 if r > mean else -1 for r in rewards]
    return [0 if r is None else 1 if r > threshold else -1 for r in rewards]
