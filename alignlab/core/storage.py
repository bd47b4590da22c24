"""Errors of writing files, with advice on what to do."""

from __future__ import annotations

import errno
import math
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from alignlab.core import AlignlabError

ADVICE = {
    errno.ENOSPC: "Free some space, keep fewer checkpoints, or choose another folder with out=DIR",
    errno.EDQUOT: "Your disk quota is used up: free some space, or choose another folder with out=DIR",
    errno.EROFS: "The file system is mounted read-only: choose another folder with out=DIR",
    errno.EACCES: "You may not write there: mend the permissions, or choose another folder with out=DIR",
    errno.EPERM: "You may not write there: mend the permissions, or choose another folder with out=DIR",
    errno.EFBIG: "The file is larger than allowed: raise the limit (`ulimit -f`), or save in smaller pieces",
    errno.EIO: "The device reports an error: check it, and choose another folder with out=DIR",
}
OTHERWISE = "See that the folder is there, writable and not in use by another run"


class StorageError(AlignlabError):
    """Something could not be written.

    Attributes:
        reason: the error number (0: unknown) and the system's text.
    """

    def __init__(self, message: str, reason: tuple[int, str]) -> None:
        super().__init__(message)
        self.reason = reason


@contextmanager
def storage_errors(folder: Path, what: str) -> Iterator[None]:
    """Turn write errors in the block into a `StorageError` that says what failed, where, and what to do. Of several
    such blocks the outermost says what failed.

    Args:
        folder: where files are written.
        what: what failed, e.g. "the checkpoint of step 20 could not be written".
    """
    try:
        yield
    except Exception as error:
        reason = error.reason if isinstance(error, StorageError) else _reason(error)
        if reason is None:
            raise
        number, text = reason
        free = _free(folder)
        if number == 0 and free < 1 << 20:
            number = errno.ENOSPC
        advice = ADVICE.get(number, OTHERWISE)
        message = f"{folder}: {what}: {text} ({free / 1e6:,.0f} MB free there). {advice}"
        raise StorageError(message, reason) from error


def _reason(error: BaseException) -> tuple[int, str] | None:
    """The error number (0: unknown) and text of a write error; None for any other error.

    torch.save raises a RuntimeError from its C++ stream, safetensors an error class of its own. Both put the message of
    the operating system into their text; torch leaves it out sometimes.
    """
    if isinstance(error, AlignlabError):
        return None
    if isinstance(error, OSError):
        return error.errno or 0, str(error)
    text = str(error)
    if found := re.search(r"\(os error (\d+)\)", text):
        return int(found[1]), text
    if "inline_container.cc" in text:
        known = (number for number in ADVICE if os.strerror(number) in text)
        return next(known, 0), f"torch.save failed: {text}"
    return None


def _free(folder: Path) -> float:
    """Bytes free to the user on the file system of a folder, which need not exist yet; infinite if unknown."""
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    try:
        return shutil.disk_usage(folder).free
    except OSError:
        return math.inf
