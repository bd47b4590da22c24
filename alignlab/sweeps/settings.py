"""Groups `launcher` and `sweeper`: where the runs of a sweep go, and which runs there are."""

from __future__ import annotations

import re
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from alignlab.build import section
from alignlab.config import compose, resolve
from alignlab.core import ConfigError, did_you_mean
from alignlab.core.settings import Settings
from alignlab.launch.slurm.settings import SlurmSettings
from alignlab.training.callbacks.pruning import Direction, PrunerKind

OURS = re.compile(r"[+~]{0,2}(launcher|sweeper)(?=[=.@]|$)")
"""How an override begins that is of one of these groups."""


class LocalSettings(Settings):
    """Group `launcher`, option `local`: on this machine, each run in a process of its own."""

    kind: Literal["local"] = "local"
    n_jobs: int = Field(1, ge=1)


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


Launcher = LocalSettings | SlurmSettings
Sweeper = GridSettings | OptunaSettings
KINDS: dict[str, dict[str, Any]] = {
    "launcher": {"local": LocalSettings, "slurm": SlurmSettings},
    "sweeper": {"grid": GridSettings, "optuna": OptunaSettings},
}


def chosen(overrides: Sequence[str], own: Path | None) -> tuple[Launcher, Sweeper, list[str]]:
    """The launcher, the sweeper, and the overrides that are left for the runs.

    Args:
        own: a folder of the user's configs, which may hold launchers of their own.

    Raises:
        ConfigError: a setting is unknown or impossible, or the package that does it is not installed.
    """
    ours = [o for o in overrides if OURS.match(o)]
    for override in ours:
        if override == "launcher=joblib":
            raise ConfigError(f"{override}: is now launcher=local, with launcher.n_jobs=N for several at a time")
        if re.match(r"(launcher|sweeper)=[^'\"\[{]*,", override):
            raise ConfigError(f"{override}: a sweep has one {override.partition('=')[0]}")
        if override.lstrip("+~").startswith("launcher.stages"):
            raise ConfigError(f"{override}: is for `alignlab submit` alone: the runs of a sweep are all alike")
    config = resolve(compose("sweep", ours, own))
    launcher, sweeper = (_section(config[group], group) for group in KINDS)
    return launcher, sweeper, [o for o in overrides if not OURS.match(o)]


def refuse(overrides: Sequence[str]) -> None:
    """Without -m there is no sweep.

    Raises:
        ConfigError: for an override of the groups.
    """
    for override in overrides:
        if OURS.match(override):
            raise ConfigError(f"{override}: is for sweeps: add -m; for a comparison as jobs of Slurm: alignlab submit")


def _section(values: Any, group: str) -> Any:
    kind = values.get("kind") if isinstance(values, dict) else values
    if kind not in KINDS[group]:
        raise ConfigError(f"{group}.kind={kind}: is not known{did_you_mean(str(kind), KINDS[group])}")
    if kind == "optuna" and find_spec("optuna") is None:
        raise ConfigError("sweeper=optuna: Optuna is not installed: pip install 'alignlab[sweep]'")
    return section(KINDS[group][kind], values, group)
