"""A node of the graph: a folder, the commands that fill it, and a key of all that decides what they make."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from alignlab import __version__
from alignlab.core import AlignlabError
from alignlab.core.files import checksums, discard, read_json, write_json
from alignlab.core.secrets import set_aside, without_secrets
from alignlab.training.callbacks.pruning import PRUNED
from alignlab.training.run_folder import RESULT, fingerprint

logger = logging.getLogger(__name__)

NODES = "nodes.json"
PLAN, DONE, FAILED, LOG = "node.json", "done.json", "failed.json", "log.txt"
MEASURED = (RESULT, PRUNED, "evaluation.json", "metrics.jsonl", "leaderboard.json")
"""Files whose numbers leaderboards are made of."""


class Command(NamedTuple):
    """One thing that a node does.

    Attributes:
        name: one of `work.ACTIONS`, as in "train".
        config: what it reads, resolved.
        parents: nodes whose results it reads.
    """

    name: str
    config: dict[str, Any]
    parents: Sequence[Node] = ()


@dataclass
class Node:
    """A part of a graph of runs: a folder, and the commands that fill it, run one after the other.

    Attributes:
        name: as people see it, and the folder's path within the graph's.
        folder: where it works.
        commands: what it does.
        group: nodes of a group are alike but for a seed or a setting: a cluster runs them as an array. By default the
            node is alone.
        keeps_folder: what another plan has left in the folder stays: the run decides whether it can go on with it, or
            refuses. Otherwise it is removed.
        still_valid: whether what it has made still counts: it may be elsewhere, and have been removed there.
        content: what its key is made of.
        key: of all that decides its result.
    """

    name: str
    folder: Path
    commands: Sequence[Command]
    group: str = ""
    keeps_folder: bool = False
    still_valid: Callable[[], bool] = lambda: True
    content: dict[str, Any] = field(init=False)
    key: str = field(init=False)

    def __post_init__(self) -> None:
        self.group = self.group or self.name
        self.content = content(self)
        self.key = digest(self.content)

    @property
    def parents(self) -> list[Node]:
        """The nodes whose results it reads, each once."""
        return parents_of(self.commands)

    @property
    def done(self) -> bool:
        """Whether it has been finished as it is now planned."""
        return read(self.folder / DONE).get("key") == self.key and self.still_valid()

    @property
    def begun(self) -> bool:
        """Whether its folder holds what this plan, not another, has made so far."""
        return read(self.folder / PLAN).get("key") == self.key

    def begin(self) -> None:
        """Make the folder ready, and write down there what is to be done. What this plan left is gone on with."""
        if self.folder.exists() and not self.begun and not self.keeps_folder:
            discard(self.folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / FAILED).unlink(missing_ok=True)
        if read(self.folder / DONE).get("key") == self.key:  # done, and to be done anew
            (self.folder / DONE).unlink()
        commands = [[c.name, set_aside(c.config)] for c in self.commands]
        plan = {"name": self.name, "key": self.key, "content": self.content, "commands": commands}
        write_json(self.folder / PLAN, json.loads(json.dumps(plan, default=str)))


def content(node: Node) -> dict[str, Any]:
    """All that decides what a node makes, as it is kept in `node.json`; the node's key is its digest.

    Whatever else the result depends on (code of the user's, data files) has its place here, and nowhere else.

    Returns:
        version: of alignlab.
        name: of the node.
        commands: [name, digest of the settings that count] of each: for a training run its fingerprint, else all but
            where metrics are sent to.
        parents: name → key of each node whose result it reads, so that a change reaches all that depends on it.
    """
    return {
        "version": __version__,
        "name": node.name,
        "commands": [[c.name, digest(_settings_that_count(c))] for c in node.commands],
        "parents": {parent.name: parent.key for parent in node.parents},
    }


def _settings_that_count(command: Command) -> dict[str, Any]:
    if command.name == "train":
        return fingerprint(command.config)
    settings: dict[str, Any] = without_secrets({k: v for k, v in command.config.items() if k != "tracker"})
    return settings


def digest(value: Any) -> str:
    """16 hexadecimal digits of a value that JSON can write."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:16]


def parents_of(commands: Sequence[Command]) -> list[Node]:
    """The nodes whose results some commands read, each once."""
    found: dict[str, Node] = {p.name: p for c in commands for p in c.parents}
    return list(found.values())


# ------------------------------------------------------------------ what has become of a node, by its folder


@dataclass(frozen=True)
class Outcome:
    """What has become of a node.

    Attributes:
        state: "done", "failed" or "unfinished".
        reason, log: why it failed, and the file that says more.
    """

    state: str
    reason: str = ""
    log: str = ""

    def __str__(self) -> str:
        return f"{self.reason}{f' (log: {self.log})' if self.log else ''}"


def outcome(folder: Path, key: str | None) -> Outcome:
    """What has become of the node with this key in a folder."""
    if key is not None and read(folder / DONE).get("key") == key:
        return Outcome("done")
    told = read(folder / FAILED)
    if key is not None and told.get("key") == key:
        return Outcome("failed", str(told.get("reason", "?")), str(told.get("log", "")))
    return Outcome("unfinished")


def finish(folder: Path, seconds: float) -> None:
    """Note that all commands of the node in a folder have been done, with checksums of what they have measured."""
    noted = {"key": read(folder / PLAN).get("key"), "seconds": round(seconds, 3)}
    write_json(folder / DONE, noted | {"files": checksums(folder, MEASURED)})


def altered(folder: Path) -> str:
    """Which files of a node that is done are not what it wrote, in words; "" where all are."""
    written = read(folder / DONE).get("files")
    if not isinstance(written, dict):  # of an earlier version
        return ""
    found = checksums(folder, MEASURED)
    names = [n for n in MEASURED if found.get(n) != written.get(n)]
    return f"{' and '.join(names)} {'is' if len(names) == 1 else 'are'} not what the run wrote" if names else ""


def fail(folder: Path, key: str, reason: str, log: Path | str = "") -> None:
    """Note why the node with this key failed."""
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / FAILED, {"key": key, "reason": reason, "log": str(log)})


def last_words(log: Path) -> str:
    """The error that a log ends with, or its last line; nothing where there is none."""
    try:
        lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    except OSError:
        return ""
    said = next((line for line in reversed(lines) if line.startswith("alignlab:")), lines[-1] if lines else "")
    return said.removeprefix("alignlab: ")


# ------------------------------------------------------------------ the plan, in the folder of the whole


def write_plan(out: Path, nodes: Sequence[Node]) -> None:
    """Note in the folder of the whole what it now consists of."""
    write_json(out / NODES, {n.name: n.key for n in nodes})


def planned(out: Path) -> Mapping[str, str]:
    """Name → key of the nodes, as they were last planned."""
    return read(out / NODES)


def is_planned(out: Path, nodes: Sequence[Node]) -> bool:
    """Whether that is what was written last."""
    return planned(out) == {n.name: n.key for n in nodes}


def is_result(out: Path, name: str) -> bool:
    """Whether a node is done as it was last planned, not as an earlier plan had it."""
    return outcome(out / name, planned(out).get(name)).state == "done"


def read(path: Path) -> dict[str, Any]:
    """A JSON object; empty where there is none. One that is damaged counts as none, and is said to be."""
    try:
        return read_json(path, "counts as not there", absent={})
    except AlignlabError as error:
        logger.warning("%s", error)
        return {}
