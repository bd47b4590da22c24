"""One optimiser step over a global batch of groups, however it is split over processes and micro-batches."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from itertools import chain

import torch
from torch import Tensor

from alignlab.core import Algorithm, Batch, Group, Metrics, NonFiniteError, Outputs, StartAgain, aggregate
from alignlab.core.memory import is_memory_error, release_memory
from alignlab.core.parts import calling, loss_of, numbers_of
from alignlab.training.distributed.engine import Engine
from alignlab.training.micro_batch_budget import OutOfMemory, Shortage, TokenBudget, random_state, set_random_state
from alignlab.training.order import shares

Sums = dict[str, tuple[float, int]]
"""By the name of a metric, its sum over what one process has read, and of how many values."""


@dataclass
class Means:
    """Running sums from which exact global means are made."""

    sums: dict[str, Tensor] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)

    def add(self, name: str, values: Tensor) -> None:
        total = values.detach().double().sum()  # stays on its device: a step waits for it once, not at each metric
        self.sums[name] = self.sums[name] + total if name in self.sums else total
        self.counts[name] = self.counts.get(name, 0) + values.numel()

    def of(self) -> Sums:
        """Sum and count of each name."""
        held = [*self.sums.values()]
        sums = torch.stack([s.to(held[0].device) for s in held]).tolist() if held else []
        return dict(zip(self.sums, zip(sums, self.counts.values(), strict=True), strict=True))


def means(everyone: Sequence[Sums]) -> dict[str, float]:
    """Means over all processes; a name that no process has a value for is left out."""
    names = dict.fromkeys(name for sums in everyone for name in sums)
    found = {n: [sums.get(n, (0.0, 0)) for sums in everyone] for n in names}
    total = {n: (sum(s for s, _ in each), sum(c for _, c in each)) for n, each in found.items()}
    return {n: s / c for n, (s, c) in total.items() if c}


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


def run_with_memory(
    groups: Sequence[Group],
    *,
    algorithm: Algorithm,
    engine: Engine,
    budget: TokenBudget,
    temperature: float = 1.0,
    train: bool = True,
    resumes: bool = True,
) -> Pass:
    """`run_batch`, as often as memory runs out, with a smaller budget each time; nothing else is other than the first
    time.

    Args:
        budget: tokens per micro-batch; smaller afterwards where memory ran out.
        resumes: whether the same command goes on from the last checkpoint, for the message.

    Raises:
        StartAgain: memory ran out, and the engine cannot repeat a step.
    """
    processes = engine.processes
    while True:
        random = random_state(processes.device)
        try:
            return run_batch(
                groups,
                algorithm=algorithm,
                engine=engine,
                max_tokens_per_microbatch=budget.tokens,
                temperature=temperature,
                train=train,
            )
        except OutOfMemory as error:
            shortages = error.shortages
        budget.halve(shortages, write=processes.is_main or engine.together)
        if engine.together:
            again = "" if resumes else " (with training.resume=auto)"
            raise StartAgain(
                f"out of memory, after which {engine.name} cannot go on in these processes: the same command{again} "
                f"goes on from the last checkpoint, with training.max_tokens_per_microbatch={budget.tokens}"
            )
        engine.discard()
        release_memory()
        set_random_state(random, processes.device)


def run_batch(
    groups: Sequence[Group],
    *,
    algorithm: Algorithm,
    engine: Engine,
    max_tokens_per_microbatch: int,
    temperature: float = 1.0,
    train: bool = True,
) -> Pass:
    """Forward, and backward where training, over a global batch that every process holds; each computes its share.

    The gradient left behind is that of the mean loss over the global batch.

    Raises:
        NonFiniteError: where a loss is NaN or infinite, with the origins of the records; on every process alike.
        OutOfMemory: there is no memory for a micro-batch; on every process alike, unless they communicate in it.
    """
    model, processes = engine.model, engine.processes
    mine = [groups[i] for i in shares(groups, processes.world)[processes.rank]]
    plan = [[mine[i] for i in batch] for batch in model.micro_batches(mine, max_tokens_per_microbatch)]
    batches = [Batch(chosen, processes.device) for chosen in plan]
    everyone = processes.gather((sum(b.count(algorithm.unit) for b in batches), len(batches)))
    units, rounds = sum(u for u, _ in everyone), len(batches)
    if engine.together:
        rounds = max(r for _, r in everyone)
    running, tokens, short = Means(), 0, None
    losses: list[Tensor] = []
    for i in range(rounds if units else 0):
        # A process that has run out still takes part in what the engines do in common, with a loss of weight zero.
        spare = i >= len(batches)
        batch = Batch([min(groups, key=lambda g: g.packed_length)], processes.device) if spare else batches[i]
        hold = engine.hold(last=i == rounds - 1) if train else nullcontext()
        try:
            with hold, torch.set_grad_enabled(train):
                loss, measured, read = _micro_batch(batch, algorithm, engine, temperature, units, train, spare)
        except Exception as error:
            if not is_memory_error(error):
                raise
            short = Shortage.of(batch, processes.rank, error)
        if short is not None:
            break
        if spare:
            continue
        tokens += read
        losses.append(loss)
        running.add("loss", loss)
        for name, values in measured.items():
            running.add(name, values)
    if short is not None and engine.together:  # the others wait in the middle of a pass
        raise OutOfMemory([short])
    running.add("response_length", torch.cat([b.length_N for b in batches]) if batches else torch.zeros(0))
    finite = torch.stack([torch.isfinite(loss).all() for loss in losses]).tolist() if losses else []
    wrong = [_culprits(losses[i], batches[i], algorithm) for i, well in enumerate(finite) if not well]
    trained = sum(b.T for b in batches)
    went = processes.gather((short, [*chain.from_iterable(wrong)], tokens, trained, running.of()))
    if shortages := [short for short, *_ in went if short is not None]:
        raise OutOfMemory(shortages)
    bad = [origin for _, some, *_ in went for origin in some]
    if bad:
        raise NonFiniteError(
            f"the loss is not finite for {len(bad)} record(s): {', '.join(bad[:5])}{' …' if len(bad) > 5 else ''}. "
            "Look at them, lower the learning rate, or use a wider precision"
        )
    if train and units:
        engine.exchange()
    metrics = means([sums for *_, sums in went])
    if metrics:
        with calling(algorithm, "derive"):
            derived = algorithm.derive(metrics)
        metrics |= numbers_of(algorithm, "derive", derived)
    shown = {name: value for name, value in metrics.items() if not name.startswith("_")}
    return Pass(shown, sum(each[2] for each in went), sum(each[3] for each in went), units)


def _micro_batch(
    batch: Batch, algorithm: Algorithm, engine: Engine, temperature: float, units: int, train: bool, spare: bool
) -> tuple[Tensor, Metrics, int]:
    """Forward, and backward where training; the loss of each unit, what was measured, tokens read."""
    rows = engine.model.lay_out(batch.groups)
    outputs = Outputs(**engine(rows, algorithm.reads, temperature))
    loss, measured = loss_of(algorithm, outputs, batch)
    if train:
        value = aggregate(loss, units, engine.processes.world)
        if not value.requires_grad:  # there is no item in this micro-batch
            value = value + 0.0 * sum(v.sum() for v in outputs.values.values())
        engine.backward(value * 0.0 if spare else value)
    return loss.detach(), measured, rows.tokens


def _culprits(loss: Tensor, batch: Batch, algorithm: Algorithm) -> list[str]:
    """Origins of the records whose loss is not finite, as closely as the loss's unit tells."""
    wrong = ~torch.isfinite(loss.flatten())
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
