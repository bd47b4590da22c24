"""Hands combinations to Hydra's launchers, and shows how many have come to an end while they work."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

from alignlab.comparison.planning import quoted
from alignlab.core import AlignlabError, ConfigError, Interrupted
from alignlab.core.progress import console, progress
from alignlab.launch.slurm.settings import SlurmSettings
from alignlab.sweeps import slurm
from alignlab.sweeps.combinations import Combination, Composer
from alignlab.sweeps.job import STOP, Job, Stopped, at_work
from alignlab.sweeps.settings import JoblibSettings, Launcher
from alignlab.sweeps.state import FAILED, begin, failed, is_over, standing

POLL = 0.3
"""Seconds between looks at the folders."""

PATIENCE = 120.0
"""Seconds that runs which a killed sweep has left behind have to save."""

STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)

GOES_ON = "the same command goes on with what is not finished"

Describe = Callable[[Path], str]
"""What is said of the run in a folder that has ended, as in "eval/loss 1.234"."""


def say(text: str, style: str = "") -> None:
    console().print(text, style=style, markup=False, highlight=False, soft_wrap=True)


def hydra_words(settings: Launcher) -> list[str]:
    """What chooses Hydra's launcher."""
    if isinstance(settings, SlurmSettings):
        return ["hydra/launcher=submitit_slurm"]  # its settings follow when the runs are known
    if isinstance(settings, JoblibSettings):
        return ["hydra/launcher=joblib", f"hydra.launcher.n_jobs={settings.n_jobs}"]
    return ["hydra/launcher=basic"]


class Launch:
    """Called with combinations, sees each to its end: finished, pruned or failed.

    Args:
        describe: what is said of a run that has ended.
    """

    def __init__(self, composer: Composer, settings: Launcher, describe: Describe) -> None:
        from hydra._internal.callbacks import Callbacks
        from hydra.core.plugins import Plugins
        from hydra.types import HydraContext

        self.composer, self.settings, self.describe = composer, settings, describe
        self.command, self.own = composer.command, composer.own
        where: Any = {"slurm": "slurm", "joblib": "apart"}.get(settings.kind, "here")
        self.launcher = Plugins.instance().instantiate_launcher(
            hydra_context=HydraContext(config_loader=composer.loader, callbacks=Callbacks()),
            task_function=Job(self.command, self.own and self.own.resolve(), where),
            config=composer.master,
        )
        self.launched = 0

    def __call__(
        self,
        combinations: Sequence[Combination],
        prepare: Callable[[Combination], None] | None = None,
        before: int = 0,
        total: int | None = None,
    ) -> None:
        """
        Args:
            prepare: called before a run is launched, once its folder is there.
            before: how many there have been already, of a search.
            total: how many there are to be in all; by default, these.

        Raises:
            Stopped: the sweep was asked to stop.
            AlignlabError: the launcher cannot launch anything.
        """
        jobs = slurm.Jobs(self.composer.folder)
        busy = jobs.active([c.name for c in combinations], required=isinstance(self.settings, SlurmSettings))
        with _stopping(GOES_ON):
            left = self._left(combinations, busy)
        if busy and not isinstance(self.settings, SlurmSettings):
            name, job = next(iter(busy.items()))
            raise AlignlabError(f"{name}: Slurm job {job} is at work on it: wait for it, or scancel {job}, then repeat")
        if not left and not busy:
            return
        waited = [*left, *(c for c in combinations if c.name in busy)]
        for combination in left:
            begin(combination.folder, combination.config.get("training", {}).get("resume") == "never")
            if prepare is not None:
                prepare(combination)
        words = [[*c.words, f"hydra.sweep.subdir={quoted(c.name)}"] for c in left]
        first, self.launched = self.launched, self.launched + len(left)
        with Watch(self.command, waited, self.describe, before, total) as watch:
            if isinstance(self.settings, SlurmSettings):
                if left:
                    found = slurm.submit(self.launcher, self.settings, self.command, left, words, first)
                    jobs.add(found)
                self._wait(jobs, watch)
            else:
                self._here(words, first, left)

    def _left(self, combinations: Sequence[Combination], busy: dict[str, str]) -> list[Combination]:
        """Those that are to be launched. What cannot be right is noted as failed at once."""
        from alignlab.training.run import check

        looked = progress(combinations, "looking for what is finished", len(combinations))
        over = [c for c in looked if is_over(self.command, c, self.own)]
        for combination in over:
            (combination.folder / FAILED).unlink(missing_ok=True)
        if over:
            say(f"{len(over)} of {len(combinations)} runs are already finished")
        left = []
        for combination in combinations:
            if combination in over or combination.name in busy:
                continue
            try:
                if self.command == "train":
                    check(combination.config)
                    if isinstance(self.settings, SlurmSettings):
                        slurm.tasks(self.settings, combination.config)
                left.append(combination)
            except ConfigError as error:
                failed(combination.folder, str(error))
                say(f"{combination.name}: FAILED: {error}", style="red")
        return left

    def _here(self, words: list[list[str]], first: int, left: Sequence[Combination]) -> None:
        """Through a launcher that returns when all runs have ended."""
        stop = self.composer.folder / STOP
        stop.unlink(missing_ok=True)
        with _stopping(GOES_ON):
            _settle(left)
        apart = stop if isinstance(self.settings, JoblibSettings) else None
        with _stopping(GOES_ON, apart):
            try:
                self.launcher.launch(words, initial_job_idx=first)
            except Exception as error:  # of joblib, where one of its processes dies: the runs then save and end
                say(f"{type(error).__name__}: {error}")
            finally:
                name = stop.read_text() if stop.exists() else ""
                stop.unlink(missing_ok=True)
        if name:
            raise Stopped(Interrupted(name, GOES_ON))

    def _wait(self, jobs: slurm.Jobs, watch: Watch) -> None:
        ids = jobs.ids(watch.left)
        numbers = " ".join(sorted({i.partition("_")[0] for i in ids.values()}))
        with _stopping(f"Slurm job {numbers} goes on: scancel {numbers} stops it; the same command waits for it again"):
            for line in jobs.wait(ids, lambda: watch.left, self.command):
                say(line)


class Watch:
    """Within it, each run's end is told, with how many there have been."""

    def __init__(
        self,
        command: str,
        combinations: Sequence[Combination],
        describe: Describe,
        before: int = 0,
        total: int | None = None,
    ) -> None:
        self.command, self.describe = command, describe
        self.ended, self.total = before, total or len(combinations)
        self.folders = {c.name: c.folder for c in combinations}
        self._over, self._lock = threading.Event(), threading.Lock()
        self._thread = threading.Thread(target=self._work, daemon=True)

    def __enter__(self) -> Watch:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._over.set()
        self._thread.join()
        self._look()

    @property
    def left(self) -> list[str]:
        """The names of those that have not come to an end."""
        self._look()
        return list(self.folders)

    def _work(self) -> None:
        while not self._over.wait(POLL):
            self._look()

    def _look(self) -> None:
        with self._lock:
            for name, folder in list(self.folders.items()):
                found = standing(self.command, folder)
                if found.state == "unfinished":
                    continue
                del self.folders[name]
                self.ended += 1
                count = f"[{self.ended}/{self.total}] {name}: "
                if found.state == "failed":
                    log = f" (log: {found.log})" if found.log else ""
                    say(f"{count}FAILED: {found.reason}{log}", style="red")
                else:
                    say(f"{count}{found.state}: {self.describe(folder)}")


@contextmanager
def _stopping(what: str, apart: Path | None = None) -> Iterator[None]:
    """Within it, a signal that asks to stop raises `Stopped`; a training loop has handlers of its own.

    Args:
        what: what will be, for people.
        apart: a file that tells runs in processes of their own to save and end, written at the first signal; then the
            launcher will return by itself, and a second signal raises.
    """

    def handle(number: int, frame: FrameType | None) -> None:
        name = signal.Signals(number).name
        if apart is None or apart.exists():
            raise Stopped(Interrupted(name, what))
        apart.write_text(name)
        say(f"{name}: the runs are saving; again stops at once, without")

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    former = {number: signal.signal(number, handle) for number in STOPPING}
    try:
        yield
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)


def _settle(combinations: Sequence[Combination]) -> None:
    """Wait for processes that a killed sweep has left behind: they save, and end.

    Raises:
        AlignlabError: they do not.
    """
    end = time.monotonic() + PATIENCE
    for combination in combinations:
        if number := at_work(combination.folder):
            say(f"{combination.name}: process {number} is still at work on it; waiting for it to end …")
        while number and time.monotonic() < end:
            time.sleep(POLL)
            number = at_work(combination.folder)
        if number:
            raise AlignlabError(f"{combination.folder}: process {number} is at work in it: of another sweep?")
