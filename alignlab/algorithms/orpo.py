"""Odds Ratio Preference Optimization (Hong et al. 2024, arXiv:2403.07691): SFT and preferences in one stage."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from alignlab.algorithms.preferences import PairAlgorithm, pair_metrics, soft_label_loss
from alignlab.core import Batch, Metrics, Outputs, require


def log_odds(logp: Tensor) -> Tensor:
    """log p / (1 − p), equation 4, elementwise, from log p in nats. Accurate for p near 0 and near 1.

    At p = 1 the odds are infinite: the largest p < 1 of the precision is used instead.
    """
    below = logp.clamp(max=-torch.finfo(logp.dtype).eps)
    small = below < -0.6931471805599453  # log 1/2: below it log1p is accurate, above it expm1 (Maechler 2012)
    return logp - torch.where(small, torch.log1p(-below.exp()), (-torch.expm1(below)).log())


def orpo_loss(winner_P: Tensor, loser_P: Tensor, ratio_weight: float, probability_P: Tensor | float = 1.0) -> Tensor:
    """Equations 6 and 7, per pair, in nats, shape (P,): −log P of the winner, plus a loss of the odds ratio.

    Args:
        winner_P, loser_P: mean log-prob per token (equation 1), in nats, <= 0, shape (P,).
        ratio_weight: the paper's λ, weight of the odds ratio, > 0.
        probability_P: probability that the winner is preferred, in [0.5, 1].
    """
    nll_P = -probability_P * winner_P - (1 - probability_P) * loser_P
    log_odds_ratio_P = log_odds(winner_P) - log_odds(loser_P)
    return nll_P + ratio_weight * soft_label_loss(lambda ratio: -logsigmoid(ratio), log_odds_ratio_P, probability_P)


class ORPO(PairAlgorithm):
    """Learns from preference pairs without a reference and without SFT before it.

    The likelihood term counts the tokens of the response, as in the paper; the authors' code and TRL also count those
    of the prompt.

    Args:
        ratio_weight: the paper's λ, weight of the odds ratio, > 0.

    Raises:
        ConfigError: the weight is not positive.
    """

    def __init__(self, ratio_weight: float = 0.1) -> None:
        require(ratio_weight > 0, "algorithm.ratio_weight", ratio_weight, "must be > 0")
        self.ratio_weight = ratio_weight

    def loss(self, outputs: Outputs, batch: Batch) -> tuple[Tensor, Metrics]:
        pairs = batch.pairs
        logp_N = batch.mean(outputs.logp_T)
        winner_P, loser_P = logp_N[pairs.winner_P], logp_N[pairs.loser_P]
        loss_P = orpo_loss(winner_P, loser_P, self.ratio_weight, pairs.probability_P)
        return loss_P, pair_metrics(log_odds(logp_N), pairs) | {"nll": -winner_P}
