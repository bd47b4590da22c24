"""A trial of a search: how it does at each step goes to the search's study, which says whether it is worth going on.

The sweep writes `trial.json` into the folder of a trial before it starts it, wherever that will be. A trial that is
given up leaves `pruned.json`, no `result.json` and no model.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import TypeAdapter, ValidationError

from alignlab.core import AlignlabError, Callback
from alignlab.core.errors import shorten
from alignlab.core.files import read_json, write_json
from alignlab.core.private_api import journal_lock, storage_of, trial_id

if TYPE_CHECKING:
    from alignlab.training.trainer import Trainer

TRIAL, PRUNED = "trial.json", "pruned.json"

PrunerKind = Literal["none", "median", "halving"]
Direction = Literal["minimize", "maximize"]


@dataclass(frozen=True)
class Trial:
    """What a run must know of the search that it is a trial of.

    Attributes:
        storage: path of the study's file, on a file system that all nodes share.
        study: the study's name.
        number: of the trial within the study, from 0.
        metric: what the search is for.
        pruner: how it is decided; `startup_trials` and `warmup_steps` are its settings.
    """

    storage: str
    study: str
    number: int
    metric: str
    pruner: PrunerKind = "none"
    startup_trials: int = 5
    warmup_steps: int = 0

    def write(self, folder: Path) -> None:
        write_json(folder / TRIAL, asdict(self))


class Pruning(Callback):
    """Reports a trial's metric to its study, and ends the trial where the study's pruner says so.

    Raises:
        AlignlabError: the study cannot be read.
    """

    def __init__(self, trial: Trial) -> None:
        self.trial = trial
        self.study = open_study(Path(trial.storage), trial.study)
        self.study.pruner = make_pruner(trial.pruner, trial.startup_trials, trial.warmup_steps)
        frozen = self.study.get_trials(deepcopy=False)[trial.number]
        self._id, self.over = trial_id(frozen), frozen.state.is_finished()

    @classmethod
    def of(cls, folder: Path) -> Pruning | None:
        """That of the run in a folder; None where it is no trial, is not to be pruned, or has been already."""
        path = folder / TRIAL
        if not path.exists() or (folder / PRUNED).exists():
            return None
        advice = "delete it and repeat the sweep"
        try:
            trial = TypeAdapter(Trial).validate_python(read_json(path, advice))
        except ValidationError as error:
            raise AlignlabError(f"{path}: damaged: {shorten(error)}: {advice}") from error
        if trial.pruner == "none":
            return None
        found = cls(trial)
        return None if found.over else found

    def on_step(self, trainer: Trainer) -> None:
        logged = trainer.state.step % trainer.settings.log_every == 0 or trainer.done >= 1
        metrics = trainer.metrics if logged else trainer.evaluation if trainer.state.watched is not None else {}
        if self.should_prune(trainer.state.step, metrics) and trainer.done < 1:
            trainer.request_stop("pruned", discard=True)

    def should_prune(self, step: int, metrics: Mapping[str, float]) -> bool:
        """Report the metrics of a step; whether to end the trial here. Without the metric among them: False."""
        if self.trial.metric not in metrics:
            return False
        storage = storage_of(self.study)
        known = storage.get_trial(self._id)
        if known.last_step is not None and step < known.last_step:
            return False  # was reported, and decided on, before the run was stopped and went on from a checkpoint
        if step not in known.intermediate_values:
            storage.set_trial_intermediate_value(self._id, step, float(metrics[self.trial.metric]))
            known = storage.get_trial(self._id)
        return bool(self.study.pruner.prune(self.study, known))


def open_study(path: Path, name: str, direction: Direction | None = None) -> Any:
    """The Optuna study in a file; with a direction, made where there is none.

    Raises:
        AlignlabError: Optuna is not installed, or the file cannot be used.
    """
    try:
        import optuna
    except ImportError as error:
        raise AlignlabError("sweeper=optuna: Optuna is not installed: pip install 'alignlab[sweep]'") from error
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    from optuna.storages import JournalStorage
    from optuna.storages.journal import JournalFileBackend, JournalFileOpenLock

    lock = JournalFileOpenLock(str(path), grace_period=10)  # of a process that was killed while it wrote
    try:
        if direction is not None and path.exists():
            _mend(path, lock)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of what Optuna calls experimental
            storage = JournalStorage(JournalFileBackend(str(path), lock_obj=lock))
            if direction is None:
                return optuna.load_study(study_name=name, storage=storage)
            return optuna.create_study(study_name=name, storage=storage, direction=direction, load_if_exists=True)
    except (OSError, KeyError, ValueError) as error:
        raise AlignlabError(f"{path}: the study cannot be read: {error}") from error


def _mend(path: Path, lock: Any) -> None:
    """Cut off a last line that is not whole, as a machine that went down may leave it: Optuna would read no further."""
    with journal_lock(lock), path.open("rb+") as file:
        text = file.read()
        whole = text.rfind(b"\n") + 1
        if whole < len(text):
            file.truncate(whole)


def make_pruner(kind: PrunerKind, startup_trials: int, warmup_steps: int) -> Any:
    import optuna

    if kind == "median":
        return optuna.pruners.MedianPruner(startup_trials, warmup_steps)
    if kind == "halving":
        return optuna.pruners.SuccessiveHalvingPruner(min_resource=max(1, warmup_steps))
    return optuna.pruners.NopPruner()
