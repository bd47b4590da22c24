"""wandb absent, dying, or without a login: it stops no run."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from alignlab.training.callbacks.logging import MetricsLog
from alignlab.training.callbacks.trackers import Wandb

ROOT = Path(__file__).parents[3]


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_without_wandb_training_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    with MetricsLog(tmp_path, Wandb(mode="online"), {}) as tracker:
        for step in range(1, 4):
            tracker.log(step, {"loss": 1.0})
    assert [line["step"] for line in lines(tmp_path)] == [1, 2, 3]
    (record,) = caplog.records
    assert record.levelno == logging.ERROR
    assert "wandb failed: ModuleNotFoundError" in record.getMessage()
    assert "The work goes on" in record.getMessage()


def run_python(code: str, folder: Path, **streams: Any) -> subprocess.CompletedProcess[str]:
    """In a process of its own, since wandb keeps its state in the process."""
    command = [sys.executable, "-c", code, str(folder)]
    return subprocess.run(command, cwd=ROOT, timeout=60, text=True, **streams)


@pytest.mark.component
def test_wandb_dying_in_the_middle_does_not_stop_training(tmp_path: Path, wandb_here: None) -> None:
    code = """
import sys, pathlib, psutil
from alignlab.training.callbacks.logging import MetricsLog
from alignlab.training.callbacks.trackers import Wandb
with MetricsLog(pathlib.Path(sys.argv[1]), Wandb(mode="offline"), {}) as tracker:
    tracker.log(1, {"loss": 1.0})
    children = psutil.Process().children(recursive=True)
    assert any("wandb" in child.name() for child in children)
    for child in children:
        child.kill()
    psutil.wait_procs(children)
    for step in range(2, 100):
        tracker.log(step, {"loss": 1.0})
"""
    done = run_python(code, tmp_path, capture_output=True)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("wandb failed") == 1
    assert [line["step"] for line in lines(tmp_path)] == list(range(1, 100))


def read_to_the_end(terminal: int) -> str:
    """All that is written to a pseudo-terminal until its other side is closed, which Linux reports as an error."""
    said = b""
    try:
        while chunk := os.read(terminal, 10_000):
            said += chunk
    except OSError:
        pass
    return said.decode()


@pytest.mark.component
def test_without_a_login_wandb_asks_nothing_even_on_a_terminal(
    tmp_path: Path, wandb_here: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Left to itself it would wait for an answer, for ever."""
    monkeypatch.delenv("WANDB_SILENT")
    monkeypatch.setenv("TERM", "xterm")
    code = """
import sys, pathlib
from alignlab.training.callbacks.logging import MetricsLog
from alignlab.training.callbacks.trackers import Wandb
stdin = sys.stdin
assert stdin.isatty() and sys.stderr.isatty()
with MetricsLog(pathlib.Path(sys.argv[1]), Wandb(mode="online"), {}) as tracker:
    tracker.log(1, {"loss": 1.0})
assert sys.stdin is stdin
"""
    ours, theirs = os.openpty()
    with ThreadPoolExecutor(1) as pool:
        reading = pool.submit(read_to_the_end, ours)
        try:
            done = run_python(code, tmp_path, stdin=theirs, stderr=theirs, stdout=theirs)
        finally:
            os.close(theirs)
        said = reading.result()
    os.close(ours)
    assert done.returncode == 0, said
    assert "wandb failed" in said
    assert "wandb login" in said
    assert "Enter your choice" not in said
    assert [line["step"] for line in lines(tmp_path)] == [1]
