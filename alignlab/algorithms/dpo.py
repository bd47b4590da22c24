"""Direct Preference Optimization (Rafailov et al. 2023, arXiv:2305.18290), and what its relatives share with it."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor
from torch.nn.functional import logsigmoid

from alignlab.core import Algorithm, Batch, Group, Metrics, Outputs, Pairs, require, segment_sum


def dpo_loss(
    margin_P: Tensor, beta: float, probability_P: Tensor | float = 1.0, label_smoothing: float = 0.0
) -> Tensor:
    """Equation 7, per pair, in nats; with the chance that a label is wrong of Mitchell (2023, "cDPO", equation 3).

    Args:
        margin_P: (log π/π_ref)(winner) − (log π/π_ref)(loser), summed over tokens, shape (P,).
        beta: strength of the KL constraint, > 0. Large keeps the policy near the reference.
        probability_P: probability that the winner is preferred, as labelled, in [0.5, 1].
        label_smoothing: probability that a label is flipped, whatever it says, in [0, 0.5).
    """
    sure_P = (1 - label_smoothing) * probability_P + label_smoothing * (1 - probability_P)
    return either_way(lambda margin: -logsigmoid(beta * margin), margin_P, sure_P)


def either_way(loss: Callable[[Tensor], Tensor], margin_P: Tensor, probability_P: Tensor | float = 1.0) -> Tensor:
    """The loss of a pair that is expected when its label is right with a probability: a mean over both orders.

    Args:
        loss: of a margin, for a label that is certain.
        margin_P: by how much the policy likes the winner better, shape (P,).
        probability_P: probability that the winner is preferred indeed, in [0.5, 1].
    """
    return probability_P * loss(margin_P) + (1 - probability_P) * loss(-margin_P)


def pair_metrics(reward_N: Tensor, pairs: Pairs) -> Metrics:
    """What the policy itself thinks of the pairs, by the reward (N,) that an algorithm takes it to give."""
    winner_P, loser_P = reward_N[pairs.winner_P], reward_N[pairs.loser_P]
    return {
        "accuracy": (winner_P > loser_P).float(),
        "margin": winner_P - loser_P,
        "reward_winner": winner_P,
        "reward_loser": loser_P,
    }


class PairAlgorithm(Algorithm):
    """Learns from preference pairs: those of the data, or all that the scores of a group's responses make."""

    unit = "pair"

    def check(self, group: Group) -> str | None:
        if len(group.responses) >= 2:
            return None
        return f"{type(self).__name__} needs at least two responses to compare"


class DPO(PairAlgorithm):
    """Learns from preference pairs without a reward model.

    Args:
        beta: strength of the KL constraint, > 0. With Bradley-Terry labels of temperature τ the optimum is
            π_ref·exp(r / (τ·beta)).
        label_smoothing: probability that a label is flipped, in [0, 0.5).
    """

    needs = ("ref_logp",)

    def __init__(self, beta: float = 0.1, label_smoothing: float = 0.0) -> None:
        require(beta > 0, "algorithm.beta", beta, "must be > 0")
        require(0 <= label_smoothing < 0.5, "algorithm.label_smoothing", label_smoothing, "must be in [0, 0.5)")
        self.beta = beta
        self.label_smoothing = label_smoothing

    def loss(self, outputs: Outputs, batch: Batch) -> tuple[Tensor, Metrics]:
        pairs = batch.pairs
        ratio_N = segment_sum(outputs.logp_T - batch["ref_logp_T"], batch.response_T, batch.N)
        margin_P = ratio_N[pairs.winner_P] - ratio_N[pairs.loser_P]
        loss_P = dpo_loss(margin_P, self.beta, pairs.probability_P, self.label_smoothing)
        return loss_P, pair_metrics(self.beta * ratio_N, pairs)
