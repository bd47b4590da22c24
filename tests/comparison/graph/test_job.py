"""What a job of Slurm's decides when it is stopped, with stand-ins for submitit and Slurm."""

from __future__ import annotations

import signal
from collections.abc import Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from alignlab.comparison.graph import job
from alignlab.comparison.graph.job import Job
from alignlab.core import Interrupted, StartAgain
from alignlab.launch.slurm.commands import State


class Stage:
    """What the job asks and does.

    Attributes:
        state: of the job, as Slurm tells it.
        preempted: whether Slurm is about to take its place.
        again: how often it was queued again, by submitit's handler; `requeued`: by ourselves.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
        self.state, self.preempted, self.again = "RUNNING", False, 0
        self.requeued: list[str] = []
        self.outcome: BaseException | int = 0
        log = SimpleNamespace(stdout=folder / "log.out")
        environment = SimpleNamespace(JobEnvironment=lambda: SimpleNamespace(paths=log))
        monkeypatch.setitem(__import__("sys").modules, "submitit", environment)
        monkeypatch.setattr(job, "states", self.states)
        monkeypatch.setattr(job, "preempted", lambda _: self.preempted)
        monkeypatch.setattr(job, "requeue", self.requeued.append)
        monkeypatch.setattr(job, "run", self.run)
        monkeypatch.setenv("SLURM_JOB_ID", "7")
        for name in ("SLURM_ARRAY_JOB_ID", "SLURM_PROCID", "SLURM_RESTART_COUNT"):
            monkeypatch.delenv(name, raising=False)
        self.task = "7"

    def states(self, jobs: Iterable[str]) -> dict[str, State]:
        assert list(jobs) == [self.task.partition("_")[0]]
        return {self.task: State(self.state), "7_9": State("RUNNING")}

    def run(self, *_: Any, **__: Any) -> int:
        if isinstance(self.outcome, BaseException):
            raise self.outcome
        return self.outcome

    def submitits(self, number: int, frame: Any = None) -> None:
        self.again += 1

    def status(self, outcome: BaseException | int) -> Any:
        """With which it ends."""
        self.outcome = outcome
        before = {n: signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGUSR2)}
        signal.signal(signal.SIGUSR2, self.submitits)
        try:
            Job("folder", ("train",))()
        except SystemExit as end:
            return end.code
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
        return 0


@pytest.fixture
def stage(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Stage:
    return Stage(monkeypatch, tmp_path)


@pytest.mark.parametrize(
    ("name", "state", "again"),
    [
        ("SIGUSR2", "RUNNING", True),  # the time limit is near, or a preemption
        ("SIGTERM", "RUNNING", True),  # a preemption, where nothing else is said
        ("SIGTERM", "PREEMPTED", True),
        ("SIGUSR1", "RUNNING", True),  # by hand: to make room
        ("SIGTERM", "COMPLETING", False),  # cancelled, or Slurm queues it again
        ("SIGTERM", "CANCELLED", False),
    ],
)
def test_when_a_stopped_job_is_queued_again(stage: Stage, name: str, state: str, again: bool) -> None:
    stage.state = state
    assert stage.status(Interrupted(name, "saved")) == 128 + getattr(signal, name)
    assert stage.again == int(again)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR2])
def test_a_signal_outside_the_training_loop_queues_it_again_too(
    stage: Stage, number: signal.Signals, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(job, "run", lambda *_, **__: signal.raise_signal(number))
    assert stage.status(0) == 128 + number
    assert stage.again == 1


def test_a_failure_is_told_to_slurm_and_not_queued_again(stage: Stage) -> None:
    assert [stage.status(0), stage.status(2), stage.status(1)] == [0, 1, 1]
    assert stage.again == 0


def test_the_first_process_speaks_for_all(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_PROCID", "1")
    assert stage.status(Interrupted("SIGUSR2", "saved")) == 140
    assert stage.again == 0


def test_of_an_array_one_task_alone_is_asked_about(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    """The number of its last task is that of the whole array, others of which are running."""
    monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "7")
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "3")
    stage.task, stage.state = "7_3", "CANCELLED"
    stage.status(Interrupted("SIGTERM", "saved"))
    assert stage.again == 0
    stage.status(StartAgain("no memory"))
    assert stage.requeued == ["7_3"]


def test_without_memory_it_is_started_again_whichever_process_asks(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_PROCID", "2")
    assert stage.status(StartAgain("no memory")) == 75
    assert stage.requeued == ["7"]


def test_a_limit_too_short_to_begin_ends(
    stage: Stage, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("SLURM_RESTART_COUNT", "3")
    stage.status(Interrupted("SIGUSR2", "saved"))
    assert stage.again == 0 and "is launcher.timeout_min too short" in capsys.readouterr().err
    stage.preempted = True  # not its fault
    stage.status(Interrupted("SIGUSR2", "saved"))
    assert stage.again == 1
