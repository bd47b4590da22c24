"""A comparison as a graph of runs: what each consists of, what it waits for, and whether it is already done."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from alignlab import __version__
from alignlab.core.files import write_json

NODES = "nodes.json"
PLAN, DONE, LOG = "node.json", "done.json", "log.txt"


class Command(NamedTuple):
    """One thing that a part of a comparison does.

    Attributes:
        name: of the command, as in "train".
        config: what it reads, resolved.
        parents: nodes whose results it reads.
    """

    name: str
    config: dict[str, Any]
    parents: Sequence[Node] = ()


@dataclass
class Node:
    """One part of a comparison: a folder, and the commands that fill it, run one after the other.

    Attributes:
        name: as people see it, and the folder's path within the comparison.
        folder: where it works.
        commands: what it does.
        key: hash of all that decides its result: its commands but for where their metrics go, and the keys of its
            parents.
    """

    name: str
    folder: Path
    commands: Sequence[Command]
    key: str = field(init=False)

    def __post_init__(self) -> None:
        commands = [[c.name, {k: v for k, v in c.config.items() if k != "tracker"}] for c in self.commands]
        fingerprint = [__version__, self.name, commands, [p.key for p in self.parents]]
        self.key = hashlib.sha256(json.dumps(fingerprint, sort_keys=True, default=str).encode()).hexdigest()[:16]

    @property
    def parents(self) -> list[Node]:
        """The nodes whose results it reads, each once."""
        found: dict[str, Node] = {p.name: p for c in self.commands for p in c.parents}
        return list(found.values())

    @property
    def done(self) -> bool:
        """Whether it has been finished as it is now planned."""
        if any(c.name == "base" and not Path(c.config["path"]).is_dir() for c in self.commands):
            return False  # it is kept elsewhere, and may have been removed there
        return _read(self.folder / DONE).get("key") == self.key

    @property
    def begun(self) -> bool:
        """Whether its folder holds what this plan, not another, has made so far."""
        return _read(self.folder / PLAN).get("key") == self.key

    def begin(self) -> None:
        """Make the folder ready. What another plan left in it is removed; what this plan left is gone on with."""
        if self.folder.exists() and not self.begun:
            trash = self.folder.with_name(f".trash-{self.folder.name}")
            shutil.rmtree(trash, ignore_errors=True)
            self.folder.rename(trash)
            shutil.rmtree(trash, ignore_errors=True)
        self.folder.mkdir(parents=True, exist_ok=True)
        commands = [[c.name, c.config] for c in self.commands]
        write_json(self.folder / PLAN, {"name": self.name, "key": self.key, "commands": commands})


def finish(folder: Path, seconds: float) -> None:
    """Note that all commands of the node in a folder have been done."""
    write_json(folder / DONE, {"key": _read(folder / PLAN).get("key"), "seconds": round(seconds, 3)})


def last_words(log: Path) -> str:
    """The error that a log ends with, or its last line; nothing where there is none."""
    try:
        lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    except OSError:
        return ""
    said = next((line for line in reversed(lines) if line.startswith("alignlab:")), lines[-1] if lines else "")
    return said.removeprefix("alignlab: ")


def write_plan(out: Path, nodes: Sequence[Node]) -> None:
    """Note in the comparison's folder what it now consists of."""
    write_json(out / NODES, {n.name: n.key for n in nodes})


def is_planned(out: Path, nodes: Sequence[Node]) -> bool:
    """Whether that is what was written last."""
    return _read(out / NODES) == {n.name: n.key for n in nodes}


def is_result(out: Path, folder: Path) -> bool:
    """Whether a folder holds a finished part of the comparison as it was last planned, not one of an earlier plan."""
    key = _read(out / NODES).get(str(folder.relative_to(out)))
    return key is not None and _read(folder / DONE).get("key") == key


def _read(path: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(path.read_text()))
    except (OSError, ValueError):
        return {}
