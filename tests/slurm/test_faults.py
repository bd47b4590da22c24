"""What goes wrong on a real Slurm: nodes that fail, jobs that fail or are cancelled, requests that cannot be met."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from tests.slurm.conftest import Slurm, until
from tests.slurm.job import SMALL, STEPS, TEMPLATES, Run
from tests.training import runs

pytestmark = pytest.mark.component


# ------------------------------------------------------------------ nodes


def taken_down(slurm: Slurm, job: str) -> None:
    """By an administrator, or a health check."""
    slurm.run("scontrol", "update", "nodename=node1", "state=down", "reason=test")


def without_power(slurm: Slurm, job: str) -> None:
    """The node's daemon is gone, those that watch over the job, and the job's processes, all at once."""
    pids = [int((slurm.folder() / "run" / "slurmd.node1.pid").read_text())]
    for folder in Path("/proc").iterdir():
        with suppress(OSError, ValueError):
            words = (folder / "cmdline").read_bytes()
            values = (folder / "environ").read_bytes().split(b"\0")
            if words.startswith(f"slurmstepd: [{job}.".encode()) or f"SLURM_JOB_ID={job}".encode() in values:
                pids.append(int(folder.name))
    assert len(pids) > 3
    for pid in pids:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


@pytest.fixture
def mended(slurm: Slurm) -> Iterator[None]:
    """Afterwards all nodes are there again."""
    yield
    slurm.restore()


@pytest.mark.parametrize("fails", [taken_down, without_power])
def test_a_node_that_fails(slurm: Slurm, tmp_path: Path, mended: None, fails: Callable[[Slurm, str], None]) -> None:
    """The run goes on, on the other node, from its last checkpoint, and ends as if nothing had happened."""
    runs.prepare(tmp_path)
    more = [
        "training.batch_size=4",
        "source.rollout_batch_size=4",
        f"training.steps={STEPS}",
        "training.checkpoint_every=5",
    ]
    runs.train(tmp_path, "rejection_sampling", "undisturbed", *more, "training.progress=off")
    with slurm.configured(SlurmdTimeout="8", ReturnToService="0"):  # down after 8 s without an answer, and for good
        run = Run(slurm, tmp_path, "run", "one_gpu", "training.checkpoint_every=5").submit("--gres=gpu:1", seconds=0.1)
        run.reach(7)
        fails(slurm, run.job)
        until(lambda: slurm.show(run.job)["Restarts"] == "1", 60, lambda: f"queued again: {slurm.show(run.job)}")
        run.finish()
    history = slurm.history(run.job)
    assert [(h["State"], h["NodeList"]) for h in history] == [("NODE_FAIL", "node1"), ("COMPLETED", "node2")]
    assert "checkpoint of step" not in run.said()  # there was no time to save
    assert run.steps() == [*range(1, STEPS + 1)]
    assert runs.identical(runs.weights(tmp_path, "undisturbed"), run.weights())


# ------------------------------------------------------------------ jobs, with a stand-in for alignlab


ALIGNLAB = """#!/bin/bash
# as `python -m alignlab`: the last word says what it does
case ${@: -1} in
  fails) [ "${SLURM_PROCID:-0}" = 0 ] && sleep 300; exit 2 ;;
  trains) trap 'exit 143' TERM; trap 'exit 138' USR1; echo "listens $SLURM_RESTART_COUNT"
          [ "${SLURM_RESTART_COUNT:-0}" = 0 ] && for _ in {1..600}; do sleep 0.1; done; exit 0 ;;
esac
"""


@pytest.fixture
def quick(slurm: Slurm, tmp_path: Path) -> Callable[..., str]:
    """Submits a template with the stand-in: `quick("one_gpu", "fails")`."""
    (tmp_path / "python").write_text(ALIGNLAB)
    (tmp_path / "python").chmod(0o755)

    def submit(template: str, act: str, *options: str) -> str:
        path = f"{tmp_path}:{os.environ['PATH']}"
        words = (*SMALL, "--gres=gpu:1", f"--output={tmp_path}/%A_%a.log", *options, f"{TEMPLATES}/{template}.sbatch")
        return slurm.sbatch(*words, act, PATH=path)

    return submit


def test_a_failure_ends_the_job_on_all_nodes(slurm: Slurm, quick: Callable[..., str]) -> None:
    """The second node's task fails while the first one's waits for it: both are ended, and nothing is queued again."""
    begun = time.monotonic()
    job = quick("many_nodes", "fails")
    assert slurm.wait(job, timeout=60) == "FAILED"
    assert time.monotonic() - begun < 40
    assert [h["State"] for h in slurm.history(job)] == ["FAILED"]


def test_a_cancelled_job_is_not_queued_again(slurm: Slurm, quick: Callable[..., str], tmp_path: Path) -> None:
    """Its processes get TERM as at a preemption, and end with the same status."""
    job = quick("one_gpu", "trains")
    until(lambda: any("listens" in p.read_text() for p in tmp_path.glob("*.log")), 30, "the job listens")
    slurm.run("scancel", job)
    assert slurm.wait(job, timeout=30) == "CANCELLED"
    until(lambda: not slurm.run("squeue", "-h", "-j", job, check=False).stdout, 30, "the job is gone")
    assert [h["State"].split(" ")[0] for h in slurm.history(job)] == ["CANCELLED"]


def test_one_task_of_an_array_is_queued_again_alone(slurm: Slurm, quick: Callable[..., str], tmp_path: Path) -> None:
    """Two of three at a time; the last, whose number is that of the array, is told to stop."""
    job = quick("one_gpu", "trains", "--array=1-3%2")
    logs = [tmp_path / f"{job}_{i}.log" for i in (1, 2, 3)]
    until(lambda: all(p.exists() and "listens" in p.read_text() for p in logs[:2]), 30, "two tasks listen")
    assert not logs[2].exists()  # they are as many as may go at a time
    slurm.run("scancel", f"{job}_2")
    until(lambda: logs[2].exists() and "listens" in logs[2].read_text(), 30, "the third follows")
    slurm.run("scancel", "--batch", "--signal=USR1", f"{job}_3")
    until(lambda: "listens 1" in logs[2].read_text(), 60, lambda: f"it goes on: {logs[2].read_text()}")
    assert "listens 1" not in logs[0].read_text() and slurm.show(f"{job}_1")["JobState"] == "RUNNING"
    slurm.run("scancel", job)


# ------------------------------------------------------------------ requests


@pytest.mark.parametrize(
    ("option", "said"),
    [
        ("--partition=nowhere", "invalid partition specified: nowhere"),
        ("--account=nobody", "Invalid account or account/partition combination specified"),
        ("--gres=gpu:99", "Requested node configuration is not available"),
    ],
)
def test_what_slurm_does_not_have_is_refused_at_once(slurm: Slurm, option: str, said: str) -> None:
    found = slurm.run("sbatch", option, f"{TEMPLATES}/one_gpu.sbatch", "train", check=False)
    assert found.returncode == 1 and said in found.stderr


def test_an_account_that_exists(slurm: Slurm, quick: Callable[..., str]) -> None:
    job = quick("one_gpu", "nothing", "--account=research")
    assert slurm.wait(job, timeout=60) == "COMPLETED"
