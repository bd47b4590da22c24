"""Groups `launcher` and `sweeper`: where the runs of a sweep go, and which runs there are."""

from __future__ import annotations

import re
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, field_validator

from alignlab.config import compose, resolve, section
from alignlab.core import ConfigError, did_you_mean
from alignlab.core.settings import Settings
from alignlab.launch.slurm.settings import SlurmSettings
from alignlab.training.callbacks.pruning import Direction, PrunerKind

OURS = re.compile(r"[+~]{0,2}(launcher|sweeper)(?=[=.@]|$)")
"""How a word begins that is of one of these groups."""

PACKAGES = {
    "joblib": ("hydra_plugins.hydra_joblib_launcher", "launcher=joblib"),
    "slurm": ("hydra_plugins.hydra_submitit_launcher", "launcher=slurm"),
    "optuna": ("optuna", "sweeper=optuna"),
}


class LocalSettings(Settings):
    """Group `launcher`, option `local`: one run after another, in this process."""

    kind: Literal["local"] = "local"


class JoblibSettings(Settings):
    """Group `launcher`, option `joblib`: several runs at a time on this machine."""

    kind: Literal["joblib"] = "joblib"
    n_jobs: int = Field(2, ge=-1)

    @field_validator("n_jobs")
    @classmethod
    def _some(cls, value: int) -> int:
        if value == 0:
            raise ValueError("must be 1 or more, or -1 for as many as there are cores")
        return value


class GridSettings(Settings):
    """Group `sweeper`, option `grid`: every combination."""

    kind: Literal["grid"] = "grid"
    metric: str | None = None
    direction: Direction | None = None


class OptunaSettings(Settings):
    """Group `sweeper`, option `optuna`: a search."""

    kind: Literal["optuna"] = "optuna"
    metric: str | None = None
    direction: Direction | None = None
    trials: int = Field(20, ge=1)
    batch: int = Field(1, ge=1)
    seed: int = Field(0, ge=0)
    sampler: Literal["tpe", "random"] = "tpe"
    pruner: PrunerKind = "none"
    startup_trials: int = Field(5, ge=0)
    warmup_steps: int = Field(0, ge=0)


Launcher = LocalSettings | JoblibSettings | SlurmSettings
Sweeper = GridSettings | OptunaSettings
KINDS: dict[str, dict[str, Any]] = {
    "launcher": {"local": LocalSettings, "joblib": JoblibSettings, "slurm": SlurmSettings},
    "sweeper": {"grid": GridSettings, "optuna": OptunaSettings},
}


def chosen(words: Sequence[str], own: Path | None) -> tuple[Launcher, Sweeper, list[str]]:
    """The launcher, the sweeper, and the words that are left for the runs.

    Args:
        own: a folder of the user's configs, which may hold launchers of their own.

    Raises:
        ConfigError: a setting is unknown or impossible, or the package that does it is not installed.
    """
    ours = [w for w in words if OURS.match(w)]
    for word in ours:
        if re.match(r"(launcher|sweeper)=[^'\"\[{]*,", word):
            raise ConfigError(f"{word}: a sweep has one {word.partition('=')[0]}")
        if word.lstrip("+~").startswith("launcher.stages"):
            raise ConfigError(f"{word}: is for `alignlab submit` alone: the runs of a sweep are all alike")
    config = resolve(compose("sweep", ours, own))
    launcher, sweeper = (_section(config[group], group) for group in KINDS)
    return launcher, sweeper, [w for w in words if not OURS.match(w)]


def refuse(words: Sequence[str]) -> None:
    """Without -m there is no sweep.

    Raises:
        ConfigError: for a word of the groups.
    """
    for word in words:
        if OURS.match(word):
            raise ConfigError(f"{word}: is for sweeps: add -m; for a comparison as jobs of Slurm: alignlab submit")


def _section(values: Any, group: str) -> Any:
    kind = values.get("kind") if isinstance(values, dict) else values
    if kind not in KINDS[group]:
        raise ConfigError(f"{group}.kind={kind}: is not known{did_you_mean(str(kind), KINDS[group])}")
    if kind in PACKAGES and not _installed(PACKAGES[kind][0]):
        package, word = PACKAGES[kind]
        raise ConfigError(f"{word}: {package.split('.')[-1]} is not installed: pip install 'alignlab[sweep]'")
    return section(KINDS[group][kind], values, group)


def _installed(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except ModuleNotFoundError:  # not even the package that it is part of
        return False
