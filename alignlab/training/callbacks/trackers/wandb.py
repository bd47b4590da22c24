"""Weights & Biases, online or offline."""

from __future__ import annotations

import inspect
import os
import secrets
import shlex
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from alignlab.build import locate
from alignlab.core.files import read_lines, write_text
from alignlab.core.settings import Settings
from alignlab.training.callbacks.logging import LINE, METRICS
from alignlab.training.callbacks.trackers.wandb_log import recorded

WANDB_ID = "wandb_id"

FINISH_WITHIN = 120.0
"""Seconds that wandb may take at the end to upload what is left; what it has not sent then can be synced later."""

WRITE_EVERY = 1.0
"""Seconds for which wandb may hold back what goes into its own log; a process that is killed loses that."""


class Wandb(Settings):
    """A wandb run. Its horizontal axis is the metric `step`, since wandb's own may never go back, as it does on
    resuming. wandb's own counts the lines of `metrics.jsonl`.

    Args:
        mode: online, or offline (uploaded later with `wandb sync`).
        project: its name.
        group, job_type, name: of the run; None: train, and its folder's name.
        tags: of the run.
    """

    mode: Literal["online", "offline"] = "online"
    project: str = Field("alignlab", min_length=1)
    group: str | None = None
    job_type: str | None = None
    name: str | None = None
    tags: list[str] = Field(default_factory=list)
    _run: Any = None
    _folder: Path = Path()

    @property
    def hint(self) -> str:
        """What to do where wandb fails."""
        return "tracker.mode=offline needs no network, tracker=none no wandb"

    def start(self, folder: Path, config: Mapping[str, Any], lines: int) -> int:
        """Begin, or go on with the run whose id is in the folder.

        Returns:
            How many lines wandb has of earlier sessions.
        """
        import wandb

        self._folder = folder
        known = wandb.Settings.model_fields
        # Its capture of the console would record every redrawing of the progress line, and what it says itself of an
        # offline run is how to upload the newest of its folders alone.
        options = {
            "console": "off",
            "finish_timeout": FINISH_WITHIN,
            "silent": self.mode == "offline",
            "x_transaction_log_flush_interval": WRITE_EVERY,
        }
        place = Path(os.environ.get("WANDB_DIR") or folder)
        place.mkdir(parents=True, exist_ok=True)
        with _no_questions():
            self._run = wandb.init(
                project=self.project,
                group=self.group,
                job_type=self.job_type or "train",
                name=self.name or folder.resolve().name,
                tags=self.tags,
                dir=str(place),
                mode=self.mode,
                id=self._id(),
                resume="allow",
                reinit="create_new",
                config=dict(config),
                settings=wandb.Settings(**{name: value for name, value in options.items() if name in known}),
            )
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")
        if self.mode == "online":
            return int(self._run.starting_step)
        # `wandb sync` takes the summary of the last session for that of the run.
        latest = {name: value for _, line in read_lines(folder / METRICS, LINE) for name, value in line.items()}
        self._run.summary.update({k: v for k, v in latest.items() if v is not None and k != "time"})
        session = Path(self._run.dir).parent
        return recorded(session.parent, self._run.id, session)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        self._run.log({"step": step, **metrics})

    def summarize(self, metrics: Mapping[str, float]) -> None:
        self._run.summary.update(dict(metrics))

    def finish(self, failed: bool) -> None:
        self._run.finish(exit_code=int(failed))
        if self.mode == "offline":
            print(how_to_sync(self._folder))

    def _id(self) -> str:
        """The run's id there, kept in its folder so that a resumed run continues the same one."""
        path = self._folder / WANDB_ID
        if path.exists() and (known := path.read_text(encoding="utf-8").strip()):
            return known
        fresh = secrets.token_hex(4)
        write_text(path, fresh + "\n")
        return fresh


def named(tracker: Mapping[str, Any], **names: str) -> dict[str, Any]:
    """The section `tracker` of a run that is part of something larger, told what it is there.

    Args:
        names: `group`, `job_type`, `name`; those that the tracker takes and the user has not given.

    Raises:
        ConfigError: there is no such tracker.
    """
    if not tracker.get("_target_"):
        return dict(tracker)
    takes = inspect.signature(locate(tracker["_target_"], "tracker._target_")).parameters
    return {**tracker, **{k: v for k, v in names.items() if k in takes and tracker.get(k) is None}}


def how_to_sync(folder: Path) -> str:
    """What to tell the user of offline runs in a folder, at any depth: the command that uploads them.

    A run that was interrupted has a folder of each session there, all with its id. `wandb sync` puts them together, in
    the order of their times, and on repetition uploads what is new.
    """
    kept = os.environ.get("WANDB_DIR") or folder
    return f"wandb is offline; to upload: find {shlex.quote(str(kept))} -name 'offline-run-*' -exec wandb sync {{}} +"


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
