"""Checksums of files and of weights, with a progress bar where they take long."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

from alignlab.core.progress import progress

if TYPE_CHECKING:
    from torch import Tensor


def files_below(folder: Path) -> list[Path]:
    """All files in a folder and its subfolders, sorted by path."""
    return sorted(path for path in folder.rglob("*") if path.is_file())


def sha256_each(paths: Collection[Path], title: str) -> dict[Path, str]:
    """Hex SHA-256 of each file."""
    found = {}
    for path in progress(paths, title, len(paths)):
        with path.open("rb", buffering=0) as file:
            found[path] = hashlib.file_digest(file, "sha256").hexdigest()
    return found


def sha256_of_tensors(tensors: Mapping[str, Tensor], title: str) -> str:
    """Hex SHA-256 of tensors: their names, types, shapes and every bit, in the order of the names. As many at a time as
    torch uses threads."""
    import torch

    def digest(name: str) -> bytes:
        tensor = tensors[name].detach().cpu().contiguous()
        found = hashlib.sha256(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        found.update(memoryview(tensor.reshape(-1).view(torch.uint8).numpy()))  # type: ignore[arg-type]
        return found.digest()

    with ThreadPoolExecutor(torch.get_num_threads()) as threads:
        digests = threads.map(digest, sorted(tensors))
        return hashlib.sha256(b"".join(progress(digests, title, len(tensors)))).hexdigest()
