"""Direct Preference Optimization (Rafailov et al. 2023, arXiv:2305.18290)."""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import logsigmoid

from alignlab.core import Algorithm, Batch, Group, Metrics, Outputs, require, segment_sum


def dpo_loss(margin_P: Tensor, beta: float, probability_P: Tensor | float = 1.0) -> Tensor:
    """Equation 7, per pair, in nats; with the chance that a label is wrong of Mitchell (2023, "cDPO", equation 3).

    Args:
        margin_P: (log π/π_ref)(winner) − (log π/π_ref)(loser), summed over tokens, shape (P,).
        beta: strength of the KL constraint, > 0. Large keeps the policy near the reference.
        probability_P: probability that the winner is preferred indeed, in [0.5, 1].
    """
    logit_P = beta * margin_P
    return -probability_P * logsigmoid(logit_P) - (1 - probability_P) * logsigmoid(-logit_P)


class DPO(Algorithm):
    """Learns from preference pairs without a reward model.

    Args:
        beta: strength of the KL constraint, > 0. With Bradley-Terry labels of temperature τ the optimum is
            π_ref·exp(r / (τ·beta)).
        label_smoothing: probability that a label is flipped, in [0, 0.5).
    """

    unit = "pair"
    needs = ("ref_logp",)

    def __init__(self, beta: float = 0.1, label_smoothing: float = 0.0) -> None:
        require(beta > 0, "algorithm.beta", beta, "must be > 0")
        require(0 <= label_smoothing < 0.5, "algorithm.label_smoothing", label_smoothing, "must be in [0, 0.5)")
        self.beta = beta
        self.label_smoothing = label_smoothing

    def check(self, group: Group) -> str | None:
        return None if len(group.responses) >= 2 else "DPO needs at least two responses to compare"

    def loss(self, outputs: Outputs, batch: Batch) -> tuple[Tensor, Metrics]:
        pairs = batch.pairs
        ratio_N = segment_sum(outputs.logp_T - batch["ref_logp_T"], batch.response_T, batch.N)
        margin_P = ratio_N[pairs.winner_P] - ratio_N[pairs.loser_P]
        sure_P = (1 - self.label_smoothing) * pairs.probability_P + self.label_smoothing * (1 - pairs.probability_P)
        return dpo_loss(margin_P, self.beta, sure_P), {
            "accuracy": (margin_P > 0).float(),
            "margin": self.beta * margin_P,
            "reward_winner": self.beta * ratio_N[pairs.winner_P],
            "reward_loser": self.beta * ratio_N[pairs.loser_P],
        }
