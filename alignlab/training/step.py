"""One optimiser step over a global batch of groups, however it is split over processes and micro-batches."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field

import torch
from torch import Tensor

from alignlab.core import Algorithm, Batch, Group, Metrics, NonFiniteError, Outputs, StartAgain, aggregate
from alignlab.core.memory import is_memory_error, release_memory
from alignlab.core.parts import calling, loss_of, numbers_of
from alignlab.training.distributed.engine import Engine
from alignlab.training.distributed.processes import Processes
from alignlab.training.micro_batch_budget import OutOfMemory, Shortage, TokenBudget, random_state, set_random_state
from alignlab.training.order import shares


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
    means, tokens, bad, short = Means(), 0, [], None
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
        means.add("loss", loss)
        for name, values in measured.items():
            means.add(name, values)
        if not bool(torch.isfinite(loss).all()):
            bad.extend(_culprits(loss, batch, algorithm))
    if short is not None and engine.together:  # the others wait in the middle of a pass
        raise OutOfMemory([short])
    means.add("response_length", torch.cat([b.length_N for b in batches]) if batches else torch.zeros(0))
    went = processes.gather((bad, short))
    if shortages := [s for _, s in went if s is not None]:
        raise OutOfMemory(shortages)
    bad = [b for some, _ in went for b in some]
    if bad:
        raise NonFiniteError(
            f"the loss is not finite for {len(bad)} record(s): {', '.join(bad[:5])}{' …' if len(bad) > 5 else ''}. "
            "Look at them, lower the learning rate, or use a wider precision"
        )
    if train and units:
        engine.exchange()
    totals = processes.gather((tokens, sum(b.T for b in batches)))
    metrics = means.means(processes)
    if metrics:
        with calling(algorithm, "derive"):
            derived = algorithm.derive(metrics)
        metrics |= numbers_of(algorithm, "derive", derived)
    shown = {name: value for name, value in metrics.items() if not name.startswith("_")}
    return Pass(shown, sum(t for t, _ in totals), sum(t for _, t in totals), units)


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
