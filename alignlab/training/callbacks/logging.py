"""Metrics of a run: a line each in `metrics.jsonl`, on the terminal, and to a tracker where one is wanted."""

from __future__ import annotations

import json
import logging
import math
import os
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, suppress
from pathlib import Path
from types import TracebackType
from typing import IO, TYPE_CHECKING, Any

from alignlab.core import AlignlabError, Callback, Tracker
from alignlab.core.files import read_lines, write_text
from alignlab.core.secrets import without_secrets
from alignlab.core.storage import storage_errors
from alignlab.training.callbacks.progress import ProgressDisplay

if TYPE_CHECKING:
    from alignlab.training.trainer import Trainer

logger = logging.getLogger(__name__)

METRICS, TRACKED = "metrics.jsonl", "tracker_lines"
RESERVED = ("step", "time")
LINE: dict[str, type] = {"step": int, "time": float}
"""What every line has."""


class MetricsLog:
    """Records the metrics of a run.

    `metrics.jsonl` has one JSON object a line: `step`, `time` (seconds this run has been going, the time between an
    interruption and its resumption left out) and the metrics. JSON has no NaN or infinity: they are written as null.
    Each line is handed to the operating system at once, so a killed process loses none.

    A tracker never stops a run: where it fails, that is logged as an error, once, and metrics go to the file alone. On
    resuming it is told the lines of the file that it lacks, and none twice.

    Use it as a context manager, or call `close`. Making one touches nothing; `resume`, the first `log` or `summarize`
    begins.

    Args:
        folder: the run's folder; made if need be.
        tracker: where metrics go besides the file; None: nowhere.
        config: the resolved config, for the tracker; what looks like a secret is left out.
        is_main: whether this is the main process; in others this does nothing.
    """

    def __init__(self, folder: Path, tracker: Tracker | None, config: Mapping[str, Any], is_main: bool = True) -> None:
        self.folder, self.config, self.is_main = Path(folder), config, is_main
        self.path = self.folder / METRICS
        self.tracker = tracker if is_main else None
        self._started = False
        self._file: IO[str] | None = None
        self._began = 0.0
        self._lines = self._told = 0  # lines that the file has, and that the tracker has, of the same beginning

    def resume(self, step: int) -> None:
        """Begin, or begin again, at `step`, that of the checkpoint that was loaded; 0 without one, the default.

        Lines of later steps are dropped from the file, for they will come again; at step 0 all are. The tracker is
        told the lines of the file that it lacks, and the next ones once they are more than it has.

        Raises:
            AlignlabError: the file cannot be written.
        """
        if not self.is_main:
            return
        self._close_file()
        with self._storage_errors():
            self.folder.mkdir(parents=True, exist_ok=True)
            kept = _drop_after(self.path, step) if self.path.exists() else []
            self._file = self.path.open("a", encoding="utf-8")
        self._began = time.monotonic() - max((line["time"] for line in kept), default=0.0)
        self._lines = len(kept)
        if not self._started:
            self._start_tracker()
            for line in kept[self._told :]:
                self._tell(line)
            self._told = max(self._told, len(kept))

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Record metrics of a step; several calls for a step make several lines.

        Args:
            metrics: by name, anything that `float` takes. The names `step` and `time` are taken.

        Raises:
            AlignlabError: the file cannot be written.
        """
        if not self.is_main:
            return
        if self._file is None:
            self.resume(0)
        assert self._file is not None
        from alignlab.core.parts import number  # with torch

        try:
            values = {str(name): number(value) for name, value in metrics.items()}
        except ValueError as error:
            raise AlignlabError(f"the metrics of step {step}: one {error}: {metrics!r:.200}") from error
        if taken := [name for name in RESERVED if name in values]:
            raise AlignlabError(f"a metric may not be called '{taken[0]}': every line has one already")
        finite = {name: value if math.isfinite(value) else None for name, value in values.items()}
        line = {"step": step, "time": round(time.monotonic() - self._began, 3), **finite}
        with self._storage_errors():
            self._file.write(json.dumps(line, allow_nan=False) + "\n")
            self._file.flush()
        self._lines += 1
        if self._lines > self._told:
            self._tell(line)
            self._told = self._lines
            if self.tracker is not None:
                with suppress(OSError):
                    (self.folder / TRACKED).write_text(f"{self._told}\n")

    def sync(self) -> None:
        """Wait until the lines are on the disk.

        Raises:
            AlignlabError: the device reports an error.
        """
        if self._file is not None:
            with self._storage_errors():
                os.fsync(self._file.fileno())

    def summarize(self, metrics: Mapping[str, float]) -> None:
        """Tell the tracker, and nobody else, metrics of the run as a whole, such as those of an evaluation."""
        if not self._started and self.is_main:
            self._start_tracker()
        self._with_tracker(lambda tracker: tracker.summarize(metrics))

    def close(self, failed: bool = False) -> None:
        """Finish the tracker's run, as failed or not, and close the file."""
        self._close_file()
        if self._started:
            self._with_tracker(lambda tracker: tracker.finish(failed))
        self._started = False

    def __enter__(self) -> MetricsLog:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close(failed=error is not None)

    def _storage_errors(self) -> AbstractContextManager[None]:
        return storage_errors(self.folder, "metrics could not be recorded")

    def _close_file(self) -> None:
        if self._file is not None:
            with suppress(OSError):  # of a line that could not be written, which `log` has reported
                self._file.close()
            self._file = None

    # ------------------------------------------------------------------ the tracker

    def _with_tracker(self, work: Callable[[Tracker], Any]) -> Any:
        """What the tracker answers; where it fails it is left alone from then on."""
        if self.tracker is None:
            return None
        try:
            return work(self.tracker)
        except (Exception, SystemExit) as error:
            name, hint = type(self.tracker).__name__.lower(), getattr(self.tracker, "hint", "tracker=none does without")
            logger.error(
                "%s failed: %s: %s. The work goes on; what it finds is in %s alone. %s",
                name, type(error).__name__, error, self.folder, hint,
            )  # fmt: skip
            self.tracker = None
            return None

    def _start_tracker(self) -> None:
        self._started = True
        if self.tracker is None:
            return
        config, lines = without_secrets(self.config), self._lines

        def start(tracker: Tracker) -> int | None:
            had = tracker.start(self.folder, config, lines)
            return None if had is None else int(had)

        known = self._with_tracker(start)
        counted = self.folder / TRACKED
        if known is None and counted.exists():
            with suppress(OSError, ValueError):
                known = int(counted.read_text())
        self._told = int(known or 0)

    def _tell(self, line: Mapping[str, float | None]) -> None:
        """Have the tracker record a line of the file."""
        values = {n: math.nan if v is None else v for n, v in line.items() if n not in RESERVED}
        step = int(line["step"] or 0)
        self._with_tracker(lambda tracker: tracker.log(step, values))


class Logging(Callback):
    """Logs each step's metrics, and those of evaluations.

    Args:
        log: where to.
        progress: what people see meanwhile.
        every: optimiser steps between lines, >= 1; the last step is always logged.
    """

    def __init__(self, log: MetricsLog, progress: ProgressDisplay, every: int = 1) -> None:
        self.log, self.progress, self.every = log, progress, every
        self._tokens, self._logged_at = 0, 0.0

    def on_start(self, trainer: Trainer) -> None:
        self._logged_at = trainer.state.seconds
        self.log.resume(trainer.state.step)

    def on_step(self, trainer: Trainer) -> None:
        state = trainer.state
        self._tokens += trainer.last.tokens
        speed = self._tokens / max(state.seconds - self._logged_at, 1e-9)
        trainer.metrics |= {
            "tokens_per_second": speed,
            "trained_tokens": float(state.trained_tokens),
            "generated_tokens": float(state.generated_tokens),
            "seconds": state.seconds,
            "epoch": trainer.epoch,
        }
        if state.step % self.every and trainer.done < 1:
            return
        self._tokens, self._logged_at = 0, state.seconds
        self.log.log(state.step, trainer.metrics)
        self.progress.update(state.step, {**trainer.metrics, "done": trainer.done})

    def on_evaluate(self, trainer: Trainer, metrics: Mapping[str, float]) -> None:
        self.log.log(trainer.state.step, metrics)
        self.progress.update(trainer.state.step, {**metrics, "done": trainer.done})

    def on_checkpoint(self, trainer: Trainer, folder: Path) -> None:
        self.log.sync()

    def on_end(self, trainer: Trainer, error: BaseException | None) -> None:
        self.progress.close()
        self.log.close(failed=error is not None)


def _drop_after(path: Path, step: int) -> list[dict[str, Any]]:
    """Drop the lines of later steps, at step 0 all, and what is no line.

    Returns:
        The lines kept.
    """
    found = read_lines(path, LINE)
    kept = [(text, line) for text, line in found if line["step"] <= step and step > 0]
    if len(kept) < len(found):
        dropped = len(found) - len(kept)
        logger.warning("%s: dropped %d line(s) after step %d, which are done again", path, dropped, step)
    write_text(path, "".join(text + "\n" for text, _ in kept))
    return [line for _, line in kept]
