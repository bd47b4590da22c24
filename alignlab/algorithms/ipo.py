"""Identity Preference Optimization (Azar et al. 2023, arXiv:2310.12036)."""

from __future__ import annotations

from torch import Tensor

from alignlab.algorithms.preferences import PairAlgorithm, pair_metrics, soft_label_loss
from alignlab.core import Batch, Metrics, Outputs, require


def ipo_loss(margin_P: Tensor, beta: float, probability_P: Tensor | float = 1.0) -> Tensor:
    """Equation 17, per pair, shape (P,): the squared distance of the margin from 1 / (2·beta).

    The margin stays bounded, however certain the labels are. With probability p the loss is least at
    (2p − 1) / (2·beta).

    Args:
        margin_P: (log π/π_ref)(winner) − (log π/π_ref)(loser), each a mean over tokens, in nats, shape (P,).
        beta: the paper's τ, strength of the KL constraint, > 0.
        probability_P: probability that the winner is preferred, in [0.5, 1].
    """
    return soft_label_loss(lambda margin: (margin - 1 / (2 * beta)) ** 2, margin_P, probability_P)


class IPO(PairAlgorithm):
    """Learns a fixed margin between winner and loser instead of an ever larger one.

    Log-ratios are averaged over the tokens of a response, not summed. The paper does not say which; its authors
    confirmed the mean to TRL, where the sum had made the effect of beta depend on the length.

    Args:
        beta: the paper's τ, strength of the KL constraint, > 0. The margin that is learned, in nats per token, is
            1 / (2·beta).

    Raises:
        ConfigError: beta is not positive.
    """

    needs = ("ref_logp",)

    def __init__(self, beta: float = 0.1) -> None:
        require(beta > 0, "algorithm.beta", beta, "must be > 0")
        self.beta = beta

    def loss(self, outputs: Outputs, batch: Batch) -> tuple[Tensor, Metrics]:
        log_ratio_N = batch.mean(outputs.logp_T - batch["ref_logp_T"])
        margin_P = batch.pairs.difference(log_ratio_N)
        return ipo_loss(margin_P, self.beta, batch.pairs.probability_P), pair_metrics(log_ratio_N, batch.pairs)
