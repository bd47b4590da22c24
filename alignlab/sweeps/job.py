"""What a launcher calls for each combination, in whichever process: it never raises for what is the run's own fault."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from omegaconf import DictConfig

from alignlab.comparison.graph import last_words
from alignlab.core import AlignlabError, Interrupted
from alignlab.core.children import end_with_parent
from alignlab.core.memory import release_memory
from alignlab.launch.slurm.commands import states
from alignlab.launch.start import HANDLED, Failed
from alignlab.sweeps.state import FAILED, failed
from alignlab.training.distributed.watchdog import LOGS

LOG, PROCESS = "log.txt", "process"
"""In a run's folder: what it wrote, where it has no terminal, and the number of its process while that lives."""

STOP = ".stop"
"""In a sweep's folder, while it stops: runs apart are to save and end, and no other is to begin."""

POLL = 0.2
"""Seconds between looks at a run apart."""


class Stopped(BaseException):
    """The sweep was asked to stop. No `Exception`: with those, launchers go on to the next run."""

    def __init__(self, stop: Interrupted) -> None:
        super().__init__(str(stop))
        self.stop = stop


@dataclass(frozen=True)
class Job:
    """Trains or compares as a config says, in the folder that it names.

    Attributes:
        command: train or compare.
        own: a folder of the user's configs.
        where: `here`: in this process; `apart`: in one of its own, so that what kills a run kills nothing else;
            `slurm`: in this one, which submitit has started in a job, perhaps with others of the same run.
    """

    command: str
    own: Path | None
    where: Literal["here", "apart", "slurm"]

    def __call__(self, config: DictConfig) -> None:
        from alignlab.config import resolve

        plain = resolve(config)
        folder = Path(plain["out"])
        folder.mkdir(parents=True, exist_ok=True)
        is_main = os.environ.get("SLURM_PROCID", "0") == "0" or self.where != "slurm"
        if is_main:
            (folder / FAILED).unlink(missing_ok=True)
        try:
            if self.where == "apart":
                self._apart(folder)
                return
            if self.where == "slurm" and int(os.environ.get("SLURM_RESTART_COUNT", "0")) and self.command == "train":
                plain["training"]["resume"] = "auto"  # was started anew before it was queued again
            self._run(plain, folder)
        except Interrupted as stop:
            if self.where == "slurm":
                queue_again(stop.signal)
            raise Stopped(stop) from stop
        except Failed as failure:  # one of its processes, which has said why
            self._fail(folder, str(failure), is_main, folder / LOGS)
        except AlignlabError as error:
            self._fail(folder, str(error), is_main)
        except Exception as error:  # a fault of ours, or of a class of the user's: the others go on
            (folder / "error.txt").write_text(traceback.format_exc())
            lines = [line.strip() for line in str(error).splitlines() if line.strip()]
            self._fail(folder, f"{type(error).__name__}: {lines[0] if lines else '?'}", is_main, folder / "error.txt")
        release_memory()

    def _run(self, config: dict[str, Any], folder: Path) -> None:
        if self.command == "train":
            from alignlab.launch.start import train

            try:
                train(config, folder)
            except Failed as failure:
                number = failure.status - 128
                if number in HANDLED:  # its processes were asked to stop
                    raise Interrupted(signal.Signals(number).name, "a checkpoint is saved") from failure
                raise
            return
        from alignlab.comparison.compare import compare

        if compare(config, folder, self.own):
            raise AlignlabError("parts of the comparison failed: see the logs in its folder")

    def _fail(self, folder: Path, reason: str, is_main: bool, log: Path | None = None) -> None:
        if self.where == "slurm":
            print(f"alignlab: {reason}", file=sys.stderr, flush=True)  # its log
            log = log or _slurm_log()
        if is_main:
            failed(folder, reason, log or "")
        if self.where == "slurm":
            sys.exit(1)  # Slurm's accounting is to say that it failed

    def _apart(self, folder: Path) -> None:
        """Run it in a process of its own, which ends with this one: it saves where it can."""
        from hydra.core.hydra_config import HydraConfig

        signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the sweep too, which sees to it
        end_with_parent(signal.SIGKILL)
        stop = folder.parent / STOP
        if stop.exists():
            return
        options = [] if self.own is None else ["--config-dir", str(self.own)]
        words = [sys.executable, "-m", "alignlab", self.command, *options, *HydraConfig.get().overrides.task]
        log = folder / LOG
        with log.open("ab") as file:
            process = subprocess.Popen(
                words,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                preexec_fn=end_with_parent,
            )
        (folder / PROCESS).write_text(f"{socket.gethostname()} {process.pid}\n")
        told = False
        while process.poll() is None:
            time.sleep(POLL)
            if not told and stop.exists():
                told = True
                process.terminate()
        status = process.returncode
        (folder / PROCESS).unlink(missing_ok=True)
        if status < 0 and -status not in HANDLED:
            failed(folder, f"ended by {signal.Signals(-status).name}", log)
        elif status > 0 and status - 128 not in HANDLED:
            failed(folder, last_words(log) or f"ended with status {status}", log)


def at_work(folder: Path) -> int | None:
    """The process of this machine that works in a folder; left behind, where its sweep was killed."""
    try:
        host, number = (folder / PROCESS).read_text().split()
        os.kill(int(number), 0)
    except (OSError, ValueError):
        return None
    command = Path(f"/proc/{number}/cmdline")
    ours = not command.exists() or b"alignlab" in command.read_bytes()
    return int(number) if ours and host == socket.gethostname() else None


def queue_again(name: str) -> None:
    """In a job of submitit's, once a checkpoint is saved: have the job queued again, unless it was cancelled.

    Of preemption some clusters tell by SIGTERM alone, as `scancel` does; but then Slurm no longer holds the job for
    running. All but the first of a run's processes just end: the first one speaks for all.
    """
    number = signal.Signals[name].value
    if os.environ.get("SLURM_PROCID", "0") != "0":
        raise SystemExit(128 + number)
    if name != "SIGUSR2" and not _runs():
        raise SystemExit(128 + number)
    signal.raise_signal(signal.SIGUSR2)  # submitit's own handler, in place again, queues the job and ends the process
    raise SystemExit(128 + number)


def _runs() -> bool:
    """Whether Slurm still means this job, or this task of an array, to run."""
    job, array = os.environ["SLURM_JOB_ID"], os.environ.get("SLURM_ARRAY_JOB_ID")
    task = f"{array}_{os.environ['SLURM_ARRAY_TASK_ID']}" if array else job  # whose job id may be the whole array's
    try:
        found = states([array or job]).get(task)
    except AlignlabError as error:
        print(f"alignlab: {error}", file=sys.stderr)
        return False
    return found is not None and found.state in ("RUNNING", "SUSPENDED", "PREEMPTED")


def _slurm_log() -> Path | None:
    import submitit

    try:
        return Path(submitit.JobEnvironment().paths.stdout)
    except (RuntimeError, KeyError):
        return None
