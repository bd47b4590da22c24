"""The small callbacks: evaluation, checkpoints, samples for people to read."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING

from alignlab.core import AlignlabError, Callback, Group
from alignlab.core.files import read_lines, sync, write_text
from alignlab.core.storage import storage_errors

if TYPE_CHECKING:
    from alignlab.training.trainer import Trainer

CHECKPOINTS = 0.05
"""The most of a run's time that goes into checkpoints which are written by time."""

SAMPLES = "samples.jsonl"
SAMPLES_KEPT = 2
"""Groups of each iteration that go to samples.jsonl."""


class Evaluation(Callback):
    """Evaluates on the validation records, and ends the run where that stops improving.

    Args:
        every: optimiser steps between evaluations, >= 1; the last step is evaluated too.
        metric: what improvement is measured by.
        mode: "min" or "max": which direction is better.
        patience: end after so many evaluations without improvement, >= 1; None: never.
        keep_best: checkpoint where the metric is the best so far.
        final_best: the best checkpoint's weights become the run's model.
    """

    def __init__(
        self,
        every: int,
        metric: str = "eval/loss",
        mode: str = "min",
        patience: int | None = None,
        keep_best: bool = False,
        final_best: bool = False,
    ) -> None:
        self.every, self.metric, self.mode, self.patience = every, metric, mode, patience
        self.keep_best, self.final_best = keep_best or final_best, final_best

    def on_step(self, trainer: Trainer) -> None:
        if trainer.state.step % self.every:
            return
        metrics, state = trainer.evaluate(), trainer.state
        trainer.evaluated(metrics)
        if self.metric not in metrics:
            raise AlignlabError(f"training.metric={self.metric}: an evaluation gives {', '.join(sorted(metrics))}")
        value, best = metrics[self.metric], state.best
        better = best is None or (value < best if self.mode == "min" else value > best)
        state.watched, state.best = value, value if better else best
        state.bad_evaluations = 0 if better else state.bad_evaluations + 1
        if better and self.keep_best:
            trainer.request_checkpoint()
        if self.patience is not None and state.bad_evaluations >= self.patience:
            trainer.request_stop(f"{self.metric} has not improved for {state.bad_evaluations} evaluations")

    def on_end(self, trainer: Trainer, error: BaseException | None) -> None:
        if error is not None or trainer.discarded:
            return
        if trainer.state.step % self.every or not trainer.evaluation:  # or where only the model was left to be saved
            trainer.evaluated(trainer.evaluate())
        if self.final_best:
            trainer.load_best()


class CheckpointEvery(Callback):
    """Writes a checkpoint every so many steps, and every so many seconds.

    Args:
        steps: >= 1; None: not by steps.
        seconds: > 0; more where checkpoints would take more than `CHECKPOINTS` of the time; None: not by time.
    """

    def __init__(self, steps: int | None, seconds: float | None = None) -> None:
        self.steps, self.seconds = steps, seconds
        self._since = time.monotonic()

    def on_start(self, trainer: Trainer) -> None:
        self._since = time.monotonic()

    def on_step(self, trainer: Trainer) -> None:
        if self.steps is not None and trainer.state.step % self.steps == 0:
            trainer.request_checkpoint()
        if self.seconds is not None and trainer.checkpoints is not None:
            pause = max(self.seconds, trainer.checkpoints.took / CHECKPOINTS)
            if time.monotonic() - self._since >= pause:
                trainer.request_checkpoint()

    def on_checkpoint(self, trainer: Trainer, folder: Path) -> None:
        self._since = time.monotonic()


class Samples(Callback):
    """Appends the first responses of each iteration to `samples.jsonl`, for people to read.

    Args:
        folder: the run's.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / SAMPLES

    def on_start(self, trainer: Trainer) -> None:
        """Forget what an earlier session wrote after this iteration: it will be sampled again."""
        if not trainer.processes.is_main or not self.path.exists():
            return
        lines = read_lines(self.path, {"iteration": int})
        kept = [text for text, line in lines if line["iteration"] <= trainer.state.iteration]
        write_text(self.path, "".join(text + "\n" for text in kept), as_it_is=True)

    def on_iteration(self, trainer: Trainer, sampled: Sequence[Group]) -> None:
        if not trainer.processes.is_main:
            return
        place = {"iteration": trainer.state.iteration, "step": trainer.state.step}
        with self._storage_errors(), self.path.open("a", encoding="utf-8") as file:
            for group in sampled[:SAMPLES_KEPT]:
                for response in group.responses:
                    line = {**place, "prompt": group.prompt, "response": response.text}
                    numbers = {k: v for k, v in response.columns.items() if isinstance(v, float)}
                    file.write(json.dumps({**line, **numbers}, ensure_ascii=False) + "\n")

    def on_checkpoint(self, trainer: Trainer, folder: Path) -> None:
        if trainer.processes.is_main and self.path.exists():
            with self._storage_errors():
                sync(self.path)

    def _storage_errors(self) -> AbstractContextManager[None]:
        return storage_errors(self.path.parent, f"{SAMPLES} could not be written")
