"""The hinge on the DPO margin of RSO (Liu et al. 2023, arXiv:2309.06657): SLiC's loss, normalised by a reference."""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import relu

from alignlab.algorithms.dpo import PairAlgorithm, either_way, pair_metrics
from alignlab.core import Batch, Metrics, Outputs, require, segment_sum


def hinge_loss(margin_P: Tensor, gamma: float, probability_P: Tensor | float = 1.0) -> Tensor:
    """Equation 10 ("hinge-norm"), per pair: a support vector machine where DPO is a logistic regression.

    Args:
        margin_P: (log π/π_ref)(winner) − (log π/π_ref)(loser), summed over tokens, shape (P,).
        gamma: one over the margin that is enough, > 0.
        probability_P: probability that the winner is preferred, in [0.5, 1].
    """
    return either_way(lambda margin: relu(1 - gamma * margin), margin_P, probability_P)


class Hinge(PairAlgorithm):
    """Learns from pairs until their margin is 1 / gamma, then leaves them alone.

    Args:
        gamma: one over the margin that is enough, > 0; it stands where DPO has beta.
    """

    needs = ("ref_logp",)

    def __init__(self, gamma: float = 0.05) -> None:
        require(gamma > 0, "algorithm.gamma", gamma, "must be > 0")
        self.gamma = gamma

    def loss(self, outputs: Outputs, batch: Batch) -> tuple[Tensor, Metrics]:
        pairs = batch.pairs
        ratio_N = segment_sum(outputs.logp_T - batch["ref_logp_T"], batch.response_T, batch.N)
        margin_P = ratio_N[pairs.winner_P] - ratio_N[pairs.loser_P]
        loss_P = hinge_loss(margin_P, self.gamma, pairs.probability_P)
        return loss_P, pair_metrics(self.gamma * ratio_N, pairs) | {"active": (loss_P > 0).float()}
