"""Reward model from preferences: Bradley and Terry (1952), as in Ouyang et al. (2022, arXiv:2203.02155), with the
margin of Llama 2, centring, and a language-model loss that keeps the trunk a language model."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from alignlab.core import Algorithm, Batch, Group, Metrics, Outputs, Unit, require, segment_mean
from alignlab.core.order import compared

BINS = 10
"""Of the calibration error: of equal width, over the confidences that there are, 1/2 to 1."""


def bradley_terry_loss(margin_P: Tensor, probability_P: Tensor | float = 1.0) -> Tensor:
    """Negative log-likelihood of the labels under P(w ≻ l) = σ(r_w − r_l) (Ouyang et al., equation 1), in nats.

    Args:
        margin_P: reward of the winner minus reward of the loser, shape (P,).
        probability_P: probability that the winner is preferred, in [0.5, 1]; 1 for a certain label.
    """
    return -probability_P * logsigmoid(margin_P) - (1 - probability_P) * logsigmoid(-margin_P)


def calibration(margin_P: Tensor, probability_P: Tensor) -> Metrics:
    """How far the confidence σ(|margin|) in the predicted winner is from how often it wins, per pair and bin.

    The mean of `_calibration_b` is the share of bin b times (confidence − accuracy) in it, whatever the split, so
    that the sum of their sizes is the expected calibration error (Guo et al. 2017, arXiv:1706.04599, equation 3).

    Args:
        margin_P: reward of the winner minus reward of the loser, shape (P,). Of equals either may win: accuracy 1/2.
        probability_P: probability that the winner is preferred, in [0.5, 1].
    """
    margin_P, probability_P = margin_P.detach().double(), probability_P.double()
    confidence_P = margin_P.abs().sigmoid()
    right_P = torch.where(margin_P > 0, probability_P, torch.where(margin_P < 0, 1 - probability_P, 0.5))
    bin_P = ((confidence_P - 0.5) * (2 * BINS)).long().clamp(max=BINS - 1)
    gap_P = confidence_P - right_P
    return {f"_calibration_{b}": torch.where(bin_P == b, gap_P, 0.0) for b in range(BINS)}


def calibration_error(means: Mapping[str, float]) -> dict[str, float]:
    """The expected calibration error, in [0, 1], from the means of `calibration`; nothing where there are none."""
    found = [abs(value) for name, value in means.items() if name.startswith("_calibration_")]
    return {"calibration_error": sum(found)} if found else {}


class RewardModel(Algorithm):
    """Learns a score for (prompt, response) whose differences are log-odds of being preferred.

    Beside accuracy it reports how well it is calibrated (`calibration_error`, and the Brier score `brier`, the mean
    square of what the probability is off by) and `length_correlation`, Pearson's, of score and response length.

    Args:
        margin: factor, >= 0, on how much better the winner is by the data (the difference of their scores): r_w must
            exceed r_l by as much (Touvron et al. 2023, arXiv:2307.09288, equation 2). Data that names no margin
            has 1. 0: none.
        center: weight, >= 0, of (r_w + r_l)² (Eisenstein et al. 2023, arXiv:2312.09244): a score's level, which
            preferences leave open, goes to zero.
        mean_over: "pairs", or "prompts": the pairs of one prompt's ranking are averaged first, so that each prompt
            weighs the same however many responses it has (Ouyang et al., equation 1).
        lm_weight: weight, >= 0, of the mean −log P, in nats per token, of the best response of each pair's prompt
            under the base's own language head, as a regulariser of the trunk (the SFT kind of Yang et al. 2024,
            arXiv:2406.10216, as a plain likelihood).
    """

    unit: Unit = "pair"
    model = "score"
    reads = frozenset({"score"})

    def __init__(
        self,
        margin: float = 0.0,
        center: float = 0.0,
        mean_over: Literal["pairs", "prompts"] = "pairs",
        lm_weight: float = 0.0,
    ) -> None:
        for name, value in (("margin", margin), ("center", center), ("lm_weight", lm_weight)):
            require(value >= 0, f"algorithm.{name}", value, "must be >= 0")
        require(mean_over in ("pairs", "prompts"), "algorithm.mean_over", mean_over, "must be pairs or prompts")
        self.margin, self.center, self.lm_weight = margin, center, lm_weight
        if mean_over == "prompts":
            self.unit = "group"
        if lm_weight:
            self.reads = frozenset({"score", "logp"})

    def check(self, group: Group) -> str | None:
        return None if len(group.responses) >= 2 else "a reward model needs at least two responses to compare"

    def prepare(self, groups: Sequence[Group]) -> list[Group]:
        return [g for g in groups if compared(g)]  # one of equals would count as a prompt without a loss

    def loss(self, outputs: Outputs, batch: Batch) -> tuple[Tensor, Metrics]:
        pairs, score_N = batch.pairs, outputs.score_N
        winner_P, loser_P = score_N[pairs.winner_P], score_N[pairs.loser_P]
        margin_P, group_P = winner_P - loser_P, batch.group_N[pairs.winner_P]
        loss_P = bradley_terry_loss(margin_P - self.margin * pairs.margin_P, pairs.probability_P)
        loss_P = loss_P + self.center * (winner_P + loser_P).square()
        sure_P = pairs.probability_P
        chance_P = margin_P.detach().sigmoid()
        length_N, exact_N = batch.length_N.double(), score_N.detach().double()
        metrics = {
            "accuracy": (margin_P > 0).float(),
            "margin": margin_P,
            "score": score_N,
            "brier": sure_P * (1 - chance_P).square() + (1 - sure_P) * chance_P.square(),
            **calibration(margin_P, sure_P),
            "_score_squared": exact_N.square(),
            "_length": length_N,
            "_length_squared": length_N.square(),
            "_score_length": exact_N * length_N,
        }
        if self.lm_weight:
            nll_N = segment_mean(-outputs.logp_T, batch.response_T, batch.N)
            loss_P = loss_P + self.lm_weight * nll_N[batch.best_G[group_P]]
            metrics["lm_loss"] = nll_N[batch.best_G]
        if self.unit == "group":
            return segment_mean(loss_P, group_P, batch.G), metrics
        return loss_P, metrics

    def derive(self, means: Mapping[str, float]) -> dict[str, float]:
        found = calibration_error(means)
        if "_length" not in means:
            return found
        score, length = means["score"], means["_length"]
        squares = means["_score_squared"], means["_length_squared"]
        spreads = squares[0] - score**2, squares[1] - length**2
        if all(spread > 1e-12 * square for spread, square in zip(spreads, squares, strict=True)):  # else all are equal
            found["length_correlation"] = (means["_score_length"] - score * length) / math.sqrt(math.prod(spreads))
        return found
