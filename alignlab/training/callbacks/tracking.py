"""Metrics of a run: always a line each in `metrics.jsonl`, and to Weights & Biases where that is wanted."""

from __future__ import annotations

import json
import logging
import math
import os
import secrets
import shlex
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import IO, Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from alignlab.build import section
from alignlab.core import AlignlabError
from alignlab.core.files import write_text
from alignlab.core.settings import Settings
from alignlab.core.storage import storage_errors
from alignlab.training.callbacks.wandb_log import recorded
from alignlab.training.provenance import without_secrets

logger = logging.getLogger(__name__)

METRICS, WANDB_ID = "metrics.jsonl", "wandb_id"
RESERVED = ("step", "time")
FINISH_WITHIN = 120.0
"""Seconds that wandb may take at the end to upload what is left; what it has not sent then can be synced later."""

WRITE_EVERY = 1.0
"""Seconds for which wandb may hold back what goes into its own log; a process that is killed loses that."""


def _off(value: object) -> object:
    """YAML 1.1 reads a bare `off` as false."""
    return "off" if value is False else value


class TrackerSettings(Settings):
    """Group `tracker`: where metrics go besides `metrics.jsonl`."""

    mode: Annotated[Literal["online", "offline", "off"], BeforeValidator(_off)] = "off"
    project: str = Field("alignlab", min_length=1)
    group: str | None = None
    job_type: str | None = None
    name: str | None = None
    tags: list[str] = Field(default_factory=list)


def named(tracker: Mapping[str, Any], **names: str) -> dict[str, Any]:
    """The section `tracker` of a run that is part of something larger, told what it is there.

    Args:
        names: `group`, `job_type`, `name`; those that the user gave are kept.

    Raises:
        ConfigError: the section is wrong.
    """
    if section(TrackerSettings, dict(tracker), "tracker").mode == "off":
        return dict(tracker)
    return {**tracker, **{key: value for key, value in names.items() if tracker.get(key) is None}}


def how_to_sync(folder: Path) -> str:
    """What to tell the user of offline runs in a folder, at any depth: the command that uploads them.

    A run that was interrupted has a folder of each sitting there, all with its id. `wandb sync` puts them together, in
    the order of their times, and on repetition uploads what is new.
    """
    kept = os.environ.get("WANDB_DIR") or folder
    return f"wandb is offline; to upload: find {shlex.quote(str(kept))} -name 'offline-run-*' -exec wandb sync {{}} +"


class Tracker:
    """Records the metrics of a run.

    `metrics.jsonl` has one JSON object a line: `step`, `time` (seconds this run has been going, the time between an
    interruption and its resumption left out) and the metrics. JSON has no NaN or infinity: they are written as null.
    Each line is handed to the operating system at once, so a killed process loses none.

    wandb never stops a run: where it fails, that is logged as an error, once, and metrics go to the file alone. Its
    horizontal axis is the metric `step`, since its own may never go back, as it does on resuming. Its own counts the
    lines of the file, so that on resuming none is told it twice and none that it lacks is left out.

    Use it as a context manager, or call `close`. Making one touches nothing; `resume`, the first `log` or `summarize`
    begins.

    Args:
        run_folder: the run's folder; made if need be.
        config: the resolved config, to be shown by wandb; what looks like a secret is left out.
        is_main: whether this is the main process; in others this does nothing.
    """

    def __init__(
        self, run_folder: Path, settings: TrackerSettings, config: Mapping[str, Any], is_main: bool = True
    ) -> None:
        self.folder, self.settings, self.config, self.is_main = Path(run_folder), settings, config, is_main
        self.path = self.folder / METRICS
        self._file: IO[str] | None = None
        self._began = 0.0
        self._wandb: Any = None
        self._lines = self._told = 0  # lines that the file has, and that wandb has, of the same beginning

    def resume(self, step: int) -> None:
        """Begin, or begin again, at `step`, that of the checkpoint that was loaded; 0 without one, the default.

        Lines of later steps are dropped from the file, for they will come again; at step 0 all are. The wandb run
        whose id is in the run's folder goes on: it is told the lines of the file that it lacks, as where it had been
        off, and the next ones once they are more than it has.

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
        if self._wandb is None:
            self._start_wandb()
            self._told = self._known()
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
        values = {name: float(value) for name, value in metrics.items()}
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

    def summarize(self, figures: Mapping[str, float]) -> None:
        """Put figures, such as those of an evaluation, into the summary of the wandb run, and nowhere else."""
        if self._wandb is None and self.is_main:
            self._start_wandb()
        if self._wandb is not None:
            try:
                self._wandb.summary.update(dict(figures))
            except Exception as error:
                self._lose_wandb(error)

    def close(self, failed: bool = False) -> None:
        """Finish the wandb run, as failed or not, and close the file."""
        self._close_file()
        if self._wandb is not None:
            try:
                self._wandb.finish(exit_code=int(failed))
                if self.settings.mode == "offline":
                    print(how_to_sync(self.folder))
            except Exception as error:
                self._lose_wandb(error)
            self._wandb = None

    def __enter__(self) -> Tracker:
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

    def _known(self) -> int:
        """How many lines wandb has of earlier sittings."""
        if self._wandb is None:
            return 0
        try:
            if self.settings.mode == "online":
                return int(self._wandb.starting_step)
            sitting = Path(self._wandb.dir).parent
            return recorded(sitting.parent, self._wandb.id, sitting)
        except Exception as error:
            self._lose_wandb(error)
            return 0

    def _tell(self, line: Mapping[str, float | None]) -> None:
        """Have wandb record a line of the file."""
        if self._wandb is not None:
            values = {name: math.nan if value is None else value for name, value in line.items() if name != "time"}
            try:
                self._wandb.log(values)
            except Exception as error:
                self._lose_wandb(error)

    def _start_wandb(self) -> None:
        mode = self.settings.mode
        if mode == "off":
            return
        try:
            import wandb

            known = wandb.Settings.model_fields
            # Its capture of the console would record every redrawing of the progress line, and what it says itself of
            # an offline run is how to upload the newest of its folders alone.
            options = {
                "console": "off",
                "finish_timeout": FINISH_WITHIN,
                "silent": mode == "offline",
                "x_transaction_log_flush_interval": WRITE_EVERY,
            }
            folder = Path(os.environ.get("WANDB_DIR") or self.folder)
            folder.mkdir(parents=True, exist_ok=True)
            with _no_questions():
                self._wandb = wandb.init(
                    project=self.settings.project,
                    group=self.settings.group,
                    job_type=self.settings.job_type or "train",
                    name=self.settings.name or self.folder.resolve().name,
                    tags=self.settings.tags,
                    dir=str(folder),
                    mode=mode,
                    id=self._wandb_id(),
                    resume="allow",
                    reinit="create_new",
                    config=without_secrets(self.config),
                    settings=wandb.Settings(**{name: value for name, value in options.items() if name in known}),
                )
            self._wandb.define_metric("step")
            self._wandb.define_metric("*", step_metric="step")
            if mode == "offline":  # `wandb sync` takes the summary of the last sitting for that of the run
                latest = {name: value for _, line in _read(self.path) for name, value in line.items()}
                self._wandb.summary.update({k: v for k, v in latest.items() if v is not None and k != "time"})
        except Exception as error:
            self._lose_wandb(error)

    def _wandb_id(self) -> str:
        """The run's id there, kept in its folder so that a resumed run continues the same one."""
        path = self.folder / WANDB_ID
        if path.exists() and (known := path.read_text(encoding="utf-8").strip()):
            return known
        fresh = secrets.token_hex(4)
        write_text(path, fresh + "\n")
        return fresh

    def _lose_wandb(self, error: Exception) -> None:
        self._wandb = None
        logger.error(
            "wandb failed: %s: %s. The work goes on; what it finds is in %s alone. "
            "tracker.mode=offline needs no network, tracker.mode=off no wandb",
            type(error).__name__, error, self.folder,
        )  # fmt: skip


@contextmanager
def _no_questions() -> Iterator[None]:
    """Without a login, and on a terminal, wandb asks for one and waits for ever; where nobody can answer it raises."""
    asked = sys.stdin
    with open(os.devnull, encoding="utf-8") as nobody:
        sys.stdin = nobody
        try:
            yield
        finally:
            sys.stdin = asked


def _read(path: Path) -> list[tuple[str, dict[str, Any]]]:
    """The lines of a file of metrics, as text and as values, but for what is no line, such as the last one of a killed
    process's file."""
    found = []
    text = path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""
    for number, line in enumerate(text.splitlines(), start=1):
        try:
            values = json.loads(line)
            found.append((line, values | {"step": int(values["step"]), "time": float(values["time"])}))
        except (ValueError, KeyError, TypeError):
            logger.warning("%s:%d: not a line of metrics, dropped: %.80s", path, number, line)
    return found


def _drop_after(path: Path, step: int) -> list[dict[str, Any]]:
    """Drop the lines of later steps, at step 0 all, and what is no line.

    Returns:
        The lines kept.
    """
    found = _read(path)
    kept = [(text, line) for text, line in found if line["step"] <= step and step > 0]
    if len(kept) < len(found):
        dropped = len(found) - len(kept)
        logger.warning("%s: dropped %d line(s) after step %d, which are done again", path, dropped, step)
    write_text(path, "".join(text + "\n" for text, _ in kept))
    return [line for _, line in kept]
