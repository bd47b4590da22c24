"""Odds Ratio Preference Optimization (Hong et al. 2024, arXiv:2403.07691): SFT and preferences in one stage."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from alignlab.algorithms.dpo import PairAlgorithm, either_way, pair_metrics
from alignlab.core import Batch, Metrics, Outputs, require, segment_mean


def log_odds(logp: Tensor) -> Tensor:
    """log p / (1 − p), equation 4, from log p in nats; exact for p near 0 as near 1, any shape.

    At p = 1, where the odds are infinite, the p next to 1 that the precision knows stands for it.
    """
    below = logp.clamp(max=-torch.finfo(logp.dtype).eps)
    small = below < -0.6931471805599453  # log 1/2, where the two forms change places (Maechler 2012)
    return logp - torch.where(small, torch.log1p(-below.exp()), (-torch.expm1(below)).log())


def orpo_loss(winner_P: Tensor, loser_P: Tensor, ratio_weight: float, probability_P: Tensor | float = 1.0) -> Tensor:
    """Equations 6 and 7, per pair, in nats: likelihood of the winner, and the ratio of its odds to the loser's.

    Args:
        winner_P, loser_P: mean log-prob per token (equation 1), <= 0, shape (P,).
        ratio_weight: the paper's λ, weight of the odds ratio, > 0.
        probability_P: probability that the winner is preferred, in [0.5, 1].
    """
    nll_P = -probability_P * winner_P - (1 - probability_P) * loser_P
    ratio_P = log_odds(winner_P) - log_odds(loser_P)
    return nll_P + ratio_weight * either_way(lambda ratio: -logsigmoid(ratio), ratio_P, probability_P)


class ORPO(PairAlgorithm):
    """Learns from preference pairs without a reference, from the base model on: no SFT comes before.

    The likelihood term is of the response's tokens, as in the paper; the authors' code and TRL count the prompt's.

    Args:
        ratio_weight: the paper's λ, weight of the odds ratio, > 0.
    """

    def __init__(self, ratio_weight: float = 0.1) -> None:
        require(ratio_weight > 0, "algorithm.ratio_weight", ratio_weight, "must be > 0")
        self.ratio_weight = ratio_weight

    def loss(self, outputs: Outputs, batch: Batch) -> tuple[Tensor, Metrics]:
        pairs = batch.pairs
        mean_N = segment_mean(outputs.logp_T, batch.response_T, batch.N)
        winner_P, loser_P = mean_N[pairs.winner_P], mean_N[pairs.loser_P]
        loss_P = orpo_loss(winner_P, loser_P, self.ratio_weight, pairs.probability_P)
        return loss_P, pair_metrics(log_odds(mean_N), pairs) | {"nll": -winner_P}
