"""Files and folders that are written whole or not at all, even if the process is killed or the machine loses its power
meanwhile. All that a run or a comparison leaves is written by these functions, whose errors are those of `storage`."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from alignlab.core.storage import storage_errors


def write_bytes(path: Path, content: bytes) -> None:
    """Replace a file in one step: readers find the old or the new contents, never a part, even after a crash. Its
    folder is made where there is none.

    Raises:
        StorageError: it cannot be written; the old file is unchanged.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    with storage_errors(path.parent, f"{path.name} could not be written"):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary.write_bytes(content)
            sync(temporary)
            os.replace(temporary, path)
        except BaseException:
            with suppress(OSError):
                temporary.unlink()
            raise
        sync(path.parent)


def write_text(path: Path, text: str) -> None:
    """`write_bytes` of a text, in UTF-8."""
    write_bytes(path, text.encode("utf-8"))


def write_json(path: Path, value: Any) -> None:
    """`write_text` of a value as indented JSON."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


@contextmanager
def replacing(folder: Path) -> Iterator[Path]:
    """A temporary folder to be filled; at the end of the block it takes the place of `folder`.

    No system call does that to a folder which is not empty. A crash between the two that are needed leaves the old one
    under a temporary name, from which `restore` brings it back.

    Raises:
        StorageError: it cannot be written; the old folder is unchanged, and the temporary one gone. Any other exception
            from the block leaves things alike and passes through.
    """
    temporary, former = folder.with_name(f".{folder.name}.tmp"), _former(folder)
    with storage_errors(folder.parent, f"{folder.name} could not be saved"):
        try:
            restore(folder)
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)
            yield temporary
            sync_below(temporary)
            if folder.exists():
                os.rename(folder, former)
            os.rename(temporary, folder)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            with suppress(OSError):
                restore(folder)
            raise
        sync(folder.parent)
        shutil.rmtree(former, ignore_errors=True)


def restore(folder: Path) -> None:
    """Bring back a folder that was about to be replaced when the process was killed."""
    former = _former(folder)
    if former.exists() and folder.exists():
        shutil.rmtree(former)
    elif former.exists():
        os.rename(former, folder)


def discard(folder: Path) -> None:
    """Remove a folder: whenever the process is killed, it is there whole or not at all."""
    trash = folder.with_name(f".trash-{folder.name}")
    shutil.rmtree(trash, ignore_errors=True)
    if folder.exists():
        os.rename(folder, trash)
        shutil.rmtree(trash, ignore_errors=True)


def sync(path: Path) -> None:
    """Wait until the kernel has written a file's contents, or a folder's list of names, to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP) or not path.is_dir():  # some network file systems
            raise
    finally:
        os.close(handle)


def sync_below(folder: Path) -> None:
    """`sync` of all files and folders in a folder, and of itself, the deepest first."""
    for path in sorted([folder, *folder.rglob("*")], reverse=True):
        sync(path)


def _former(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.old")
