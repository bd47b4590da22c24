"""An algorithm that uses every hook there is, for the tests of what calls them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from alignlab.core import Algorithm, Batch, Group, Metrics, Outputs, segment_sum


class Probe(Algorithm):
    """Likelihood, and values that approach 1. Each group is read with its neighbour's first response beside its own.

    Args:
        limit: steps of an iteration after which it has had enough.
        critic: as in `Algorithm`.
    """

    unit = "token"
    reads = frozenset({"logp", "value"})
    needs = ("ref_logp", "old_logp", "old_value")

    def __init__(self, limit: int | None = None, critic: str = "shared") -> None:
        self.limit, self.critic = limit, critic  # type: ignore[assignment]
        self.steps = 0
        self.state = {"iterations": 0.0}

    def setup(self, tokenizer: Any) -> None:
        self.end = int(tokenizer.eos_token_id)

    def arrange(self, groups: Sequence[Group]) -> list[Group]:
        found = []
        for i, group in enumerate(groups):
            other = groups[(i + 1) % len(groups)].responses[0]
            extra = replace(other, columns={"extra": 1.0}, source="neighbour")
            found.append(group.with_responses([*group.responses, extra]))
        return found

    def prepare(self, groups: Sequence[Group]) -> list[Group]:
        extra = [r for g in groups for r in g.responses if r.source == "neighbour"]
        shift = [sum(r.columns["old_logp"]) - sum(r.columns["ref_logp"]) for r in extra]  # type: ignore[arg-type]
        self.report = {"neighbours": float(len(extra)), "shift": sum(shift) / len(shift)}
        self.state = {"iterations": self.state["iterations"] + 1}
        self.steps = 0
        kept = [g.with_responses([r for r in g.responses if r.source != "neighbour"]) for g in groups]
        batch = Batch(kept)
        batch.fill("weight_G", torch.full((batch.G,), self.report["shift"]))
        return kept

    def loss(self, outputs: Outputs, batch: Batch) -> tuple[Tensor, Metrics]:
        ratio_T = (outputs.logp_T - batch["old_logp_T"]).exp()
        return -outputs.logp_T + 0.1 * (outputs.value_T - 1) ** 2, {
            "ratio": ratio_T.detach(),
            "value_change": (outputs.value_T - batch["old_value_T"]).abs(),
            "margin": segment_sum(outputs.logp_T - batch["ref_logp_T"], batch.response_T, batch.N),
            "_length": batch.length_N.float(),
            "_square": batch.length_N.float() ** 2,
            "end": (batch.token_T == self.end).float(),
        }

    def derive(self, means: Mapping[str, float]) -> dict[str, float]:
        return {"variance": means["_square"] - means["_length"] ** 2}

    def enough(self, metrics: Mapping[str, float]) -> bool:
        self.steps += 1
        return self.steps == self.limit
