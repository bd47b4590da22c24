"""Whose a run's folder is: the last one's to have begun in it. Who has lost it stops, and writes nothing more.

Two may be at work in one folder where the same command is given twice, or where a cluster has lost a node whose
processes live on and starts the run anew on another.
"""

from __future__ import annotations

import os
import secrets
import socket
import time
from pathlib import Path

from alignlab.core import AlignlabError
from alignlab.core.files import write_text

OWNER = "owner"
EVERY = 10.0
"""Seconds between looks while a run goes on."""


class RunLock:
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
        """
        Raises:
            AlignlabError: another process has begun in the folder since.
        """
        self._looked = time.monotonic()
        try:
            found = self.path.read_text().strip()
        except OSError:  # removed: nobody else's
            return
        if found and found != self.mark:
            host, process, *_ = found.split()
            raise AlignlabError(
                f"{self.path.parent}: process {process} on {host} has begun to work on this run since (the same "
                "command again, or its job was queued again): this one stops, and leaves it alone"
            )

    def check_now_and_then(self) -> None:
        """`check`, where the last one was some time ago."""
        if time.monotonic() - self._looked >= EVERY:
            self.check()
