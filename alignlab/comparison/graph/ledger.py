"""Which job of the cluster has which part of a graph: `submitted.json` in the folder of the whole."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated

from pydantic import Field, TypeAdapter, ValidationError

from alignlab.core import AlignlabError, ConfigError
from alignlab.core.errors import shorten
from alignlab.core.files import read_json, write_json
from alignlab.launch.slurm import commands
from alignlab.launch.slurm.commands import State

FILE = "submitted.json"

EVALUATE = ".evaluate"
"""The name of the task that measures what a node has trained is the node's, with this."""

LOGS = "slurm"
"""In the folder of the whole: submitit's files, batch scripts and logs among them."""

REPORT = "report"
"""A node that starts when all others have ended, however that was."""


@dataclass(frozen=True)
class Entry:
    """A task that was submitted, the last time it was.

    Attributes:
        id: Slurm's, of the job or of the task of an array, as in 12 or 12_0.
        key: of the node as it was planned then.
        folder: the node's, relative to that of the whole.
        log: where the job writes.
    """

    id: Annotated[str, Field(pattern=r"^\d+(_\d+)?$")]
    key: str
    folder: str
    log: str

    @property
    def job(self) -> str:
        """The number of the job, or of the whole array."""
        return self.id.partition("_")[0]


@dataclass
class Ledger:
    """Tasks by name, those of the plan in the plan's order.

    Attributes:
        graph: name → names of the tasks that it waits for.
        entries: what was submitted.
    """

    out: Path
    graph: dict[str, list[str]] = field(default_factory=dict)
    entries: dict[str, Entry] = field(default_factory=dict)

    @classmethod
    def read(cls, out: Path) -> Ledger:
        """That of a graph; an empty one where nothing was submitted.

        Raises:
            AlignlabError: it is damaged.
        """
        path = out / FILE
        if not path.exists():
            return cls(out)
        advice = "cancel the jobs that `squeue --me` still shows, and delete the file"
        found = read_json(path, advice, {"graph": dict, "entries": dict})
        try:
            graph = TypeAdapter(dict[str, list[str]]).validate_python(found["graph"], strict=True)
            return cls(out, graph, TypeAdapter(dict[str, Entry]).validate_python(found["entries"]))
        except ValidationError as error:
            raise AlignlabError(f"{path}: damaged: {shorten(error)}: {advice}") from error

    def write(self) -> None:
        entries = {name: asdict(entry) for name, entry in self.entries.items()}
        write_json(self.out / FILE, {"graph": self.graph, "entries": entries})

    def states(self, names: Collection[str] | None = None) -> dict[str, State]:
        """Where the submitted tasks stand, by name; those that Slurm no longer knows are left out.

        Args:
            names: of the tasks that are asked about; all where None.

        Raises:
            AlignlabError: Slurm does not answer.
        """
        asked = {n: e for n, e in self.entries.items() if names is None or n in names}
        known = commands.states(entry.job for entry in asked.values())
        return {name: known[entry.id] for name, entry in asked.items() if entry.id in known}

    def active(self, names: Collection[str] | None = None) -> dict[str, Entry]:
        """What is in the queue or going on."""
        return {name: self.entries[name] for name, state in self.states(names).items() if state.active}


def refuse_if_queued(out: Path, names: Collection[str] | None = None) -> None:
    """Keep two from working in the same folders.

    Args:
        names: of the tasks that are meant; all where None.

    Raises:
        ConfigError: jobs of a graph are in the queue, or going on.
    """
    try:
        active = Ledger.read(out).active(names)
    except AlignlabError:  # nobody to ask: the folder may have come from another machine
        return
    if active:
        name, entry = next(iter(active.items()))
        raise ConfigError(
            f"out={out}: {len(active)} parts of it are in the queue ({name}: Slurm job {entry.id}, …): see "
            f"`alignlab status {out}`, or cancel"
        )
