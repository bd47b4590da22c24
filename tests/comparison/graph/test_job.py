"""What a job of Slurm's ends with, and when its batch script has it queued again."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from alignlab.comparison.graph import work
from alignlab.comparison.graph.job import AFTERWARDS, Job
from alignlab.core import Interrupted, StartAgain

JOB = "Requeue=1 JobState={} Reason=None Restarts=0"
PREEMPTED = JOB.format("RUNNING") + " PreemptEligibleTime=2026-01-01T10:00:00 PreemptTime=2026-01-01T10:00:00"
SPARED = JOB.format("RUNNING") + " PreemptEligibleTime=2026-01-01T10:00:00 PreemptTime=None"


# ------------------------------------------------------------------ the process


@pytest.mark.parametrize(
    ("outcome", "status"),
    [
        (0, None),
        (2, 1),  # Slurm's accounting is to say that it failed
        (Interrupted("SIGUSR2", "saved"), 140),
        (Interrupted("SIGTERM", "saved"), 143),
        (StartAgain("no memory"), 75),
    ],
)
def test_what_it_ends_with(outcome: Any, status: int | None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked: dict[str, Any] = {}

    def run(folder: Path, only: Any, log: Path, queued_again: bool) -> int:
        asked.update(folder=folder, only=only, log=log, queued_again=queued_again)
        assert signal.getsignal(signal.SIGUSR2) == signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
        if isinstance(outcome, BaseException):
            raise outcome
        return int(outcome)

    paths = SimpleNamespace(stdout=tmp_path / "log.out")
    monkeypatch.setitem(sys.modules, "submitit", SimpleNamespace(JobEnvironment=lambda: SimpleNamespace(paths=paths)))
    monkeypatch.setattr(work, "run", run)
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    before = {n: signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGUSR2)}
    try:
        if status is None:
            Job("folder", ("train",))()
        else:
            with pytest.raises(SystemExit) as end:
                Job("folder", ("train",))()
            assert end.value.code == status
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    assert asked == {
        "folder": Path("folder"),
        "only": ("train",),
        "log": tmp_path / "log.out",
        "queued_again": True,
    }


# ------------------------------------------------------------------ the batch script


def test_its_lines_are_those_of_the_templates() -> None:
    template = (Path(__file__).parents[3] / "slurm/one_gpu.sbatch").read_text().splitlines()
    assert [line for line in AFTERWARDS.splitlines()[1:] if line not in template] == []


def end(folder: Path, status: int, shown: str, **more: str) -> tuple[int, list[str], str]:
    """What the script ends with, which jobs it has had queued again, and what it says; srun has ended with `status`."""
    calls = folder / "calls"
    for name, script in {
        "scontrol": f'echo "$*" >>{calls}; case "$*" in *"show job"*) echo "JobId=7 $SHOWN x=y" ;; esac',
        "sleep": "exec /bin/sleep 0.01",
    }.items():
        (folder / name).write_text(f"#!/bin/bash\n{script}\n")
        (folder / name).chmod(0o755)
    environment = {k: v for k, v in os.environ.items() if not k.startswith("SLURM")}
    environment |= {"PATH": f"{folder}:{os.environ['PATH']}", "SHOWN": shown, "SLURM_JOB_ID": "7", **more}
    script = f"(exit {status})\n\n# teardown\n{AFTERWARDS}"
    done = subprocess.run(["bash", "-c", script], env=environment, capture_output=True, text=True, timeout=20)
    asked = calls.read_text().splitlines() if calls.exists() else []
    return done.returncode, [c.removeprefix("requeue ") for c in asked if c.startswith("requeue ")], done.stderr


@pytest.mark.parametrize(
    ("status", "shown", "again"),
    [
        (0, JOB.format("RUNNING"), False),
        (0, PREEMPTED, False),  # done just in time
        (1, JOB.format("RUNNING"), False),  # a failure
        (137, JOB.format("RUNNING"), False),  # killed: no memory
        (140, JOB.format("RUNNING"), True),  # stopped by USR2: the time limit is near
        (143, SPARED, True),  # by TERM
        (138, SPARED, True),  # by USR1: by hand, to make room
        (75, JOB.format("RUNNING"), True),  # asks for a new start
        (140, JOB.format("COMPLETING"), False),  # cancelled, or Slurm queues it again
        (143, JOB.format("CANCELLED"), False),
        (143, JOB.format("RUNNING").replace("Restarts=0", "Restarts=1"), False),  # elsewhere: this node was given up
        (12, PREEMPTED, True),  # before Python listened: srun says 12
    ],
)
def test_when_a_job_is_queued_again(tmp_path: Path, status: int, shown: str, again: bool) -> None:
    found, jobs, said = end(tmp_path, status, shown)
    assert (found, jobs) == (status, ["7"] if again else [])
    assert ("goes on from its checkpoint" in said) == again


def test_of_an_array_one_task_alone_is_queued_again(tmp_path: Path) -> None:
    found = end(tmp_path, 140, JOB.format("RUNNING"), SLURM_ARRAY_JOB_ID="7", SLURM_ARRAY_TASK_ID="3")
    assert found[:2] == (140, ["7_3"])


def test_a_limit_too_short_to_begin_ends(tmp_path: Path) -> None:
    shown = SPARED.replace("Restarts=0", "Restarts=3")
    found, jobs, said = end(tmp_path, 140, shown, SLURM_RESTART_COUNT="3")
    assert (found, jobs) == (140, []) and "is --time too short for --signal?" in said
    preempted = PREEMPTED.replace("Restarts=0", "Restarts=3")
    assert end(tmp_path, 140, preempted, SLURM_RESTART_COUNT="3")[1] == ["7"]  # not its fault
