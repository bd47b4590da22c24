"""A disk that fails at the n-th operation on a run's files: once, for good, or together with the power."""

from __future__ import annotations

import builtins
import errno
import io
import os
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT
FULL = ("open", "write", "mkdir", "save")
"""What a full disk refuses; deleting, renaming and syncing still work."""

EVENTS = {"os.rename": "rename", "os.remove": "unlink", "os.mkdir": "mkdir", "os.rmdir": "rmdir"}
"""Of Python's audit hooks → as they are called here."""


@dataclass
class Disk:
    """Stands between this process and the files below a folder, from `install` on; for a process that ends soon.

    Attributes:
        how: "once" (the operation fails with EIO), "full" (no more is written: ENOSPC), "kill" (SIGKILL instead of the
            operation; of a write half is done).
        at: which operation, from 1; 0: none.
        log: gets a line for each operation: its kind and its file.
    """

    folder: Path
    how: str = "once"
    at: int = 0
    log: Path | None = None
    seen: int = 0
    busy: bool = field(default=False, repr=False)

    def install(self) -> None:
        import safetensors.torch
        import torch
        from transformers import PreTrainedTokenizerFast

        sys.addaudithook(self._audit)
        self._wrap(os, "fsync", lambda handle: ("fsync", os.readlink(f"/proc/self/fd/{handle}")))
        self._wrap(torch, "save", lambda value, file: ("save", file))
        self._wrap(safetensors.torch, "serialize_file", lambda tensors, file, **_: ("save", file))
        self._wrap(
            PreTrainedTokenizerFast, "_save_pretrained", lambda _, **o: ("save", f"{o['save_directory']}/tokens")
        )
        real = io.open

        def opened(file: Any, mode: str = "r", *rest: Any, **options: Any) -> Any:
            made = real(file, mode, *rest, **options)
            return Written(self, made, str(file)) if set(mode) & set("wax+") and self._concerns(file) else made

        builtins.open = io.open = opened  # type: ignore[assignment]

    def meet(self, kind: str, file: Any, half: Callable[[], object] = lambda: None) -> None:
        """An operation is about to be done: note it, and let it fail where it is its turn.

        Args:
            half: does half of it.
        """
        if self.busy or not self._concerns(file):
            return
        self.busy = True
        try:
            self.seen += 1
            if self.log is not None:
                name = os.path.relpath(os.fspath(file), self.folder)
                handle = os.open(self.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
                os.write(handle, f"{kind} {name}\n".encode())
                os.close(handle)
            if not self.at or self.seen < self.at:
                return
            if self.how == "kill":
                half()
                os.kill(os.getpid(), signal.SIGKILL)
            if self.how == "once" and self.seen == self.at:
                half()
                raise OSError(errno.EIO, os.strerror(errno.EIO), str(file))
            if self.how == "full" and kind in FULL:
                half()
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(file))
        finally:
            self.busy = False

    def _concerns(self, file: Any) -> bool:
        return isinstance(file, str | os.PathLike) and f"{os.fspath(file)}/".startswith(f"{self.folder}/")

    def _audit(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open" and isinstance(arguments[2], int) and arguments[2] & WRITES:
            self.meet("open", arguments[0])
        elif event in EVENTS and isinstance(arguments[0], str | os.PathLike):
            place, handle = os.fspath(arguments[0]), arguments[-1]
            if event in ("os.remove", "os.rmdir") and isinstance(handle, int) and handle >= 0:
                place = os.path.join(os.readlink(f"/proc/self/fd/{handle}"), place)
            if event != "os.mkdir" or not os.path.isdir(place):
                self.meet(EVENTS[event], place)

    def _wrap(self, owner: Any, name: str, told: Callable[..., tuple[str, Any]]) -> None:
        real = getattr(owner, name)

        def wrapped(*arguments: Any, **options: Any) -> Any:
            kind, file = told(*arguments, **options)

            def half() -> None:
                if kind == "save" and not str(file).endswith("/tokens"):
                    real(*arguments, **options)
                    os.truncate(file, os.path.getsize(file) // 2)

            self.meet(kind, file, half)
            inside, self.busy = self.busy, True  # what it does itself is part of it
            try:
                return real(*arguments, **options)
            finally:
                self.busy = inside

        setattr(owner, name, wrapped)


class Written:
    """A file that was opened for writing."""

    def __init__(self, disk: Disk, file: Any, name: str) -> None:
        self._disk, self._file, self._name = disk, file, name

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def __enter__(self) -> Written:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def write(self, content: Any) -> int:
        def half() -> None:
            self._file.write(content[: len(content) // 2])
            self._file.flush()

        self._disk.meet("write", self._name, half)
        return int(self._file.write(content))
