"""Processes that end: with the process that started them, and in time.

`python -m alignlab.core.children COMMAND …` runs a command in a new process group until standard input closes. Then it
ends the whole group: a server that was killed may have left processes of its own behind.
"""

from __future__ import annotations

import os
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import suppress

POLL = 0.2
"""Seconds between checks of the command."""

PATIENCE = 5.0
"""Seconds that the group has to end by itself."""


def end_with_parent(number: int = signal.SIGTERM) -> None:
    """Have the kernel send this process a signal when its parent dies, even by `kill -9`. Linux only."""
    if sys.platform != "linux":
        return
    import ctypes

    ctypes.CDLL(None).prctl(1, int(number))  # PR_SET_PDEATHSIG


def end_within(seconds: float, status: int) -> None:
    """End this process with a status after so many seconds, unless it has ended: a library may wait for ever.

    The clock is the kernel's, and what it calls is no Python, so that it works also while Python's lock is held.
    """
    import ctypes

    class Event(ctypes.Structure):  # sigevent of <signal.h>: a function to be called with a value, in a new thread
        _fields_ = (
            *(("value", ctypes.c_void_p), ("signal", ctypes.c_int), ("notify", ctypes.c_int)),
            *(("function", ctypes.c_void_p), ("attributes", ctypes.c_void_p), ("rest", ctypes.c_char * 64)),
        )

    class Times(ctypes.Structure):  # itimerspec of <time.h>
        _fields_ = tuple((name, ctypes.c_long) for name in ("again", "again_ns", "first", "first_ns"))

    libc, timer = ctypes.CDLL(None), ctypes.c_void_p()
    if sys.platform == "linux" and hasattr(libc, "timer_create"):
        event = Event(value=status, notify=2, function=ctypes.cast(libc._exit, ctypes.c_void_p))  # SIGEV_THREAD
        times = Times(first=int(seconds), first_ns=int(seconds % 1 * 1e9))
        failed = libc.timer_create(time.CLOCK_MONOTONIC, ctypes.byref(event), ctypes.byref(timer))
        if not failed and not libc.timer_settime(timer, 0, ctypes.byref(times), None):
            return
    clock = threading.Timer(seconds, os._exit, [status])
    clock.daemon = True
    clock.start()


def free_port() -> int:
    """A port of this machine on which no process listens."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def guard(command: Sequence[str]) -> int:
    """Run a command until it ends or standard input closes, end its process group, and return its exit status."""
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
