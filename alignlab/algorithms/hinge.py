"""The hinge loss of RSO (Liu et al. 2023, arXiv:2309.06657): SLiC's loss on log-ratios to a reference."""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import relu

from alignlab.algorithms.preferences import PairAlgorithm, pair_metrics, soft_label_loss
from alignlab.core import Batch, Metrics, Outputs, require


def hinge_loss(margin_P: Tensor, gamma: float, probability_P: Tensor | float = 1.0) -> Tensor:
    """Equation 10 ("hinge-norm"), per pair, shape (P,): a support vector machine where DPO is a logistic regression.

    Args:
        margin_P: (log π/π_ref)(winner) − (log π/π_ref)(loser), each summed over tokens, in nats, shape (P,).
        gamma: 1 / (margin at which the loss is zero), > 0.
        probability_P: probability that the winner is preferred, in [0.5, 1].
    """
    return soft_label_loss(lambda margin: relu(1 - gamma * margin), margin_P, probability_P)


class Hinge(PairAlgorithm):
    """Learns from a pair until its margin is 1 / gamma; then the pair has no gradient.

    Args:
        gamma: 1 / (margin at which the loss is zero), > 0. It has the place of DPO's beta.

    Raises:
        ConfigError: gamma is not positive.
    """

    needs = ("ref_logp",)

    def __init__(self, gamma: float = 0.05) -> None:
        require(gamma > 0, "algorithm.gamma", gamma, "must be > 0")
        self.gamma = gamma

    def loss(self, outputs: Outputs, batch: Batch) -> tuple[Tensor, Metrics]:
        log_ratio_N = batch.sum(outputs.logp_T - batch["ref_logp_T"])
        margin_P = batch.pairs.difference(log_ratio_N)
        loss_P = hinge_loss(margin_P, self.gamma, batch.pairs.probability_P)
        return loss_P, pair_metrics(self.gamma * log_ratio_N, batch.pairs) | {"active": (loss_P > 0).float()}
