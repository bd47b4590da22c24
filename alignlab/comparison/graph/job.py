"""What a job of Slurm's runs: the commands of one node, in the processes that submitit has started for them.

A job that comes near its time limit gets USR2, one that is preempted USR2 or TERM, one that is cancelled TERM. The
training loop then saves within its step. In the first two cases the job is queued again, by submitit, and goes on.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from alignlab.comparison.graph.work import run
from alignlab.core import AlignlabError, Interrupted, StartAgain
from alignlab.launch.slurm.commands import preempted, requeue, states

MANY, SOON = 3, 60.0
"""A job that has been queued again so many times, and is stopped again so many seconds after its start, ends."""


@dataclass(frozen=True)
class Job:
    """Runs the commands of a node in its folder.

    Attributes:
        commands: their names.
    """

    folder: str
    commands: tuple[str, ...]

    def __call__(self) -> None:
        import submitit

        restarts, begun = int(os.environ.get("SLURM_RESTART_COUNT", "0")), time.monotonic()
        submitits = signal.getsignal(signal.SIGUSR2)

        def stopped(number: int, frame: FrameType | None = None) -> None:
            """Before the training loop listens, and after; and for commands that have nothing to save."""
            early = restarts >= MANY and time.monotonic() - begun < SOON
            queue_again(signal.Signals(number).name, submitits, early)

        for number in (signal.SIGTERM, signal.SIGUSR2):
            signal.signal(number, stopped)
        log = Path(submitit.JobEnvironment().paths.stdout)
        try:
            status = run(Path(self.folder), self.commands, log, queued_again=restarts > 0)
        except Interrupted as stop:
            print(f"alignlab: {stop}", file=sys.stderr, flush=True)
            stopped(getattr(signal, stop.signal))
        except StartAgain as error:  # whichever process it is that asks for it
            print(f"alignlab: {error}", file=sys.stderr, flush=True)
            requeue(_task())
            raise SystemExit(StartAgain.status) from error
        else:
            if status:
                sys.exit(1)  # Slurm's accounting is to say that it failed

    def checkpoint(self) -> Any:
        """What submitit has the job do when it is queued again: the same."""
        import submitit

        return submitit.helpers.DelayedSubmission(self)


def queue_again(name: str, submitits: Any, early: bool) -> None:
    """Once a checkpoint is saved: have the job queued again, unless it was cancelled; and end this process.

    Of preemption some clusters tell by TERM alone, as `scancel` does; but then Slurm no longer holds the job for
    running. All but the first of a run's processes just end: the first one speaks for all.

    Args:
        name: of the signal that it was told by.
        submitits: submitit's handler of USR2, which queues the job again.
        early: it has been stopped soon after its start again and again.
    """
    number = getattr(signal, name)
    if os.environ.get("SLURM_PROCID", "0") != "0" or (name != "SIGUSR2" and not _is_wanted()):
        raise SystemExit(128 + number)
    if early and name == "SIGUSR2" and not preempted(_task()):
        said = "stops within a minute of its start, again and again: is launcher.timeout_min too short for "
        print(f"alignlab: this job {said}launcher.signal_delay_s?", file=sys.stderr, flush=True)
        raise SystemExit(128 + number)
    submitits(number, None)
    raise SystemExit(128 + number)


def _task() -> str:
    """This job, or this task of an array, whose SLURM_JOB_ID may be that of the whole array."""
    array = os.environ.get("SLURM_ARRAY_JOB_ID")
    return f"{array}_{os.environ['SLURM_ARRAY_TASK_ID']}" if array else os.environ["SLURM_JOB_ID"]


def _is_wanted() -> bool:
    """Whether Slurm still means it to run."""
    try:
        found = states([_task().partition("_")[0]]).get(_task())
    except AlignlabError as error:
        print(f"alignlab: {error}", file=sys.stderr)
        return False
    return found is not None and found.state in ("RUNNING", "SUSPENDED", "PREEMPTED")
