"""Calls of a schedule and a data order that a user may have written: as `core.parts`, for what the loop alone asks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from alignlab.core import AlignlabError, ConfigError, DataOrder
from alignlab.core.parts import WHOLE, calling, finite, name_of

LARGEST = 1e6
"""Of a schedule's factors: more is a slip, and more by far overflows."""


def factor_of(schedule: Any, done: float) -> float:
    """A schedule's factor on the peak learning rate when a share `done` of the run is over.

    Raises:
        AlignlabError: it raised, or returned something else than a number >= 0.
    """
    with calling(schedule, "__call__", f"at {done:.1%} of the run"):
        found = schedule(done)
    try:
        if 0 <= (factor := finite(found)) <= LARGEST:
            return factor
        raise ValueError(f"is {factor}")
    except ValueError as error:
        raise AlignlabError(
            f"{name_of(schedule, '__call__')}: a factor on the learning rate must be in [0, {LARGEST:g}]; that at "
            f"{done:.1%} of the run {error}"
        ) from error


def check_order(order: DataOrder) -> None:
    """Raise ConfigError unless an order says how many batches make an epoch."""
    with calling(order, "batches_per_epoch"):
        found: Any = order.batches_per_epoch
    if not isinstance(found, WHOLE) or int(found) < 1:
        raise ConfigError(f"{name_of(order, 'batches_per_epoch')}: must be a whole number >= 1; got {found!r:.80}")


def batch_of(order: DataOrder, index: int, count: int) -> list[int]:
    """Indices of the records of a batch, of `count` records in all.

    Raises:
        AlignlabError: it raised, or returned something else.
    """
    with calling(order, "batch", f"batch {index + 1}"):
        found: Any = order.batch(index)
        listed = None if found is None or isinstance(found, str) else list(found)
    if not listed or not all(isinstance(i, WHOLE) and 0 <= i < count for i in listed):
        raise AlignlabError(
            f"{name_of(order, 'batch')}: batch {index + 1} must be indices of records, from 0 to {count - 1}, at least "
            f"one; got {found!r:.80}"
        )
    return [int(i) for i in listed]


def plain_of(part: object, method: str, found: Any) -> dict[str, Any]:
    """What a part keeps in checkpoints: numbers, texts, lists and mappings of them.

    Raises:
        AlignlabError: it holds something else.
    """

    def check(value: Any) -> None:
        if isinstance(value, Mapping):
            for each in value.values():
                check(each)
        elif isinstance(value, list | tuple):
            for each in value:
                check(each)
        elif not isinstance(value, str | int | float | np.generic | np.ndarray | None):
            raise AlignlabError(
                f"{name_of(part, method)}: keeps numbers, texts, lists and dictionaries of them; got "
                f"{type(value).__name__}"
            )

    if not isinstance(found, Mapping):
        raise AlignlabError(f"{name_of(part, method)}: must return a dictionary; got {type(found).__name__}")
    check(found)
    return dict(found)
