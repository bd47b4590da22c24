"""Runs in forked processes: they start at once, for everything is imported already, and can be killed."""

from __future__ import annotations

import ctypes
import gc
import os
import signal
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import IO, ClassVar

from alignlab.core.children import end_with_parent
from tests.training import runs

PR_SET_PDEATHSIG = 1
"""Linux's number for: the signal to get when the parent dies."""


def fork(action: Callable[[], object], log: Path | None = None) -> int:
    """Begin it in a child process, which ends with status 0, what it raised SystemExit with, or 1; the child's id.

    Args:
        log: where its output goes.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid:
        return pid
    gc.freeze()  # DeepSpeed collects garbage at each start: a second to look through all that is imported
    status = 1
    try:
        if log is not None:
            handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(handle, 1)
            os.dup2(handle, 2)
            sys.stdout, sys.stderr = (open(number, "w", closefd=False) for number in (1, 2))  # noqa: SIM115
        status = _status(action)
        sys.stdout.flush()
        sys.stderr.flush()
    finally:  # whatever happens, a child must never go on with the tests
        os._exit(status)


def _status(action: Callable[[], object]) -> int:
    try:
        action()
    except SystemExit as error:
        return int(error.code or 0)
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


def wait(pid: int) -> int:
    """Its exit status; minus the number of the signal that killed it."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def wait_at_most(pid: int, seconds: float) -> int:
    """The same of a process that must have ended by then; otherwise it is killed."""
    end = time.monotonic() + seconds
    while not os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT):
        if time.monotonic() > end:
            os.kill(pid, signal.SIGKILL)
        time.sleep(0.01)
    return wait(pid)


def command(words: Sequence[str]) -> Callable[[], None]:
    """A command line, as an action."""

    def act() -> None:
        from alignlab.cli import main

        raise SystemExit(main(list(words)))

    return act


def group(words: Sequence[str], log: Path, processes: int = 2) -> list[int]:
    """Begin a command in several processes of one run, as torchrun would; their ids, by rank."""
    import_for(words)
    return members(command(words), log, processes)


def import_for(words: Sequence[str]) -> None:
    """Import here, once, what each fork would spend seconds on."""
    if any(word.startswith("distributed=zero") for word in words):
        import deepspeed  # noqa: F401


def members(action: Callable[[], object], log: Path, processes: int = 2) -> list[int]:
    """Begin an action in several processes that are members of one group; their ids, by rank.

    Args:
        log: where the output of rank N goes, with `.N` added.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]

    def member(rank: int) -> Callable[[], None]:
        def act() -> None:
            from accelerate.state import AcceleratorState

            ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)  # where a test's time is over, so is theirs
            AcceleratorState._reset_state(reset_partial_state=True)
            place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes}
            os.environ |= {k: str(v) for k, v in place.items()}
            os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
            action()

        return act

    return [fork(member(rank), log.with_name(f"{log.name}.{rank}")) for rank in range(processes)]


def train(folder: Path, algorithm: str, out: str, *more: str, processes: int = 2) -> None:
    """A run of several processes to its end."""
    if not any(w.startswith("distributed=") for w in more):
        more = (*more, "distributed=ddp")
    log = folder / f"{out}.log"
    finish(group(["train", *runs.words_for(folder, algorithm, out, *more)], log, processes), log)


def finish(pids: Sequence[int], log: Path) -> str:
    """Wait for the members of a group, all of which succeed; what they said, by rank.

    Where one fails, the others, which may be waiting for it, are killed.
    """
    statuses: dict[int, int] = {}
    while len(statuses) < len(pids):
        for pid in set(pids) - statuses.keys():
            if os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT):
                statuses[pid] = wait(pid)
            elif any(statuses.values()):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.01)
    said = "\n".join(log.with_name(f"{log.name}.{rank}").read_text() for rank in range(len(pids)))
    assert not any(statuses.values()), said
    return said


class Forked:
    """What a `subprocess.Popen` offers, of a fork: faster than a new interpreter.

    Attributes:
        pid: set by who forks.
    """

    pid: int
    returncode: int | None = None

    def poll(self) -> int | None:
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self.returncode = os.waitstatus_to_exitcode(status) if pid else None
        return self.returncode

    def wait(self, timeout: float = float("inf")) -> int:
        end = time.monotonic() + timeout
        while self.poll() is None:
            if time.monotonic() > end:
                raise subprocess.TimeoutExpired("node", timeout)
            time.sleep(0.01)
        assert self.returncode is not None
        return self.returncode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


class Process(Forked):
    """Stands in for the `NodeProcess` of a node: a fork of the process that tests."""

    started: ClassVar[list[str]] = []
    """The folders of the nodes that were started, in order."""

    def __init__(
        self, folder: Path, log: IO[bytes], lock: IO[bytes], environment: Mapping[str, str], threads: int | None
    ) -> None:
        Process.started.append(str(folder))

        def act() -> None:
            for name in ("SIGTERM", "SIGINT", "SIGUSR1"):
                signal.signal(getattr(signal, name), signal.SIG_DFL)
            os.setsid()
            end_with_parent()
            os.environ.clear()
            os.environ.update(environment)
            command(["node", str(folder)])()

        self.pid = fork(act, Path(log.name))
