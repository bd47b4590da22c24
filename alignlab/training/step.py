"""One optimiser step over a global batch of groups, however it is split over processes and micro-batches."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from alignlab.core import Algorithm, Batch, Group, NonFiniteError, Outputs, aggregate
from alignlab.models import PackedModel
from alignlab.training.processes import Processes
from alignlab.training.sources import shares


@dataclass
class Means:
    """Running sums from which exact global means are made."""

    sums: dict[str, float] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)

    def add(self, name: str, values: Tensor) -> None:
        self.sums[name] = self.sums.get(name, 0.0) + float(values.detach().double().sum())
        self.counts[name] = self.counts.get(name, 0) + values.numel()

    def means(self, processes: Processes) -> dict[str, float]:
        """Means over all processes; a name that no process has a value for is left out."""
        everyone = processes.gather((self.sums, self.counts))
        names = dict.fromkeys(name for sums, _ in everyone for name in sums)
        total = {n: sum(sums.get(n, 0.0) for sums, _ in everyone) for n in names}
        count = {n: sum(counts.get(n, 0) for _, counts in everyone) for n in names}
        return {n: total[n] / count[n] for n in names if count[n]}


@dataclass
class Pass:
    """What a forward pass over a global batch came to."""

    metrics: dict[str, float]
    tokens: int
    """Tokens read by the model, over all processes."""
    trained_tokens: int
    """Loss-bearing tokens, over all processes."""
    units: int
    """What the loss is a mean over: tokens, responses, pairs or groups; 0 means that there was nothing to learn."""


def run_batch(
    groups: Sequence[Group],
    *,
    algorithm: Algorithm,
    model: PackedModel,
    engine: Any,
    processes: Processes,
    token_budget: int,
    temperature: float = 1.0,
    train: bool = True,
) -> Pass:
    """Forward, and backward where training, over a global batch that every process holds; each computes its share.

    The gradient left behind is that of the mean loss over the global batch.

    Raises:
        NonFiniteError: where a loss is NaN or infinite, with the origins of the records; on every process alike.
    """
    mine = [groups[i] for i in shares(groups, processes.world)[processes.rank]]
    plan = [[mine[i] for i in batch] for batch in model.micro_batches(mine, token_budget)]
    batches = [Batch(chosen, processes.device) for chosen in plan]
    everyone = processes.gather((sum(b.count(algorithm.unit) for b in batches), len(batches)))
    units, rounds = sum(u for u, _ in everyone), max(r for _, r in everyone)
    means, tokens, bad = Means(), 0, []
    if units == 0:
        rounds = 0
    for i in range(rounds):
        # A process that has run out still takes part in what the engines do in common, with a loss of weight zero.
        spare = i >= len(batches)
        batch = Batch([min(groups, key=lambda g: g.packed_length)], processes.device) if spare else batches[i]
        rows = model.lay_out(batch.groups)
        last = i == rounds - 1
        hold = nullcontext() if last or not train else processes.accelerator.no_sync(engine)
        with hold, torch.set_grad_enabled(train):
            outputs = Outputs(**engine(rows, algorithm.reads, temperature))
            loss, measured = algorithm.loss(outputs, batch)
            if train:
                value = aggregate(loss, units, processes.world)
                if not value.requires_grad:  # every item was dropped by the loss
                    value = value + 0.0 * sum(v.sum() for v in outputs.values.values())
                processes.accelerator.backward(value * 0.0 if spare else value)
        if spare:
            continue
        tokens += rows.tokens
        means.add("loss", loss)
        for name, values in measured.items():
            means.add(name, values)
        if not bool(torch.isfinite(loss.detach()).all()):
            bad.extend(_culprits(outputs, loss, batch, algorithm))
    means.add("response_length", torch.cat([b.length_N for b in batches]) if batches else torch.zeros(0))
    bad = [b for some in processes.gather(bad) for b in some]
    if bad:
        raise NonFiniteError(
            f"the loss is not finite for {len(bad)} record(s): {', '.join(bad[:5])}{' …' if len(bad) > 5 else ''}. "
            "Look at them, lower the learning rate, or use a wider precision"
        )
    totals = processes.gather((tokens, sum(b.T for b in batches)))
    metrics = means.means(processes)
    metrics |= algorithm.derive(metrics) if metrics else {}
    shown = {name: value for name, value in metrics.items() if not name.startswith("_")}
    return Pass(shown, sum(t for t, _ in totals), sum(t for _, t in totals), units)


def _culprits(outputs: Outputs, loss: Tensor, batch: Batch, algorithm: Algorithm) -> list[str]:
    """Origins of the records whose loss is not finite, as closely as the loss's unit tells."""
    wrong = ~torch.isfinite(loss.detach().flatten())
    if len(wrong) == batch.T and algorithm.unit == "token":
        index = batch.group_N[batch.response_T[wrong]]
    elif len(wrong) == batch.N and algorithm.unit == "response":
        index = batch.group_N[wrong]
    elif len(wrong) == len(batch.pairs.winner_P) and algorithm.unit == "pair":
        index = batch.group_N[batch.pairs.winner_P[wrong]]
    elif len(wrong) == batch.G and algorithm.unit == "group":
        index = wrong.nonzero().flatten()
    else:
        index = torch.arange(batch.G)
    return [batch.groups[i].origin or f"group {i}" for i in dict.fromkeys(index.tolist())]
