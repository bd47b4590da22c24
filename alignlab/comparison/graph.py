"""A comparison as a graph of runs: what each consists of, what it waits for, and whether it is already done."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from alignlab import __version__
from alignlab.core.files import write_json

NODES = "nodes.json"
PLAN, DONE, LOG = "node.json", "done.json", "log.txt"


@dataclass
class Node:
    """One part of a comparison: a folder, and the commands that fill it, run one after the other in a process.

    Attributes:
        name: as people see it, and the folder's path within the comparison.
        folder: where it works.
        commands: (command, resolved config), e.g. ("train", {...}).
        parents: nodes whose results it reads.
        key: hash of all that decides its result: its commands, and the keys of its parents.
    """

    name: str
    folder: Path
    commands: Sequence[tuple[str, dict[str, Any]]]
    parents: Sequence[Node] = ()
    key: str = field(init=False)

    def __post_init__(self) -> None:
        essence = [__version__, self.name, list(self.commands), [p.key for p in self.parents]]
        self.key = hashlib.sha256(json.dumps(essence, sort_keys=True, default=str).encode()).hexdigest()[:16]

    @property
    def done(self) -> bool:
        """Whether it has been finished as it is now planned."""
        return _read(self.folder / DONE).get("key") == self.key

    def begin(self) -> None:
        """Make the folder ready. What another plan left in it is removed; what this plan left is gone on with."""
        if self.folder.exists() and _read(self.folder / PLAN).get("key") != self.key:
            trash = self.folder.with_name(f".trash-{self.folder.name}")
            shutil.rmtree(trash, ignore_errors=True)
            self.folder.rename(trash)
            shutil.rmtree(trash, ignore_errors=True)
        self.folder.mkdir(parents=True, exist_ok=True)
        write_json(
            self.folder / PLAN, {"name": self.name, "key": self.key, "commands": [list(c) for c in self.commands]}
        )

    def finish(self, seconds: float) -> None:
        write_json(self.folder / DONE, {"key": self.key, "seconds": round(seconds, 3)})


def write_plan(out: Path, nodes: Sequence[Node]) -> None:
    """Note in the comparison's folder what it now consists of."""
    write_json(out / NODES, {n.name: n.key for n in nodes})


def is_result(out: Path, folder: Path) -> bool:
    """Whether a folder holds a finished part of the comparison as it was last planned, not one of an earlier plan."""
    key = _read(out / NODES).get(str(folder.relative_to(out)))
    return key is not None and _read(folder / DONE).get("key") == key


def _read(path: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(path.read_text()))
    except (OSError, ValueError):
        return {}
