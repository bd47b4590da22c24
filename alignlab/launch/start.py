"""The processes of a distributed run on this machine: started as torchrun starts them, watched, ended together."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import IO, Any

import yaml

from alignlab.core import AlignlabError, ConfigError, PeerLost, StartAgain
from alignlab.core.children import end_with_parent, free_port
from alignlab.core.errors import STARTER
from alignlab.core.files import write_text
from alignlab.core.memory import ADVICE, is_memory_error, said
from alignlab.core.secrets import set_aside
from alignlab.training.distributed.processes import launched
from alignlab.training.distributed.watchdog import LOGS, STACKS, place
from alignlab.training.settings import DistributedSettings
from alignlab.training.signals import SIGNALS, heeded

HANDLED = tuple(getattr(signal, name) for name in SIGNALS)
"""What asks a run to stop, with a checkpoint."""

POLL = 0.1
"""Seconds between looks at the processes."""

ERROR = re.compile(r"alignlab: |[\w.]*(Error|Exception)\b|terminate called|what\(\):")
"""How a line begins that says what is wrong: one of ours, a traceback's last, or what C++ says."""

PATIENCE = 5.0
"""Seconds that the others have to end by themselves once one of a run's processes has failed."""

PATIENCE_STOPPING = 60.0
"""The same, where it ended because it was asked to."""


@dataclass
class Member:
    """One of the processes.

    Attributes:
        log: where it writes, unless that is the terminal; `begun` is where its messages of this time start.
        suspended: the signal by which it was suspended when it had to be ended.
    """

    rank: int
    process: subprocess.Popen[bytes]
    log: Path | None
    begun: int = 0
    suspended: str | None = None

    @property
    def last_words(self) -> str:
        """The last error that it reported."""
        if self.log is None:
            return ""
        text = self.log.read_bytes()[self.begun :].decode(errors="replace")
        lines = [line.strip().removeprefix(f"[rank{self.rank}]: ") for line in text.splitlines()]
        return next((line.removeprefix("alignlab: ") for line in reversed(lines) if ERROR.match(line)), "")

    def stopped(self, forwarded: Sequence[int]) -> bool:
        """Whether it was asked to end: with a checkpoint, or by a signal of ours before it could write one."""
        asked = (128 + number for number in HANDLED)
        return self.process.returncode in {*asked, *(-number for number in forwarded)}

    @property
    def ending(self) -> str:
        code = self.process.returncode
        return f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with status {code}"


def train(
    config: dict[str, Any], out: Path, callbacks: Iterable[Any] = (), checked: Any = None
) -> dict[str, Any] | None:
    """Train in this process, or in as many as `distributed` asks for where no launcher has started any.

    Args:
        callbacks: beside those of the config; for this process alone.
        checked: what `training.run.check` made of the config, with objects that no config can name.

    Returns:
        The result, or None where processes of its own did the work: it is in `out/result.json`.

    Raises:
        Failed: one of the processes failed; what there was to say has been said.
    """
    from alignlab.build import section

    distributed = section(DistributedSettings, config.get("distributed", {}), "distributed")
    if distributed.mode == "single" or launched() is not None:
        from alignlab.training.run import train as run

        try:
            with _deaf():
                return run(config, out, callbacks, checked)
        except Exception as error:
            if not is_memory_error(error):
                raise
            raise AlignlabError(f"out of memory ({said(error)}): {ADVICE}") from error
    if checked is not None or callbacks:
        raise ConfigError(
            f"distributed={distributed.mode}: objects of this process cannot go to others: start your script with "
            "torchrun, so that each has its own"
        )
    status = start(config, out, _count(distributed))
    if status:
        raise Failed(status)
    return None


@contextmanager
def _deaf() -> Iterator[None]:
    """SIGUSR1 asks the training loop to stop; it must not end the process while that loads, or saves the model."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    former = signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGUSR1, signal.SIG_DFL if former is None else former)


class Failed(AlignlabError):
    """A process of the run failed, and has said why."""

    def __init__(self, status: int) -> None:
        super().__init__(f"the run ended with status {status}")
        self.status = status


def _count(distributed: DistributedSettings) -> int:
    import torch

    count = distributed.processes or torch.cuda.device_count()
    if not count:
        raise ConfigError(f"distributed={distributed.mode}: there are no GPUs to count: give distributed.processes=N")
    if count == 1 and not distributed.mode.startswith("zero"):
        raise ConfigError(f"distributed={distributed.mode}: with one process use distributed=single")
    return count


def start(config: dict[str, Any], out: Path, count: int) -> int:
    """Run `count` processes of one training run to their end; the exit status, 0 if all did well.

    The first one has the terminal. When one fails the others end within seconds, and the one to blame is named. Where
    one asks for it (no memory, and a smaller token budget to go on with), all are started again.
    """
    team = Team(out, count)
    former = {number: signal.signal(number, team.forward) for number in heeded()}
    try:
        status = team.run(config)
        while status == StartAgain.status and not team.forwarded:
            starved = next(m.rank for m in team.members if m.process.returncode == StartAgain.status)
            print(
                f"alignlab: process {starved} ran out of memory: all are started again, with a smaller token budget",
                file=sys.stderr,
            )
            status = team.run(config | {"training": {**config["training"], "resume": "auto"}})
        return status
    finally:
        team.kill()
        for number, handler in former.items():
            signal.signal(number, handler)


class Team:
    """The processes of a run.

    Attributes:
        forwarded: the signals that we were sent and passed on, in order.
    """

    def __init__(self, out: Path, count: int) -> None:
        self.out, self.count = out, count
        self.members: list[Member] = []
        self.forwarded: list[int] = []

    def forward(self, number: int, frame: FrameType | None) -> None:
        """Pass a signal on to all."""
        if number == signal.SIGINT and number in self.forwarded:
            number = signal.SIGKILL  # a second Ctrl-C
        self.forwarded.append(number)
        for member in self.running():
            member.process.send_signal(number)

    def running(self) -> list[Member]:
        return [m for m in self.members if m.process.poll() is None]

    def kill(self) -> list[Member]:
        """End those that still run; who they were."""
        left = self.running()
        for member in left:
            stop = os.waitid(os.P_PID, member.process.pid, os.WSTOPPED | os.WNOHANG | os.WNOWAIT)
            member.suspended = signal.Signals(stop.si_status).name if stop else None
            member.process.kill()
        for member in left:
            member.process.wait()
        return left

    def run(self, config: dict[str, Any]) -> int:
        """Start all, wait for all; where one fails, see the others off and say which it was."""
        logs = self.out / LOGS
        try:
            logs.mkdir(parents=True, exist_ok=True)
            for stack in logs.glob(STACKS.format("*")):
                stack.unlink()
            write_text(logs / "config.yaml", yaml.safe_dump(set_aside(config), sort_keys=False, allow_unicode=True))
        except OSError as error:
            raise AlignlabError(f"out={self.out}: cannot be written: {error.strerror}") from error
        port = free_port()
        self.members = [_start(rank, self.count, port, logs) for rank in range(self.count)]
        failed: list[Member] = []
        deadline = float("inf")
        while self.running() and time.monotonic() < deadline:
            time.sleep(POLL)
            failed += [m for m in self.members if m not in failed and m.process.poll()]
            if failed and deadline == float("inf"):
                asked = all(m.stopped(self.forwarded) for m in failed)
                deadline = time.monotonic() + (PATIENCE_STOPPING if asked else PATIENCE)
        killed = self.kill()
        failed += [m for m in self.members if m not in failed and m not in killed and m.process.returncode]
        return self._explain(failed, killed) if failed else 0

    def _explain(self, failed: list[Member], killed: list[Member]) -> int:
        """Say what happened, unless it has been said; the exit status.

        Args:
            failed: in the order in which they ended.
            killed: had to be ended by us.
        """
        if all(m.stopped(self.forwarded) for m in failed):
            status = failed[0].process.returncode
            return 128 + self.forwarded[0] if self.forwarded else status
        if any(m.process.returncode == StartAgain.status for m in failed):
            return StartAgain.status
        own = [m for m in failed if m.process.returncode != PeerLost.status]
        logs = self.out / LOGS
        if not own and killed:
            blamed = next((m for m in killed if m.suspended), killed[0])
            where = place(logs / STACKS.format(blamed.rank))
            fault = f"did not answer{f'; it was in {where}' if where else ''}"
            if blamed.suspended:
                fault = f"did not answer: it was suspended by {blamed.suspended}"
        else:
            # The abort of a process may be what a library does when another one is gone.
            blamed = min(own or failed, key=lambda m: m.process.returncode == -signal.SIGABRT)
            alike = [m.rank for m in own or failed if m.process.returncode == blamed.process.returncode > 0]
            if 0 in alike and own:  # has told the terminal itself
                return blamed.process.returncode
            fault = f"{blamed.ending}{f': {blamed.last_words}' if blamed.last_words else ''}"
        files = [blamed.log] if blamed.log is not None else []
        if any(stack.stat().st_size for stack in logs.glob(STACKS.format("*"))):
            files.append(logs / STACKS.format("*"))
        see = f"; see {' and '.join(map(str, files))}" if files else ""
        print(
            f"alignlab: process {blamed.rank} of {self.count} {fault}; the others were stopped{see}{self.from_where}",
            file=sys.stderr,
        )
        return blamed.process.returncode if blamed.process.returncode > 0 else 1

    @property
    def from_where(self) -> str:
        there = sorted((self.out / "checkpoints").glob("step-*"))
        return f"; the same command goes on from {there[-1].name}" if there else "; no checkpoint had been written"


def _start(rank: int, count: int, port: int, logs: Path) -> Member:
    environment = os.environ | {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(count),
        "LOCAL_WORLD_SIZE": str(count),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        STARTER: str(os.getpid()),
    }
    environment.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // count)))
    log = logs / f"rank-{rank}.log" if rank else None
    begun = log.stat().st_size if log is not None and log.exists() else 0
    file: IO[bytes] | None = log.open("ab") if log is not None else None
    process = subprocess.Popen(
        [sys.executable, "-m", "alignlab", "train", f"--from={logs / 'config.yaml'}"],
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=file,
        stderr=file,
        start_new_session=True,  # Ctrl-C reaches us, and we pass it on once
        preexec_fn=end_with_parent,
    )
    if file is not None:
        file.close()
    return Member(rank, process, log, begun)
