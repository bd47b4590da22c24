"""Where a process is that no longer answers, or that waits for one: its Python stack, in a file."""

from __future__ import annotations

import faulthandler
import os
import re
from pathlib import Path

LOGS = "logs"
"""In a run's folder: what processes other than the first one said, `rank-N.log`, and their stacks."""

EARLY = 0.9
"""The share of the time-out after which the stack is written: before those who wait give up and are gone."""

STACKS = "rank-{}.stack"

FRAME = re.compile(r'^  File "(?P<file>.+)", line (?P<line>\d+) in (?P<name>.+)$')


class Watchdog:
    """Writes the stack of every thread of this process unless `arm` is called again in time. The file is empty as long
    as all is well. A crash (SIGSEGV, SIGABRT…) leaves its stack there too.

    The clock is a thread without Python: it runs also where Python does not.

    Args:
        folder: where `rank-N.stack` is written.
        timeout: `distributed.timeout`, in seconds.
    """

    def __init__(self, folder: Path, rank: int, timeout: float) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.path, self.seconds = folder, folder / STACKS.format(rank), EARLY * timeout
        self._file = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND, 0o644)
        faulthandler.enable(self._file)
        self.arm()

    def arm(self) -> None:
        """Begin to count anew: this process has been heard of."""
        if os.fstat(self._file).st_size:
            os.ftruncate(self._file, 0)  # slow, but it came
        faulthandler.dump_traceback_later(self.seconds, file=self._file)

    def stop(self) -> None:
        """All went well."""
        faulthandler.cancel_dump_traceback_later()
        faulthandler.disable()
        os.close(self._file)
        self.path.unlink(missing_ok=True)


def place(stack: Path) -> str | None:
    """Where a process was, from the file it left: its innermost function outside of libraries, or None."""
    try:
        text = stack.read_text(errors="replace")
    except OSError:
        return None
    main = text.rpartition("(most recent call first):\n")[2]  # the main thread is the last
    frames = [found for line in main.splitlines() if (found := FRAME.match(line))]
    own = [f for f in frames if not re.search(r"/(site-packages|lib/python\d)", f["file"])]
    return next((f"{f['name']} ({f['file']}, line {f['line']})" for f in own or frames), None)
