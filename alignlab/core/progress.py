"""A progress bar for what turns out to take long, and none for what does not."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Iterator
from contextlib import suppress
from functools import lru_cache
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from rich.console import Console

Item = TypeVar("Item")

PATIENCE = 1.0
"""Seconds before the bar appears."""


@lru_cache(maxsize=1)
def console() -> Console:
    """The one console, on standard error: live displays that share it do not overwrite each other."""
    from rich.console import Console

    return Console(stderr=True)


def progress(iterable: Iterable[Item], title: str, total: int | None = None) -> Iterator[Item]:
    """The items as they are, with a bar once they have taken over a second.

    The bar is on standard error, of the first process, and only where that is a terminal.

    Args:
        iterable: the items.
        title: what is done with them, as in "generating".
        total: how many there are, where that is known.
    """
    items, done, start = iter(iterable), 0, time.monotonic()
    for item in items:
        yield item
        done += 1
        if time.monotonic() - start > PATIENCE:
            break
    else:
        return
    from rich.errors import LiveError
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    shown = console().is_terminal and os.environ.get("RANK", "0") == "0"
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    bar = Progress(*columns, console=console(), transient=True, disable=not shown)
    with suppress(LiveError):  # rich < 14.1 draws one live display at a time; the first has precedence
        bar.start()
    task = bar.add_task(title, total=total, completed=done)
    try:
        for item in items:
            yield item
            bar.advance(task)
    finally:
        bar.stop()
