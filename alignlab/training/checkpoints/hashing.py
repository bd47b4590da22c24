"""Checksums of files and of weights, with a progress bar where there is much to read."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from alignlab.core.progress import console

if TYPE_CHECKING:
    from torch import Tensor

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


def sha256_of_tensors(tensors: Mapping[str, Tensor], title: str) -> str:
    """Hex SHA-256 of tensors: their names, types, shapes and every bit, in the order of the names. As many at a time as
    torch uses threads; with a progress bar where there is much to read."""
    import torch

    def digest(name: str) -> bytes:
        tensor = tensors[name].detach().cpu().contiguous()
        found = hashlib.sha256(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        found.update(memoryview(tensor.reshape(-1).view(torch.uint8).numpy()))  # type: ignore[arg-type]
        advance(tensor.nbytes)
        return found.digest()

    shown = _shown(sum(t.nbytes for t in tensors.values()), title)
    with shown as advance, ThreadPoolExecutor(torch.get_num_threads()) as threads:
        return hashlib.sha256(b"".join(threads.map(digest, sorted(tensors)))).hexdigest()


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
