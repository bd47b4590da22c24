"""Rank Responses to align with Human Feedback (Yuan et al. 2023, arXiv:2304.05302).

This follows the paper. The authors' code (github.com/GanjinZero/RRHF, train.py) differs from it in four ways:

* it overwrites the mask of ignored labels before counting, so that |y| is the padded length of prompt and response;
* its SFT term is a mean over that length, zeros included; equation 4 is a sum;
* with more than one prompt in a batch it takes the SFT term from the first prompt's responses alone;
* it gives the ranking term a weight, 100 unless set (the published command sets 1); equation 5 has none, and the paper
  found 10 and 100 to be worse.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import relu

from alignlab.algorithms.preferences import pair_metrics, soft_label_loss
from alignlab.core import Algorithm, Batch, Metrics, Outputs, require, segment_sum


def rrhf_loss(
    margin_P: Tensor, group_P: Tensor, best_G: Tensor, sft_weight: float = 1.0, probability_P: Tensor | float = 1.0
) -> Tensor:
    """Equations 2, 4 and 5, per group, shape (G,): pairs that the model ranks wrongly, and −log P of the best response.

    Args:
        margin_P: p of the better response minus p of the worse, for all pairs of unequal reward, shape (P,).
        group_P: the group of each pair, int64, shape (P,).
        best_G: log-prob of the best response, summed over tokens, in nats, shape (G,).
        sft_weight: weight of the likelihood, >= 0.
        probability_P: probability that the better one is better indeed, in [0.5, 1].
    """
    rank_P = soft_label_loss(lambda margin: relu(-margin), margin_P, probability_P)
    return segment_sum(rank_P, group_P, len(best_G)) - sft_weight * best_G


class RRHF(Algorithm):
    """Learns to give better responses a higher log-prob per token, and to imitate the best one.

    Responses may come from anywhere: the policy, other models, people. They need a `score`, `reward`, `preference` or
    a place in a tournament. Ties are not ranked. If several are best, the first one is imitated.

    Args:
        length_penalty: power of the length that divides log-probs (equation 1), >= 0; 1 in the paper.
        sft_weight: weight of the best response's likelihood, >= 0; 1 in the paper.

    Raises:
        ConfigError: a value is negative.
    """

    unit = "group"
    min_responses = 2

    def __init__(self, length_penalty: float = 1.0, sft_weight: float = 1.0) -> None:
        require(length_penalty >= 0, "algorithm.length_penalty", length_penalty, "must be >= 0")
        require(sft_weight >= 0, "algorithm.sft_weight", sft_weight, "must be >= 0")
        self.length_penalty, self.sft_weight = length_penalty, sft_weight

    def loss(self, outputs: Outputs, batch: Batch) -> tuple[Tensor, Metrics]:
        pairs = batch.pairs
        logp_N = batch.sum(outputs.logp_T)
        p_N = logp_N / batch.length_N.clamp(min=1) ** self.length_penalty
        best_G = logp_N[batch.best_G]
        loss_G = rrhf_loss(pairs.difference(p_N), pairs.group_P, best_G, self.sft_weight, pairs.probability_P)
        return loss_G, pair_metrics(p_N, pairs) | {"rank": loss_G + self.sft_weight * best_G, "nll": -best_G}
