"""Simple Preference Optimization (Meng et al. 2024, arXiv:2405.14734): no reference, no effect of length."""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import logsigmoid

from alignlab.algorithms.dpo import PairAlgorithm, either_way, pair_metrics
from alignlab.core import Batch, Metrics, Outputs, require, segment_mean


def simpo_loss(margin_P: Tensor, beta: float, gamma: float, probability_P: Tensor | float = 1.0) -> Tensor:
    """Equation 6, per pair, in nats.

    Args:
        margin_P: mean log-prob per token of the winner minus that of the loser, shape (P,).
        beta: scale of the reward beta / |y| · log π (equation 4), > 0.
        gamma: by how much the winner's reward shall be above the loser's, >= 0.
        probability_P: probability that the winner is preferred, in [0.5, 1].
    """
    return either_way(lambda margin: -logsigmoid(beta * margin - gamma), margin_P, probability_P)


class SimPO(PairAlgorithm):
    """Learns from preference pairs with the mean log-prob per token, what decoding goes by, as the reward.

    Args:
        beta: scale of the reward, > 0; the paper has 2 to 2.5, later models 10.
        gamma: margin between the rewards aimed at, >= 0; the authors advise 0.25 to 0.5 of beta.
    """

    def __init__(self, beta: float = 2.0, gamma: float = 1.0) -> None:
        require(beta > 0, "algorithm.beta", beta, "must be > 0")
        require(gamma >= 0, "algorithm.gamma", gamma, "must be >= 0")
        self.beta, self.gamma = beta, gamma

    def loss(self, outputs: Outputs, batch: Batch) -> tuple[Tensor, Metrics]:
        pairs = batch.pairs
        mean_N = segment_mean(outputs.logp_T, batch.response_T, batch.N)
        margin_P = mean_N[pairs.winner_P] - mean_N[pairs.loser_P]
        loss_P = simpo_loss(margin_P, self.beta, self.gamma, pairs.probability_P)
        return loss_P, pair_metrics(self.beta * mean_N, pairs)
