"""Supervised fine-tuning. On raw text it is continued pre-training: the same loss with another prompt."""

from __future__ import annotations

from torch import Tensor

from alignlab.core import Algorithm, Batch, Metrics, Outputs


class SFT(Algorithm):
    """Maximum likelihood of the responses: −log P, in nats, a mean over all loss-bearing tokens of the global batch."""

    unit = "token"
    min_responses = 1

    def loss(self, outputs: Outputs, batch: Batch) -> tuple[Tensor, Metrics]:
        return -outputs.logp_T, {"nll": -outputs.logp_T}
