"""Identity Preference Optimization (Azar et al. 2023, arXiv:2310.12036)."""

from __future__ import annotations

from torch import Tensor

from alignlab.algorithms.dpo import PairAlgorithm, either_way, pair_metrics
from alignlab.core import Batch, Metrics, Outputs, require, segment_mean


def ipo_loss(margin_P: Tensor, beta: float, probability_P: Tensor | float = 1.0) -> Tensor:
    """Equation 17, per pair: the squared distance of the margin from 1 / (2·beta), which bounds it however sure the
    labels are.

    Args:
        margin_P: (log π/π_ref)(winner) − (log π/π_ref)(loser), each a mean over tokens, shape (P,).
        beta: the paper's τ, strength of the KL constraint, > 0.
        probability_P: probability that the winner is preferred, in [0.5, 1]. With p the loss is least at
            (2p − 1) / (2·beta).
    """
    return either_way(lambda margin: (margin - 1 / (2 * beta)) ** 2, margin_P, probability_P)


class IPO(PairAlgorithm):
    """Learns a fixed margin between winner and loser instead of an ever larger one.

    The log-ratios are averaged over the tokens of a response, not summed. The paper does not say so; its authors
    confirmed it to TRL, where the sum made the effect of beta depend on the length.

    Args:
        beta: the paper's τ, strength of the KL constraint, > 0. The margin per token aimed at is 1 / (2·beta).
    """

    needs = ("ref_logp",)

    def __init__(self, beta: float = 0.1) -> None:
        require(beta > 0, "algorithm.beta", beta, "must be > 0")
        self.beta = beta

    def loss(self, outputs: Outputs, batch: Batch) -> tuple[Tensor, Metrics]:
        pairs = batch.pairs
        ratio_N = segment_mean(outputs.logp_T - batch["ref_logp_T"], batch.response_T, batch.N)
        margin_P = ratio_N[pairs.winner_P] - ratio_N[pairs.loser_P]
        return ipo_loss(margin_P, self.beta, pairs.probability_P), pair_metrics(ratio_N, pairs)
