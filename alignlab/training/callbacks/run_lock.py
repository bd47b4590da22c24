"""A lock on a run's folder: the process that took it last has it; one that has lost it stops, and writes nothing more.

Two may be at work in one folder where the same command is given twice, or where a cluster has lost a node whose
processes live on and starts the run anew on another.
"""

from __future__ import annotations

import os
import secrets
import socket
import time
from pathlib import Path
from typing import TYPE_CHECKING

from alignlab.core import AlignlabError, Callback
from alignlab.core.files import write_text

if TYPE_CHECKING:
    from alignlab.training.trainer import Trainer

OWNER = "run_lock"
EVERY = 10.0
"""Seconds between looks while a run goes on."""


class RunLock(Callback):
    """That of a run's main process.

    Args:
        folder: the run's.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / OWNER
        self.mark = f"{socket.gethostname()} {os.getpid()} {secrets.token_hex(8)}"
        self._looked = time.monotonic()

    def take(self) -> None:
        write_text(self.path, self.mark + "\n")

    def check(self) -> None:
        """Look whether the lock is still this process's.

        Raises:
            AlignlabError: another process has begun in the folder since.
        """
        self._looked = time.monotonic()
        try:
            found = self.path.read_text(errors="replace").strip()
        except OSError:  # removed: nobody else's
            return
        if found and found != self.mark:
            host, process, *_ = [*found.split(), "?"]
            raise AlignlabError(
                f"{self.path.parent}: process {process} on {host} has begun to work on this run since (the same "
                "command again, or its job was queued again): this one stops, and leaves it alone"
            )

    def on_step(self, trainer: Trainer) -> None:
        if time.monotonic() - self._looked >= EVERY:
            self.check()

    def on_end(self, trainer: Trainer, error: BaseException | None) -> None:
        if error is None:
            self.check()
