"""A progress bar for what turns out to take long, and none for what does not."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

Item = TypeVar("Item")

PATIENCE = 1.0
"""Seconds before the bar appears."""


def progress(items: Iterable[Item], label: str, total: int | None = None) -> Iterator[Item]:
    """The items as they are, with a bar on the first process's stderr, where that is a terminal, once they have taken
    over a second."""
    iterator = iter(items)
    start, done = time.monotonic(), 0
    for item in iterator:
        yield item
        done += 1
        if time.monotonic() - start > PATIENCE:
            break
    else:
        return
    from rich.console import Console

    console = Console(stderr=True)
    if os.environ.get("RANK", "0") != "0" or not console.is_terminal:  # elsewhere a bar is but an empty line
        yield from iterator
        return
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task(label, total=total, completed=done)
        for item in iterator:
            yield item
            bar.advance(task)
