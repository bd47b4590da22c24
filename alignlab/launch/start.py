"""The processes of a distributed run on this machine: started as torchrun starts them, watched, ended together."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import IO, Any

import yaml

from alignlab.core import AlignlabError, ConfigError
from alignlab.core.files import write_text
from alignlab.training.processes import launched
from alignlab.training.settings import DistributedSettings

LOGS = "logs"
"""In the run's folder: what the processes other than the first one said, `rank-N.log`."""

POLL = 0.1
"""Seconds between looks at the processes."""

PATIENCE = 5.0
"""Seconds that the others have to end by themselves once one of a run's processes has failed."""

ECHO = "another process of this run has stopped"
"""How a process says that it is not the one to blame."""


@dataclass
class Member:
    """One of the processes.

    Attributes:
        log: where it writes, unless that is the terminal; `begun` is where its words of this time start.
    """

    rank: int
    process: subprocess.Popen[bytes]
    log: Path | None
    begun: int = 0

    @property
    def last_words(self) -> str:
        """The last error it reported, or its last line."""
        if self.log is None:
            return ""
        text = self.log.read_bytes()[self.begun :].decode(errors="replace")
        lines = [line.strip() for line in text.splitlines() if line.strip()]
        said = next((line for line in reversed(lines) if line.startswith("alignlab:")), lines[-1] if lines else "")
        return said.removeprefix("alignlab: ")

    @property
    def ending(self) -> str:
        code = self.process.returncode
        return f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with status {code}"


def train(config: dict[str, Any], out: Path) -> dict[str, Any] | None:
    """Train in this process, or in as many as `distributed` asks for where no launcher has started any.

    Returns:
        The result, or None where processes of its own did the work: it is in `out/result.json`.

    Raises:
        Failed: one of the processes failed; what there was to say has been said.
    """
    from alignlab.build import section

    distributed = section(DistributedSettings, config["distributed"], "distributed")
    if distributed.mode == "single" or launched() is not None:
        from alignlab.training.run import train as run

        return run(config, out)
    status = start(config, out, _count(distributed))
    if status:
        raise Failed(status)
    return None


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

    The first one has the terminal. When one fails the others end within seconds, and the one to blame is named.
    """
    logs = out / LOGS
    try:
        logs.mkdir(parents=True, exist_ok=True)
        write_text(logs / "config.yaml", yaml.safe_dump(config, sort_keys=False, allow_unicode=True))
    except OSError as error:
        raise AlignlabError(f"out={out}: cannot be written: {error.strerror}") from error
    port = _free_port()
    members = [_start(rank, count, port, logs) for rank in range(count)]
    forwarded: list[int] = []

    def forward(number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and number in forwarded:
            number = signal.SIGKILL  # a second Ctrl-C
        forwarded.append(number)
        for member in members:
            if member.process.poll() is None:
                member.process.send_signal(number)

    handled = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
    former = {number: signal.signal(number, forward) for number in handled}
    try:
        return _watch(members, forwarded, out)
    finally:
        for member in members:
            if member.process.poll() is None:
                member.process.kill()
                member.process.wait()
        for number, handler in former.items():
            signal.signal(number, handler)


def _start(rank: int, count: int, port: int, logs: Path) -> Member:
    environment = os.environ | {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(count),
        "LOCAL_WORLD_SIZE": str(count),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
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
    )
    if file is not None:
        file.close()
    return Member(rank, process, log, begun)


def _watch(members: list[Member], forwarded: list[int], out: Path) -> int:
    """Wait for all; where one fails, see the others off and say which it was."""
    failed: list[Member] = []
    deadline = float("inf")
    while any(m.process.poll() is None for m in members):
        failed += [m for m in members if m not in failed and m.process.returncode]
        if failed and deadline == float("inf"):
            deadline = time.monotonic() + PATIENCE
        if time.monotonic() > deadline and not forwarded:
            for member in members:
                if member.process.poll() is None:
                    member.process.kill()
                    member.process.wait()
            break
        time.sleep(POLL)
    failed += [m for m in members if m not in failed and m.process.returncode and time.monotonic() < deadline]
    if not failed:
        return 0
    stopped = {128 + number for number in forwarded}
    if stopped and all(m.process.returncode in stopped for m in failed):
        return failed[0].process.returncode
    blamed = _to_blame(failed)
    if blamed.rank == 0 and blamed.process.returncode > 0:  # has told the terminal itself
        return blamed.process.returncode
    said = f": {blamed.last_words}" if blamed.last_words else ""
    there = sorted((out / "checkpoints").glob("step-*"))
    last = f"; the same command goes on from {there[-1].name}" if there else "; no checkpoint had been written"
    print(
        f"alignlab: process {blamed.rank} of {len(members)} {blamed.ending}{said}; the others were stopped{last}"
        f" (log: {blamed.log or 'above'})",
        file=sys.stderr,
    )
    return blamed.process.returncode if blamed.process.returncode > 0 else 1


def _to_blame(failed: list[Member]) -> Member:
    """Whose failure came first: not of those who only noticed that another was gone."""
    killed = [m for m in failed if m.process.returncode < 0]
    own = [m for m in failed if m.last_words and ECHO not in m.last_words]
    return (killed or own or failed)[0]


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])
