"""Sequence Likelihood Calibration with Human Feedback (Zhao et al. 2023, arXiv:2305.10425).

*Direct* (section 2.3) takes pairs from data. *Sample-rank* (2.2) samples from the policy and ranks the samples in a
tournament of a pairwise model (`source=rollout`, a scorer that fills `lost_to`). The paper calibrates with margin 1 and
learning rate 1e-5, 100 times less than its SFT, on 8 samples a prompt at temperature 0.7, top-k 40. The default λ is
this project's choice.

y_ref (2.4) is the SFT target or the best-ranked sample. The paper found little difference between the two (rankers
prefer the result to the reference in 86.2 % and 85.5 %). *Direct* has no samples; there it used the SFT target.
"""

from __future__ import annotations

from typing import Literal

from torch import Tensor
from torch.nn.functional import relu

from alignlab.algorithms.preferences import PairAlgorithm, pair_metrics, soft_label_loss
from alignlab.core import AlignlabError, Batch, Group, Metrics, Outputs, require, require_choice
from alignlab.core.order import best_response, ranked


def slic_loss(
    margin_P: Tensor, target_P: Tensor, delta: float, sft_weight: float, probability_P: Tensor | float = 1.0
) -> Tensor:
    """Equation 4, per pair, in nats, shape (P,).

    Args:
        margin_P: log P(y⁺|x) − log P(y⁻|x), each summed over tokens, not divided by the length, in nats, shape (P,).
        target_P: log P(y_ref|x) for each pair's prompt, summed over tokens, in nats, shape (P,).
        delta: margin at which the calibration loss is zero, in nats, >= 0.
        sft_weight: the paper's λ, >= 0.
        probability_P: probability that y⁺ is preferred, in [0.5, 1].
    """
    return soft_label_loss(lambda margin: relu(delta - margin), margin_P, probability_P) - sft_weight * target_P


class SLiC(PairAlgorithm):
    """Learns to prefer winners by a margin. The likelihood of y_ref is the regulariser, in place of a reference model.

    Each pair has the y_ref of its prompt. A prompt without pairs has no loss.

    Args:
        delta: margin at which the calibration loss is zero, in nats, >= 0; 1 in the paper.
        sft_weight: the paper's λ, weight of the likelihood of y_ref, >= 0.
        target: which response is y_ref. "best": the best-ranked response. "data": the record's own response (the SFT
            target), which `source.keep=true` keeps beside the sampled ones. If a record has several, those that were
            not compared come first, then the best.

    Raises:
        ConfigError: a value is out of its range.
    """

    def __init__(self, delta: float = 1.0, sft_weight: float = 0.1, target: Literal["best", "data"] = "best") -> None:
        require(delta >= 0, "algorithm.delta", delta, "must be >= 0")
        require(sft_weight >= 0, "algorithm.sft_weight", sft_weight, "must be >= 0")
        require_choice("algorithm.target", target, ("best", "data"))
        self.delta, self.sft_weight, self.target = delta, sft_weight, target

    def loss(self, outputs: Outputs, batch: Batch) -> tuple[Tensor, Metrics]:
        pairs = batch.pairs
        logp_N = batch.sum(outputs.logp_T)
        target_G = batch.best_G if self.target == "best" else batch.one_each(own_response)
        target_P = logp_N[target_G[pairs.group_P]]
        loss_P = slic_loss(pairs.difference(logp_N), target_P, self.delta, self.sft_weight, pairs.probability_P)
        return loss_P, pair_metrics(logp_N, pairs) | {
            "calibration": loss_P + self.sft_weight * target_P,
            "nll": -target_P,
        }


def own_response(group: Group) -> int:
    """Index within the group of the response that came with its record.

    Raises:
        AlignlabError: there is none.
    """
    own = [i for i, r in enumerate(group.responses) if r.source == "data"]
    if not own:
        raise AlignlabError(
            f"{group.place}: algorithm.target=data needs the record's own response and there is none: "
            "set source.keep=true, with data that has responses"
        )
    compared = set(ranked(group)[1]) if len(group.responses) > 1 else set()
    own = [i for i in own if i not in compared] or own
    return own[best_response(group.with_responses([group.responses[i] for i in own]))]
