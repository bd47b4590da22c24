"""From the overrides of a sweep to its combinations: composed by Hydra, each a node of the sweep's graph."""

from __future__ import annotations

import hashlib
import itertools
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from alignlab.comparison.collect import is_complete
from alignlab.comparison.compare import nodes_of
from alignlab.comparison.graph.node import Command, Node
from alignlab.comparison.planning import quoted
from alignlab.config import compose, config_folder, explain, resolve
from alignlab.core import ConfigError
from alignlab.training.run_folder import REFERENCE_CACHE

GROUP = "sweep"
"""A cluster runs them as one array."""

MOST = 10_000
"""Combinations of a sweep: with more, somebody has mistaken a range."""

LONGEST = 200
"""Bytes that the name of a combination's folder may have; file systems end at 255."""


@dataclass(frozen=True)
class Combination:
    """One run of a sweep.

    Attributes:
        node: its name is that of its folder within the sweep's.
        values: what varies, by key, as written on the command line.
        overrides: all that `alignlab COMMAND` must be given to do the same.
        config: resolved.
        trial: its number within a search's study.
    """

    node: Node
    values: dict[str, str]
    overrides: list[str]
    config: dict[str, Any]
    trial: int | None = None

    @property
    def name(self) -> str:
        return self.node.name

    @property
    def folder(self) -> Path:
        return self.node.folder


def node_of(command: str, name: str, folder: Path, config: dict[str, Any], own: Path | None) -> Node:
    """The node of a run: its folder may hold another run, which is left as it is.

    Args:
        own: a folder of the user's configs.
    """
    if command == "train":
        anew = config["training"]["resume"] == "never"
        done = [Command(command, config)]
        return Node(name, folder, done, group=GROUP, keeps_folder=True, still_valid=lambda: not anew)

    def parts_are_done() -> bool:
        return is_complete(folder) and all(part.done for part in nodes_of(config, folder, own)[1])

    given = {"config": config, "own": str(own.resolve()) if own else None}
    return Node(name, folder, [Command(command, given)], group=GROUP, keeps_folder=True, still_valid=parts_are_done)


class Composer:
    """The overrides of a sweep, and the runs that they stand for.

    Args:
        given: overrides as on the command line.
        own: a folder of the user's configs.

    Attributes:
        folder: the sweep's.
        overrides: the given ones, parsed; some are sweeps.
        steady: those that are the same for all, but for `out`.

    Raises:
        ConfigError: an override is wrong.
    """

    def __init__(self, command: str, given: Sequence[str], own: Path | None) -> None:
        from hydra.core.override_parser.overrides_parser import OverridesParser
        from hydra.errors import HydraException

        self.command, self.own = command, own
        for override in given:
            if override.startswith(("hydra/launcher", "hydra/sweeper", "hydra.sweep")):
                raise ConfigError(f"{override}: alignlab sets this itself: see launcher=… and sweeper=…")
        try:
            self.overrides = OverridesParser.create().parse_overrides(list(given))
        except HydraException as error:
            raise explain(error, command, given, [config_folder()]) from error
        steady = {o.input_line: o.get_key_element() for o in self.overrides if not o.is_sweep_override()}
        naming = [o for o, key in steady.items() if key in ("out", "name", "experiment")]
        self.folder = Path(str(compose(command, naming, own)["out"]))
        self.steady = [o for o, key in steady.items() if key != "out"]

    def grid(self) -> Iterator[dict[str, str]]:
        """Every combination of the values that vary: by key, as written on the command line."""
        swept: dict[str, list[str]] = {}
        for override in (o for o in self.overrides if o.is_sweep_override()):
            if not override.is_discrete_sweep():
                raise ConfigError(f"{override.input_line}: an interval has no end of values: add sweeper=optuna")
            found = list(itertools.islice(override.sweep_string_iterator(), MOST + 1))
            if len(found) > MOST:
                raise ConfigError(f"{override.input_line}: more than {MOST:,} values: no sweep is that large")
            swept[override.get_key_element()] = found
        if (count := math.prod(len(found) for found in swept.values())) > MOST:
            raise ConfigError(f"{' '.join(swept)}: {count:,} combinations: at most {MOST:,}; see sweeper=optuna")
        for values in itertools.product(*swept.values()):
            yield dict(zip(swept, values, strict=True))

    def combination(self, values: Mapping[str, str], name: str | None = None, trial: int | None = None) -> Combination:
        """The run with these values, in the folder `name`, by default called after them."""
        name = name or _name(values)
        folder = self.folder / name
        overrides = [*self.steady, *(f"{key}={value}" for key, value in values.items()), f"out={_plain(str(folder))}"]
        config = self._config(overrides)
        if ours := [*self._tracking(config, name), *self._cache(config)]:
            overrides += ours
            config = self._config(overrides)
        node = node_of(self.command, name, folder, config, self.own)
        return Combination(node, dict(values), overrides, config, trial)

    def _config(self, overrides: Sequence[str]) -> dict[str, Any]:
        return resolve(compose(self.command, overrides, self.own))

    def _tracking(self, config: dict[str, Any], name: str) -> list[str]:
        """What a tracker is to call a run, where the user does not say: a comparison names those it consists of."""
        if self.command != "train":
            return []
        from alignlab.training.callbacks.trackers import named

        tracker, group = dict(config.get("tracker") or {}), self.folder.resolve().name
        told = named(tracker, group=group, name=f"{group}/{name}")
        return [f"++tracker.{k}={quoted(v)}" for k, v in told.items() if tracker.get(k) != v]

    def _cache(self, config: dict[str, Any]) -> list[str]:
        """Where the runs keep what a fixed reference says of the data: what one has computed, the others know."""
        training = config.get("training", {})
        if self.command != "train" or training.get("reference_cache") or config["source"]["kind"] != "data":
            return []
        return [f"training.reference_cache={_plain(str(self.folder / REFERENCE_CACHE))}"]


def _plain(text: str) -> str:
    """As Hydra reads it, quoted where it must be."""
    return text if re.fullmatch(r"[\w./-]+", text) else quoted(text)


def _name(values: Mapping[str, str]) -> str:
    """`algorithm=dpo,algorithm.beta=0.1`: in order of keys, as Hydra does it; without slashes, and not too long."""
    name = ",".join(sorted(f"{key}={value}" for key, value in values.items())).replace("/", "_") or "run"
    if len(name.encode()) > LONGEST:
        digest = hashlib.sha256(name.encode()).hexdigest()[:12]
        name = f"{name.encode()[:LONGEST].decode(errors='ignore')}-{digest}"
    return name
