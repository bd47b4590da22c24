"""Checksums of files, with a progress bar where there is much to read."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from alignlab.training.progress import console

SHOWN_FROM = 1 << 30
"""Bytes from which on hashing is shown as a progress bar: it takes about two seconds a GiB from a local disk."""


def files_below(folder: Path) -> list[Path]:
    """All files in a folder and its subfolders, sorted by path."""
    return sorted(path for path in folder.rglob("*") if path.is_file())


def sha256(path: Path, advance: Callable[[int], None] = lambda _bytes: None) -> str:
    """Hex SHA-256 of a file's contents. `advance` is called with the number of bytes just read, about every 8 MiB."""
    digest = hashlib.sha256()
    with path.open("rb", buffering=0) as file:
        while chunk := file.read(1 << 23):
            digest.update(chunk)
            advance(len(chunk))
    return digest.hexdigest()


def sha256_each(paths: Iterable[Path], title: str) -> dict[Path, str]:
    """Hex SHA-256 of each file, with a progress bar named `title` where there is much to read."""
    paths = list(paths)
    with _shown(sum(path.stat().st_size for path in paths), title) as advance:
        return {path: sha256(path, advance) for path in paths}


@contextmanager
def _shown(total: int, title: str) -> Iterator[Callable[[int], None]]:
    """A function to be told of the bytes done; it moves a bar on a terminal where `total` is large."""
    if total < SHOWN_FROM or not console().is_terminal:
        yield lambda _bytes: None
        return
    from rich.errors import LiveError
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

    columns = TextColumn(title), BarColumn(), DownloadColumn(), TimeRemainingColumn()
    bar = Progress(*columns, console=console(), transient=True)
    with suppress(LiveError):  # rich < 14.1 draws one live display at a time; the training loop's has precedence
        bar.start()
    task = bar.add_task(title, total=total)
    try:
        yield lambda done: bar.advance(task, done)
    finally:
        bar.stop()
