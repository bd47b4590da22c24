"""Runs of several processes under our own starter, whose processes are forks: they begin at once."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import IO, Any

import pytest

from alignlab.config import compose, resolve
from alignlab.launch import start as starter
from tests.training import forks, runs


class Popen(forks.Forked):
    """Stands in for `subprocess.Popen` of the interpreter: a fork that runs the command."""

    def __init__(self, words: Sequence[str], env: dict[str, str], stdout: IO[bytes] | None, **_options: Any) -> None:
        assert list(words[1:3]) == ["-m", "alignlab"]

        def act() -> None:
            from accelerate.state import AcceleratorState

            from alignlab.cli import main

            for number in starter.HANDLED:
                signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
            os.setsid()
            logging.getLogger().handlers.clear()  # pytest's, which would keep for itself what people should see
            os.environ.update(env)
            AcceleratorState._reset_state(reset_partial_state=True)
            raise SystemExit(main(list(words[3:])))

        self.pid = forks.fork(act, Path(os.readlink(f"/proc/self/fd/{stdout.fileno()}")) if stdout else None)


def start(folder: Path, algorithm: str, out: str, *more: str, processes: int = 2) -> int:
    """Run to the end; the exit status."""
    config = resolve(compose("train", runs.words_for(folder, algorithm, out, *more)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(starter, "subprocess", SimpleNamespace(Popen=Popen, DEVNULL=subprocess.DEVNULL))
        return starter.start(config, folder / out, processes)


def once(rank: int, marker: Path, act: Callable[[], object]) -> bool:
    """Do something in one process, and only the first time that any process comes here; whether it was done."""
    if os.environ.get("RANK") != str(rank) or marker.exists():
        return False
    marker.write_text(f"{time.time()}")
    act()
    return True


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def since(marker: Path) -> float:
    """Seconds since it was done."""
    return time.time() - float(marker.read_text())
