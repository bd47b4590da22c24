"""A node's process: forked from one that has loaded the libraries and does nothing else.

To load them takes a processor five seconds. A comparison has dozens of nodes.
"""

from __future__ import annotations

import multiprocessing
import os
import runpy
import signal
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from multiprocessing.reduction import DupFd
from pathlib import Path
from types import ModuleType
from typing import IO, Any

PRELOADED = "alignlab.comparison.graph.preloaded"


class NodeProcess:
    """A process that runs `alignlab node FOLDER` in a session of its own: Ctrl-C does not reach it.

    It ends, with its work saved, when this process dies.

    Args:
        folder: the node's.
        log: where it writes what would go to a terminal.
        lock: a locked file, whose lock is the process's from now on.
        environment: its environment variables.
        threads: CPU threads; None: torch's choice.
    """

    def __init__(
        self, folder: Path, log: IO[bytes], lock: IO[bytes], environment: Mapping[str, str], threads: int | None
    ) -> None:
        # Elsewhere than on Linux libraries do not bear to be forked.
        context: Any = multiprocessing.get_context("forkserver" if sys.platform == "linux" else "spawn")
        if sys.platform == "linux":
            context.set_forkserver_preload([PRELOADED])
        with _without_main():
            arguments = (folder, _Handle(log), _Handle(lock), dict(environment), threads)
            self._process: Any = context.Process(target=_work, args=arguments)
            self._process.start()

    @property
    def returncode(self) -> int | None:
        """Its exit status, minus the number of the signal that ended it; None while it runs."""
        found: int | None = self._process.exitcode
        return found

    def poll(self) -> int | None:
        return self.returncode

    def wait(self) -> None:
        self._process.join()

    def send_signal(self, number: int) -> None:
        if self.returncode is None:
            os.kill(self._process.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


class _Handle:
    """An open file on its way to another process."""

    def __init__(self, file: IO[bytes]) -> None:
        self.file = file

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        return _received, (DupFd(self.file.fileno()),)


def _received(handle: Any) -> int:
    number: int = handle.detach()
    return number


@contextmanager
def _without_main() -> Iterator[None]:
    """The new process does not import the script that runs here."""
    main = sys.modules["__main__"]
    sys.modules["__main__"] = ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main


def _work(folder: Path, log: int, lock: int, environment: Mapping[str, str], threads: int | None) -> None:
    """What the process does. `lock` stays open as long as it lives."""
    import atexit

    import torch

    os.setsid()
    threading.Thread(target=_end_with, args=(multiprocessing.parent_process(),), daemon=True).start()
    nothing = os.open(os.devnull, os.O_RDONLY)
    for number, place in ((nothing, 0), (log, 1), (log, 2)):
        os.dup2(number, place)
    sys.stdin, sys.stdout, sys.stderr = open(0, closefd=False), *(open(n, "w", closefd=False) for n in (1, 2))  # noqa: SIM115
    os.environ.clear()
    os.environ.update(environment)
    if threads:
        torch.set_num_threads(threads)
    sys.argv = ["alignlab", "node", str(folder)]
    try:
        runpy.run_module("alignlab", run_name="__main__", alter_sys=True)
    finally:
        atexit._run_exitfuncs()  # what multiprocessing leaves out


def _end_with(executor: Any) -> None:
    """Ask this process to save and end when the executor is gone, even by `kill -9`. (The kernel would do that when the
    parent dies, which is another: the process with the libraries, and it stays as long as there are forks of it.)"""
    executor.join()
    os.kill(os.getpid(), signal.SIGTERM)
