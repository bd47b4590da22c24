"""What algorithms that learn from preference pairs share."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from alignlab.core import Algorithm, Metrics, Pairs


def soft_label_loss(loss: Callable[[Tensor], Tensor], margin_P: Tensor, probability_P: Tensor | float = 1.0) -> Tensor:
    """Expected loss of a pair whose label is right with a probability: p·loss(m) + (1 − p)·loss(−m), shape (P,).

    Args:
        loss: of a margin, for a label that is certain.
        margin_P: winner minus loser, of whatever the algorithm compares, shape (P,).
        probability_P: probability that the winner is preferred, in [0.5, 1]; 1 for a certain label.
    """
    return probability_P * loss(margin_P) + (1 - probability_P) * loss(-margin_P)


def pair_metrics(reward_N: Tensor, pairs: Pairs) -> Metrics:
    """How the policy ranks the pairs, by the implicit reward (N,) that the algorithm gives each response."""
    winner_P, loser_P = reward_N[pairs.winner_P], reward_N[pairs.loser_P]
    return {
        "accuracy": (winner_P > loser_P).float(),
        "margin": winner_P - loser_P,
        "reward_winner": winner_P,
        "reward_loser": loser_P,
    }


class PairAlgorithm(Algorithm):
    """Learns from preference pairs: those in the data, or all pairs that the scores of a group's responses make."""

    unit = "pair"
    min_responses = 2
