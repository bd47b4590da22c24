"""Responses from a model in this process."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from typing import Any

import torch

from alignlab.core import ConfigError, DataError, Group, NonFiniteError
from alignlab.core.memory import in_halves
from alignlab.data.progress import progress
from alignlab.models import PackedModel, evaluating
from alignlab.models.adapters import merged
from alignlab.rollout.batching import LOGITS, Queue, Row, batches
from alignlab.rollout.continuous import ContinuousDecoding, takes_plans
from alignlab.rollout.decoding import Decoding, decoding_mode
from alignlab.rollout.quick import quick_products
from alignlab.rollout.sampling import sample, stream_key, uniforms
from alignlab.rollout.settings import RolloutSettings
from alignlab.rollout.stopping import Stopping

log = logging.getLogger(__name__)


class LocalEngine:
    """A `Sampler` on a `PackedModel`: one prefill per prompt, rows that end leave the batch.

    A response depends on the seed, the prompt (its tokens, and the file name and line of its origin) and the index of
    the sample: number t of its uniforms is a hash of these and t, and a token is the uniform's quantile. Batches,
    their order, the token budget and the number of processes change nothing, up to rounding of the logits. A group
    that occurs again in a call, same prompt and origin, goes on where the samples of the last occurrence end:
    two occurrences with n samples are one with 2n. (In another process it would start from 0 again, so records need
    origins of their own.)

    Args:
        progress: show a bar, on a terminal, for what takes over two seconds.

    Attributes:
        generated_tokens: response tokens drawn so far.
    """

    def __init__(self, model: PackedModel, settings: RolloutSettings, progress: bool = True) -> None:
        if model.kind != "policy":
            raise ConfigError(f"rollout: responses come from a language model, this is a {model.kind} model")
        self.model = model
        self.settings = settings
        self.generated_tokens = 0
        self._progress = progress
        self._stopping = Stopping(model, settings)

    def sample(self, groups: Sequence[Group], n: int, seed: int) -> list[Group]:
        """For each group, in order, the same prompt with n new responses from the policy.

        Returns:
            Groups whose responses have `behaviour_logp`, one value in nats for each token, under the distribution
            drawn from (after temperature and filters; 0 throughout when greedy); `finished` is False where a limit
            cut the response.

        Raises:
            DataError: for a prompt that leaves no room for a token in the model's positions, or an empty one.
            NonFiniteError: where the model's logits are NaN or infinite.
        """
        return self._sample(groups, n, seed, self.settings)

    def greedy(self, groups: Sequence[Group]) -> list[Group]:
        """For each group, the response made of the most probable tokens."""
        return self._sample(groups, 1, 0, self.settings.model_copy(update={"temperature": 0.0}))

    def _sample(self, groups: Sequence[Group], n: int, seed: int, settings: RolloutSettings) -> list[Group]:
        rows = self.rows(groups, n, seed)
        self.draw(rows, settings=settings)
        return [g.with_responses([r.response() for r in rows[i * n : (i + 1) * n]]) for i, g in enumerate(groups)]

    def draw(
        self, rows: Sequence[Row], until: Callable[[Row], bool] | None = None, settings: RolloutSettings | None = None
    ) -> None:
        """Go on with rows, in place, each until it ends, or until `until` is true of it after another token.

        Drawn in one go or in several, a row gets the same tokens.
        """
        for row in rows:
            row.begun = len(row.tokens)
        settings = settings or self.settings
        network = self.model.network
        # A compiler knows quick products of its own.
        quick = nullcontext() if settings.compile else quick_products(network)
        with torch.no_grad(), evaluating(self.model), merged(network), quick:
            ended = self._draw(rows, settings, until)
            for _ in progress(ended, "generating", len(rows)) if self._progress else ended:
                pass
        self.generated_tokens += sum(len(row.tokens) - row.begun for row in rows)

    def rows(self, groups: Sequence[Group], n: int, seed: int) -> list[Row]:
        """n rows for each group, in order, without tokens yet.

        Raises:
            DataError: as `sample` does.
        """
        if n < 1:
            raise ConfigError(f"rollout: n={n} responses per prompt; at least 1 is needed")
        most, positions = self.settings.max_new_tokens, self.model.max_length
        occurrences: Counter[bytes] = Counter()
        rows: list[Row] = []
        shortened = 0
        for group in groups:
            length = len(group.prompt_ids)
            if not length:
                raise DataError(f"{group.origin or 'a group'}: the prompt has no tokens")
            room = most if positions is None else min(most, positions - length)
            if room < 1:
                raise DataError(
                    f"{group.origin or 'a group'}: the prompt has {length} tokens and the model knows {positions} "
                    "positions: no room for a response. Leave such prompts out or shorten them"
                )
            shortened += room < most
            key = stream_key(seed, group.origin, group.prompt_ids)
            first = n * occurrences[key]
            occurrences[key] += 1
            rows += [Row(group.prompt_ids, group.origin, key, first + k, room) for k in range(n)]
        if shortened:
            log.warning(
                "%d of %d prompts leave less room than max_new_tokens=%d in the model's %d positions: "
                "their responses end where the positions end",
                *(shortened, len(groups), most, positions),
            )
        return rows

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
                queue = Queue(some, budget, len(places) if fewer else self._most_rows(), settings.compile)
                yield from finish(ContinuousDecoding(self.model, settings.compile), queue)

        name = type(self.model.base).__name__
        longest = max((row.final_length for row in rows), default=0)
        if rows and takes_plans(self.model, longest):
            most = Queue(rows, settings.max_batch_tokens, self._most_rows(), settings.compile).first
            yield from in_halves([list(range(most))], in_places, "sampling")
        elif rows:
            mode = decoding_mode(self.model)
            if settings.compile:
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
