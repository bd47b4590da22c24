"""Direct Preference Optimization (Rafailov et al. 2023, arXiv:2305.18290)."""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import logsigmoid

from alignlab.algorithms.preferences import PairAlgorithm, pair_metrics, soft_label_loss
from alignlab.core import Batch, Metrics, Outputs, require


def dpo_loss(
    margin_P: Tensor, beta: float, probability_P: Tensor | float = 1.0, label_smoothing: float = 0.0
) -> Tensor:
    """Equation 7, per pair, in nats, shape (P,); with the label smoothing of Mitchell (2023, "cDPO", equation 3).

    Args:
        margin_P: (log π/π_ref)(winner) − (log π/π_ref)(loser), each summed over tokens, in nats, shape (P,).
        beta: strength of the KL constraint, > 0. Large keeps the policy near the reference.
        probability_P: probability that the winner is preferred, according to the label, in [0.5, 1].
        label_smoothing: probability that a label is flipped, in [0, 0.5).
    """
    smoothed_P = (1 - label_smoothing) * probability_P + label_smoothing * (1 - probability_P)
    return soft_label_loss(lambda margin: -logsigmoid(beta * margin), margin_P, smoothed_P)


class DPO(PairAlgorithm):
    """Learns from preference pairs without a reward model.

    If labels follow Bradley-Terry with temperature τ, the optimum is π_ref·exp(r / (τ·beta)), normalised.

    Args:
        beta: strength of the KL constraint, > 0. Large keeps the policy near the reference.
        label_smoothing: probability that a label is flipped, in [0, 0.5).

    Raises:
        ConfigError: a value is out of its range.
    """

    needs = ("ref_logp",)

    def __init__(self, beta: float = 0.1, label_smoothing: float = 0.0) -> None:
        require(beta > 0, "algorithm.beta", beta, "must be > 0")
        require(0 <= label_smoothing < 0.5, "algorithm.label_smoothing", label_smoothing, "must be in [0, 0.5)")
        self.beta = beta
        self.label_smoothing = label_smoothing

    def loss(self, outputs: Outputs, batch: Batch) -> tuple[Tensor, Metrics]:
        log_ratio_N = batch.sum(outputs.logp_T - batch["ref_logp_T"])
        margin_P = batch.pairs.difference(log_ratio_N)
        loss_P = dpo_loss(margin_P, self.beta, batch.pairs.probability_P, self.label_smoothing)
        return loss_P, pair_metrics(self.beta * log_ratio_N, batch.pairs)
