"""Two at work on one run, as where a node is lost whose processes live on: the last to begin has it."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import torch

from alignlab.core import AlignlabError
from alignlab.training.callbacks.run_lock import OWNER, RunLock
from tests.slurm import pace
from tests.training import forks, runs

STEPS = 16


def words(folder: Path, out: str) -> list[str]:
    slow = "scoring.function.path=tests.slurm.pace.count_of_a"
    more = [
        slow,
        "training.batch_size=4",
        "source.rollout_batch_size=4",
        f"training.steps={STEPS}",
        "training.checkpoint_every=2",
    ]
    return ["train", *runs.words_for(folder, "rejection_sampling", out, *more)]


def test_the_last_to_begin_has_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runs.prepare(tmp_path)
    hold = tmp_path / "hold"
    monkeypatch.setenv(pace.HOLD, str(hold))
    assert forks.wait(forks.fork(forks.command(words(tmp_path, "alone")), tmp_path / "alone.log")) == 0
    hold.write_text("0.03")  # seconds for each of a step's twelve responses
    first = forks.fork(forks.command(words(tmp_path, "run")), tmp_path / "first.log")
    metrics = tmp_path / "run/metrics.jsonl"
    end = time.monotonic() + 60
    while not metrics.exists() or metrics.read_text().count("\n") < 3:
        assert time.monotonic() < end, (tmp_path / "first.log").read_text()
        time.sleep(0.05)
    second = forks.fork(forks.command(words(tmp_path, "run")), tmp_path / "second.log")
    assert forks.wait(first) == 2
    said = (tmp_path / "first.log").read_text()
    assert f"alignlab: {tmp_path}/run: process {second} on " in said
    assert "has begun to work on this run since" in said
    assert forks.wait(second) == 0
    assert "Traceback" not in said + (tmp_path / "second.log").read_text()
    alone, run = runs.weights(tmp_path, "alone"), runs.weights(tmp_path, "run")
    assert all(torch.equal(alone[name], run[name]) for name in alone)
    assert sorted(tmp_path.glob("run/checkpoints/step-*"))[-1].name.endswith(str(STEPS))


def test_who_has_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = RunLock(tmp_path), RunLock(tmp_path)
    first.take()
    first.check()
    second.take()
    second.check()
    first.on_step(None)  # not yet
    monkeypatch.setattr("alignlab.training.callbacks.run_lock.EVERY", 0.0)
    second.on_step(None)
    with pytest.raises(AlignlabError, match="has begun to work on this run since"):
        first.on_step(None)
    (tmp_path / OWNER).unlink()
    first.check()  # nobody else's
