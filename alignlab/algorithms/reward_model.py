"""Reward model from preferences: Bradley and Terry (1952), as in Ouyang et al. (2022, arXiv:2203.02155)."""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import logsigmoid

from alignlab.core import Algorithm, Batch, Group, Metrics, Outputs


def bradley_terry_loss(margin_P: Tensor, probability_P: Tensor | float = 1.0) -> Tensor:
    """Negative log-likelihood of the labels under P(w ≻ l) = σ(r_w − r_l) (Ouyang et al., equation 1), in nats.

    Args:
        margin_P: reward of the winner minus reward of the loser, shape (P,).
        probability_P: probability that the winner is preferred, in [0.5, 1]; 1 for a certain label.
    """
    return -probability_P * logsigmoid(margin_P) - (1 - probability_P) * logsigmoid(-margin_P)


class RewardModel(Algorithm):
    """Learns a score for (prompt, response) whose differences are log-odds of being preferred."""

    unit = "pair"
    model = "score"
    reads = frozenset({"score"})

    def check(self, group: Group) -> str | None:
        return None if len(group.responses) >= 2 else "a reward model needs at least two responses to compare"

    def loss(self, outputs: Outputs, batch: Batch) -> tuple[Tensor, Metrics]:
        pairs = batch.pairs
        margin_P = outputs.score_N[pairs.winner_P] - outputs.score_N[pairs.loser_P]
        return bradley_terry_loss(margin_P, pairs.probability_P), {
            "accuracy": (margin_P > 0).float(),
            "margin": margin_P,
            "score": outputs.score_N,
        }
