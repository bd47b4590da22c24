"""Small sweeps, run in this process or in a forked one that can be killed."""

from __future__ import annotations

import csv
import json
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from alignlab.cli import main
from tests.training import forks, runs

SWEEP = ["training.steps=6", "training.progress=off", "training.checkpoint_every=1"]


def words(home: Path, out: str, *more: str, algorithm: str = "dpo") -> list[str]:
    return ["train", "-m", *runs.words_for(home, algorithm, out, *SWEEP, *more)]


def sweep(home: Path, out: str, *more: str, algorithm: str = "dpo") -> int:
    """Its exit status."""
    return main(words(home, out, *more, algorithm=algorithm))


def table(folder: Path) -> dict[str, dict[str, str]]:
    """sweep.csv, by run."""
    with (folder / "sweep.csv").open() as file:
        return {row["run"]: row for row in csv.DictReader(file)}


def told(folder: Path) -> dict[str, Any]:
    found = json.loads((folder / "sweep.json").read_text())
    assert isinstance(found, dict)
    return found


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def killed(words: list[str], when: Callable[[], bool], log: Path, number: int = signal.SIGKILL) -> int:
    """Begin a command in a process of its own, and send it a signal once something is so; its exit status."""
    pid = forks.fork(forks.command(words), log)
    deadline = time.monotonic() + 120
    while not when():
        assert time.monotonic() < deadline
        time.sleep(0.005)
    os.kill(pid, number)
    return forks.wait(pid)
