"""Supervised fine-tuning; on raw text, continued pre-training: the same thing with another prompt."""

from __future__ import annotations

from torch import Tensor

from alignlab.core import Algorithm, Batch, Group, Metrics, Outputs


class SFT(Algorithm):
    """Maximum likelihood of the responses, a mean over all loss-bearing tokens of the global batch, in nats."""

    unit = "token"

    def check(self, group: Group) -> str | None:
        return None if group.responses else "there is no response to learn from"

    def loss(self, outputs: Outputs, batch: Batch) -> tuple[Tensor, Metrics]:
        return -outputs.logp_T, {"nll": -outputs.logp_T}
