"""Responses from a model in this process."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from alignlab.core import NonFiniteError, RolloutContext
from alignlab.core.memory import in_halves
from alignlab.core.progress import progress
from alignlab.models import PackedModel, evaluating
from alignlab.models.adapters import merged
from alignlab.models.quantization import quantization_of
from alignlab.rollout.batching import LOGITS, Queue, Row, batches
from alignlab.rollout.continuous import ContinuousDecoding, takes_plans
from alignlab.rollout.decoding import Decoding, decoding_mode
from alignlab.rollout.quick import quick_products
from alignlab.rollout.sampler import RowSampler
from alignlab.rollout.sampling import sample, uniforms
from alignlab.rollout.settings import RolloutSettings

log = logging.getLogger(__name__)


class LocalRollout(RolloutSettings):
    """The policy in this process draws, token by token.

    Attributes:
        compile: compile the decoding step, whose shapes are then few and fixed; for GPUs.
    """

    compile: bool = False
    _show_progress: bool = True

    def start(self, context: RolloutContext) -> AbstractContextManager[Any]:
        self._show_progress = context.show_progress
        return nullcontext()

    def sampler(self, policy: PackedModel) -> LocalSampler:
        return LocalSampler(policy, self, self._show_progress, self.compile)


class LocalSampler(RowSampler):
    """A `StepSampler` on a `PackedModel`: one prefill per prompt, rows that end leave the batch.

    Number t of a response's uniforms is a hash of its prompt, sample number and t, and a token is the uniform's
    quantile. Batches, their order, the token budget and the number of processes change nothing, up to rounding of the
    logits.

    Args:
        progress: show a bar, on a terminal, for what takes over a second.
        compile: compile the decoding step.
    """

    def __init__(
        self, model: PackedModel, settings: RolloutSettings, progress: bool = True, compile: bool = False
    ) -> None:
        super().__init__(model, settings, progress)
        self._compiled = compile

    @property
    def exact_logp(self) -> bool:
        """See `alignlab.core.ExactSampler`."""
        exact = self.model.dtype in (torch.float32, torch.float64) and quantization_of(self.model.base) is None
        return exact and self.settings.unfiltered

    def draw(self, rows: Sequence[Row], settings: RolloutSettings) -> None:
        self._extend(rows, settings, None)

    def extend(self, rows: Sequence[Row], until: Callable[[Row], bool] | None = None) -> None:
        """See `StepSampler.extend`."""
        self._extend(rows, self.settings, until)

    def _extend(self, rows: Sequence[Row], settings: RolloutSettings, until: Callable[[Row], bool] | None) -> None:
        for row in rows:
            row.begun = len(row.tokens)
        network = self.model.network
        # A compiler knows quick products of its own.
        quick = nullcontext() if self._compiled else quick_products(network)
        with torch.no_grad(), evaluating(self.model), self.model.precision(), merged(network), quick:
            ended = self._draw(rows, settings, until)
            for _ in progress(ended, "generating", len(rows)) if self._progress else ended:
                pass
        self.generated_tokens += sum(len(row.tokens) - row.begun for row in rows)

    def _draw(
        self, rows: Sequence[Row], settings: RolloutSettings, until: Callable[[Row], bool] | None
    ) -> Iterator[Row]:
        """Fill the rows in; yields each when it has ended or pauses. Nothing is lost where memory runs out: rows that
        had ended are left alone, the others go on where they are, fewer at a time."""
        done: set[int] = set()

        def going(some: Sequence[Row]) -> list[Row]:
            return [row for row in some if id(row) not in done]

        def finish(decoding: Decoding | ContinuousDecoding, queue: Queue) -> Iterator[Row]:
            for row in self._decode(decoding, queue, settings, until):
                done.add(id(row))
                yield row

        def in_batch(batch: list[Row]) -> Iterator[Row]:
            if some := going(batch):
                yield from finish(Decoding(self.model, cached=mode.cached), Queue.of_one(some))

        def in_places(places: list[int]) -> Iterator[Row]:
            """As many rows at a time as there are places, with their part of the budget."""
            if some := going(rows):
                fewer = len(places) < most
                budget = settings.max_batch_tokens * len(places) // most
                queue = Queue(some, budget, len(places) if fewer else self._most_rows(), self._compiled)
                yield from finish(ContinuousDecoding(self.model, self._compiled), queue)

        name = type(self.model.base).__name__
        longest = max((row.final_length for row in rows), default=0)
        if rows and takes_plans(self.model, longest):
            most = Queue(rows, settings.max_batch_tokens, self._most_rows(), self._compiled).first
            yield from in_halves([list(range(most))], in_places, "sampling")
        elif rows:
            mode = decoding_mode(self.model)
            if self._compiled:
                log.warning("rollout.compile: %s is not compiled, it goes through transformers' own cache", name)
            yield from in_halves(batches(rows, settings.max_batch_tokens, mode.padded), in_batch, "sampling")

    def _decode(
        self,
        decoding: Decoding | ContinuousDecoding,
        queue: Queue,
        settings: RolloutSettings,
        until: Callable[[Row], bool] | None,
    ) -> Iterator[Row]:
        """Draw what the queue holds, token by token, each row to its end."""
        stopping, device = self._stopping, self.model.device
        rows: list[Row] = []
        streams: dict[int, Any] = {}
        while rows or queue:
            if units := queue.take(decoding.tokens, len(rows)):
                room = max(unit.room for unit in units)
                decoding.admit([unit.context for unit in units], [len(unit.rows) for unit in units], room)
                rows += [row for unit in units for row in unit.rows]
                for row in rows:
                    if id(row) not in streams:
                        streams[id(row)] = uniforms(row.key, row.sample, row.limit).numpy()
            uniform_R = torch.tensor([streams[id(row)][len(row.tokens)] for row in rows], dtype=torch.float64)
            logits_RV = self._ban(decoding.logits_RV, rows)
            token_R, logp_R, finite_R = sample(logits_RV, uniform_R.to(device), settings)
            if not finite_R.all():
                raise _not_finite([row for row, good in zip(rows, finite_R.tolist(), strict=True) if not good])
            tokens = token_R.tolist()
            going = []
            for i, (row, token, logp) in enumerate(zip(rows, tokens, logp_R.tolist(), strict=True)):
                row.tokens.append(token)
                row.logp.append(logp)
                text = stopping.ended(row.tokens)
                row.finished = text is not None
                paused = text is None and until is not None and until(row)
                if text is None and not paused and len(row.tokens) < row.limit:
                    going.append(i)
                else:
                    row.text = stopping.text(row.tokens) if text is None else text
                    del streams[id(row)]
                    yield row
            if len(going) < len(rows):
                order = decoding.retain(going)
                rows = [rows[i] for i in order]
                token_R = torch.tensor([tokens[i] for i in order], dtype=torch.int64, device=device)
            if rows:
                decoding.append(token_R)

    def _most_rows(self) -> int:
        return max(1, LOGITS // int(self.model.config.vocab_size))

    def _ban(self, logits_RV: torch.Tensor, rows: Sequence[Row]) -> torch.Tensor:
        """Without the tokens that may not come next; rows may be of different lengths."""
        least = self.settings.min_new_tokens
        lengths = [len(row.tokens) for row in rows]
        if min(lengths) == max(lengths) or min(lengths) >= least:
            return self._stopping.ban(logits_RV, min(lengths))
        for i, length in enumerate(lengths):
            self._stopping.ban(logits_RV[i], length)
        return logits_RV


def _not_finite(rows: Sequence[Row]) -> NonFiniteError:
    origins = sorted({row.origin or "a group" for row in rows})
    return NonFiniteError(
        f"{', '.join(origins[:3])}: the model's logits are not finite numbers. Its weights have diverged (lower the "
        "learning rate), or its precision is too low for it"
    )
