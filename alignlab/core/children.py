"""Processes that must not outlive the one that started them.

`python -m alignlab.core.children COMMAND …` runs a command in a process group of its own until standard input closes,
and then ends the whole group, whatever has become of the command itself: servers that start processes of their own
leave these behind when they are killed.
"""

from __future__ import annotations

import os
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress

POLL = 0.2
"""Seconds between looks at the command."""

PATIENCE = 5.0
"""Seconds that the group has to end by itself."""


def end_with_parent(number: int = signal.SIGTERM) -> None:
    """Have the kernel send this process a signal when its parent dies, even by `kill -9`; on Linux alone."""
    if sys.platform != "linux":
        return
    import ctypes

    ctypes.CDLL(None).prctl(1, int(number))  # PR_SET_PDEATHSIG


def free_port() -> int:
    """A port of this machine that nobody listens on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def guard(command: Sequence[str]) -> int:
    """Run a command until it ends or standard input does; the group is gone when this returns. The exit status."""
    asked: list[int] = []
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, lambda n, _: asked.append(n))
    child = subprocess.Popen(command, stdin=subprocess.DEVNULL, start_new_session=True, preexec_fn=end_with_parent)
    while child.poll() is None and not asked:
        ready, _, _ = select.select([0], [], [], POLL)
        if ready and not os.read(0, 1):
            break
    status = child.poll()
    _end_group(child)
    return child.returncode if status is None else status


def _end_group(child: subprocess.Popen[bytes]) -> None:
    for number in (signal.SIGTERM, signal.SIGKILL):
        deadline = time.monotonic() + PATIENCE
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(child.pid, number)
            while time.monotonic() < deadline:
                child.poll()  # or it would stay in the group as a zombie
                os.killpg(child.pid, 0)
                time.sleep(POLL)


if __name__ == "__main__":
    status = guard(sys.argv[1:])
    sys.exit(status if status >= 0 else 128 - status)
