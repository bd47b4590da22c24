"""What has been handed to the cluster for a comparison: `submitted.json` in its folder."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from alignlab.core import AlignlabError, ConfigError
from alignlab.core.files import write_json
from alignlab.launch.slurm.commands import State, states

FILE = "submitted.json"


@dataclass(frozen=True)
class Entry:
    """A task that was submitted, the last time it was.

    Attributes:
        id: Slurm's, of the job or of the task of an array.
        key: of the node as it was planned then.
        folder: the node's, relative to the comparison's.
        log: where the job writes.
    """

    id: str
    key: str
    folder: str
    log: str


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
        """That of a comparison; an empty one where nothing was submitted.

        Raises:
            AlignlabError: it is damaged.
        """
        path = out / FILE
        if not path.exists():
            return cls(out)
        try:
            found: dict[str, Any] = json.loads(path.read_text())
            return cls(out, found["graph"], {n: Entry(**e) for n, e in found["entries"].items()})
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise AlignlabError(
                f"{path}: damaged ({error}): cancel the jobs that `squeue --me` still shows, and delete the file"
            ) from error

    def write(self) -> None:
        entries = {name: asdict(entry) for name, entry in self.entries.items()}
        write_json(self.out / FILE, {"graph": self.graph, "entries": entries})

    def states(self) -> dict[str, State]:
        """Where the submitted tasks stand, by name; those that Slurm no longer knows are left out."""
        known = states(entry.id.split("_")[0] for entry in self.entries.values())
        return {name: known[entry.id] for name, entry in self.entries.items() if entry.id in known}

    def active(self) -> dict[str, Entry]:
        """What is in the queue or going on."""
        return {name: self.entries[name] for name, state in self.states().items() if state.active}


def refuse_if_queued(out: Path) -> None:
    """Keep two from working in the same folders.

    Raises:
        ConfigError: jobs of a comparison are in the queue, or going on.
    """
    try:
        active = Ledger.read(out).active()
    except AlignlabError:  # nobody to ask: the folder may have come from another machine
        return
    if active:
        raise ConfigError(
            f"out={out}: {len(active)} parts of it are in the queue: see `alignlab status {out}`, or cancel"
        )
