"""Reward model from preferences: Bradley and Terry (1952), as in Ouyang et al. (2022, arXiv:2203.02155). Options: the
margin of Llama 2, centring, and a language-model loss that regularises the trunk."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from alignlab.algorithms.preferences import soft_label_loss
from alignlab.core import Algorithm, Batch, Group, Metrics, Outputs, Unit, require, require_choice, segment_mean
from alignlab.core.order import compared

BINS = 10
"""Bins of the calibration error: of equal width, over confidences from 1/2 to 1."""


def bradley_terry_loss(margin_P: Tensor, probability_P: Tensor | float = 1.0) -> Tensor:
    """Negative log-likelihood of the labels under P(w ≻ l) = σ(r_w − r_l) (Ouyang et al., equation 1), per pair, in
    nats, shape (P,).

    Args:
        margin_P: reward of the winner minus reward of the loser, shape (P,).
        probability_P: probability that the winner is preferred, in [0.5, 1]; 1 for a certain label.
    """
    return soft_label_loss(lambda margin: -logsigmoid(margin), margin_P, probability_P)


def calibration(margin_P: Tensor, probability_P: Tensor) -> Metrics:
    """Confidence minus accuracy of the predicted winner, per pair: one metric for each bin of confidence σ(|margin|).

    The mean of `_calibration_b` over all pairs is (share of pairs in bin b) · (confidence − accuracy in bin b),
    however the pairs are split into micro-batches. `calibration_error` sums the absolute means.

    Args:
        margin_P: reward of the winner minus reward of the loser, shape (P,). At 0 the accuracy is 1/2.
        probability_P: probability that the winner is preferred, in [0.5, 1], shape (P,).
    """
    margin_P, probability_P = margin_P.detach().double(), probability_P.double()
    confidence_P = margin_P.abs().sigmoid()
    right_P = torch.where(margin_P > 0, probability_P, torch.where(margin_P < 0, 1 - probability_P, 0.5))
    bin_P = ((confidence_P - 0.5) * (2 * BINS)).long().clamp(max=BINS - 1)
    gap_P = confidence_P - right_P
    return {f"_calibration_{b}": torch.where(bin_P == b, gap_P, 0.0) for b in range(BINS)}


def calibration_error(means: Mapping[str, float]) -> dict[str, float]:
    """Expected calibration error, in [0, 1] (Guo et al. 2017, arXiv:1706.04599, equation 3), from the means of
    `calibration`; empty if there are none."""
    found = [abs(value) for name, value in means.items() if name.startswith("_calibration_")]
    return {"calibration_error": sum(found)} if found else {}


class RewardModel(Algorithm):
    """Learns a score for (prompt, response). The difference of two scores is the log-odds of being preferred.

    Metrics beside accuracy: `calibration_error`; `brier`, the mean squared error of the predicted probability; and
    `length_correlation`, Pearson's correlation of score and response length.

    Args:
        margin: factor m, >= 0: the winner's score must exceed the loser's by m times the margin in the data, the
            difference of their scores there, or 1 if they have none (Touvron et al. 2023, arXiv:2307.09288, equation
            2). 0: no margin.
        center: weight, >= 0, of (r_w + r_l)², which keeps scores around zero: preferences do not determine their
            level (Eisenstein et al. 2023, arXiv:2312.09244).
        mean_over: "pairs": every pair weighs the same. "prompts": every prompt weighs the same, because its pairs are
            averaged first (Ouyang et al., equation 1).
        lm_weight: weight, >= 0, of −log P of the best response to each pair's prompt under the base's own language
            head, a mean over tokens, in nats. It regularises the trunk (the SFT kind of Yang et al. 2024,
            arXiv:2406.10216, as a plain likelihood).

    Raises:
        ConfigError: a value is out of its range.
    """

    unit: Unit = "pair"
    model = "score"
    min_responses = 2
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
        require_choice("algorithm.mean_over", mean_over, ("pairs", "prompts"))
        self.margin, self.center, self.lm_weight = margin, center, lm_weight
        if mean_over == "prompts":
            self.unit = "group"
        if lm_weight:
            self.reads = frozenset({"score", "logp"})

    def prepare(self, groups: Sequence[Group]) -> list[Group]:
        return [g for g in groups if compared(g)]  # a prompt without pairs has no loss and must not count

    def loss(self, outputs: Outputs, batch: Batch) -> tuple[Tensor, Metrics]:
        pairs, score_N = batch.pairs, outputs.score_N
        winner_P, loser_P = score_N[pairs.winner_P], score_N[pairs.loser_P]
        margin_P = winner_P - loser_P
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
            nll_N = batch.mean(-outputs.logp_T)
            loss_P = loss_P + self.lm_weight * nll_N[batch.best_G[pairs.group_P]]
            metrics["lm_loss"] = nll_N[batch.best_G]
        if self.unit == "group":
            return segment_mean(loss_P, pairs.group_P, batch.G), metrics
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
