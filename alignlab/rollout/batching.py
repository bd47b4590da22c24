"""Which rows are drawn together."""

from __future__ import annotations

import sys
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby

from alignlab.core import Response
from alignlab.core.group import Column, numbers

LOGITS = 1 << 26
"""Logits of one step at most, in numbers (256 MB in float32): rows beyond wait, however short."""

STRIDE = 64
"""Lengths are multiples of this where shapes should be few."""


@dataclass(slots=True)
class Row:
    """A response that is being drawn.

    Attributes:
        key, sample: what its random numbers are made from: see `sampling.uniforms`.
        limit: tokens at most.
        begun: how many tokens it had at the last call that continued it.
    """

    prompt: list[int]
    origin: str
    key: bytes
    sample: int
    limit: int
    tokens: list[int] = field(default_factory=list)
    logp: list[float] = field(default_factory=list)
    text: str = ""
    finished: bool = False
    begun: int = 0

    @property
    def context(self) -> list[int]:
        """What the next token is predicted from."""
        return self.prompt + self.tokens if self.tokens else self.prompt

    @property
    def final_length(self) -> int:
        return len(self.prompt) + self.limit

    @property
    def room(self) -> int:
        """How many tokens may still come."""
        return self.limit - len(self.tokens)

    def response(self) -> Response:
        columns: dict[str, Column] = {"behaviour_logp": numbers(self.logp)}
        return Response(self.tokens, columns=columns, finished=self.finished, text=self.text, source="policy")


@dataclass(slots=True)
class Unit:
    """Rows of the same context."""

    context: list[int]
    rows: list[Row]

    @property
    def room(self) -> int:
        return max(row.room for row in self.rows)


def units(rows: Sequence[Row]) -> list[Unit]:
    """Like lengths together, the longest first."""
    contexts = sorted(((row.context, i) for i, row in enumerate(rows)), key=lambda c: (-len(c[0]), c[0]))
    return [
        Unit(context, [rows[i] for _, i in same]) for context, same in groupby(contexts, key=lambda context: context[0])
    ]


def batches(rows: Sequence[Row], max_batch_tokens: int, padded: bool) -> Iterator[list[Row]]:
    """Rows in batches of at most `max_batch_tokens` tokens when all reach their limit, each row with a prompt of its
    own, or of one row: for a decoding that takes no rows on the way.

    The rows of one prompt are parted only where a batch cannot hold them all.
    """
    batch: list[Row] = []
    room = length = 0
    for unit in units(rows):
        same = unit.rows
        mixed = bool(batch) and len(unit.context) != length
        if batch and (len(same) > room or (mixed and not padded)):
            yield batch
            batch = []
        if not batch:
            length = len(unit.context)
            room = most = max(1, max_batch_tokens // same[0].final_length)
            while len(same) > most:
                yield same[:most]
                same = same[most:]
        batch += same
        room -= len(same)
    if batch:
        yield batch


@dataclass(frozen=True)
class Space:
    """What is kept for rows that are begun together: their contexts once each, padded, and each row's own tokens.

    Attributes:
        contexts, longest: how many, and for how many tokens each.
        rows, room: likewise.
    """

    contexts: int
    longest: int
    rows: int
    room: int

    @property
    def tokens(self) -> int:
        return self.contexts * self.longest + self.rows * self.room

    def rounded(self) -> Space:
        """A little more, so that few shapes occur."""
        contexts, rows = (1 << (count - 1).bit_length() for count in (self.contexts, self.rows))
        longest, room = (-(-length // STRIDE) * STRIDE for length in (self.longest, self.room))
        return Space(contexts, longest, rows, room)


class Queue:
    """Rows that wait for room; the longest contexts come first.

    Args:
        max_batch_tokens: tokens held at a time, see `Space`; a single row may exceed it.
        most_rows: rows at a time.
        few_shapes: space is taken as in `Space.rounded`.
    """

    def __init__(self, rows: Sequence[Row], max_batch_tokens: int, most_rows: int, few_shapes: bool = False) -> None:
        self._few_shapes = few_shapes
        self._waiting = deque(units(rows))
        self._budget, self._most = max_batch_tokens, most_rows

    @classmethod
    def of_one(cls, batch: Sequence[Row]) -> Queue:
        """All at once."""
        return cls(batch, sys.maxsize, len(batch))

    def __bool__(self) -> bool:
        return bool(self._waiting)

    @property
    def first(self) -> int:
        """How many rows are begun at first."""
        taken = self.take(0, 0)
        self._waiting.extendleft(reversed(taken))
        return sum(len(unit.rows) for unit in taken)

    def take(self, tokens: int, rows: int) -> list[Unit]:
        """The rows to begin now, beside `rows` rows that hold `tokens` tokens; none while too little is free.

        Rows of one context are parted only where the budget cannot hold them all.
        """
        free, places = self._budget - tokens, self._most - rows
        taken: list[Unit] = []
        contexts = count = room = 0
        while self._waiting:
            unit = self._waiting[0]
            longest = len(taken[0].context) if taken else len(unit.context)
            wider = max(room, unit.room)
            space = Space(contexts + 1, longest, count + len(unit.rows), wider)
            if (space.rounded() if self._few_shapes else space).tokens > free or count + len(unit.rows) > places:
                break
            taken.append(self._waiting.popleft())
            contexts, count, room = contexts + 1, count + len(unit.rows), wider
        if not taken and not rows and self._waiting:
            unit = self._waiting.popleft()
            most = max(1, min(places, (free - len(unit.context)) // max(1, unit.room)))
            taken = [Unit(unit.context, unit.rows[:most])]
            if rest := unit.rows[most:]:
                self._waiting.appendleft(Unit(unit.context, rest))
        elif rows and self._waiting and (4 * free < self._budget or 4 * places < self._most):
            # Few at a time would cost a pass of their own each.
            self._waiting.extendleft(reversed(taken))
            taken = []
        return taken
