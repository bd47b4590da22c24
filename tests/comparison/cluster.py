"""A stand-in for Slurm, and a small comparison that is submitted to it."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from alignlab.comparison.graph.node import finish
from alignlab.comparison.graph.slurm import Batch
from alignlab.core import AlignlabError
from alignlab.launch.slurm import commands
from alignlab.launch.slurm.commands import State

SMALL = ["launcher.cpus_per_task=1", "launcher.mem_gb=2"]


class Cluster:
    """What Slurm would be asked, and what it answers.

    Attributes:
        given: (name of the batch, its --dependency, its script), in order.
        states: by id; a job that was submitted waits.
        refuses: a word of a script that it does not take → what it says.
    """

    def __init__(self) -> None:
        self.given: list[tuple[str, str, str]] = []
        self.states: dict[str, State] = {}
        self.refuses: dict[str, str] = {}
        self.cancelled: list[str] = []
        self.batches: list[Batch] = []

    def probe(self, script: str) -> None:
        for word, said in self.refuses.items():
            if word in script:
                raise AlignlabError(commands.explain(said))

    def submit(self, executor: Any, batch: Batch) -> list[tuple[str, str]]:
        self.batches.append(batch)
        job = str(100 + len(self.given))
        extra = executor.parameters["additional_parameters"]
        waits = extra.get("dependency", "")
        assert bool(waits) == (extra.get("kill-on-invalid-dep") == "yes")
        tasks = [f"_{i}" for i in range(len(batch.tasks))] if len(batch.tasks) > 1 else [""]
        if len(batch.tasks) > 1:
            executor.parameters["map_count"] = len(batch.tasks)
        text = executor._make_submission_file_text(executor._submitit_command_str, "")
        self.given.append((batch.label, waits, text))
        self.states |= {job + task: State("PENDING", "Dependency" if waits else "Priority", "0:00") for task in tasks}
        return [(job + task, f"out/slurm/{job}{task}_0_log.out") for task in tasks]

    def answer(self, jobs: Iterable[str]) -> dict[str, State]:
        wanted = set(jobs)
        return {name: state for name, state in self.states.items() if name.split("_")[0] in wanted}

    def cancel(self, jobs: Sequence[str]) -> None:
        self.cancelled += jobs
        self.states |= {job: State("CANCELLED") for job in jobs}

    def graph(self) -> dict[str, str]:
        """Batch → what it waits for, with names for the ids, as in "afterok:sft:dpo_0"."""
        names = {str(100 + i): name for i, (name, _, _) in enumerate(self.given)}
        return {name: re.sub(r"(?<=:)\d+", lambda found: names[found[0]], waits) for name, waits, _ in self.given}

    def forget(self) -> None:
        """Begin to read anew; ids go on."""
        self.given = [("", "", "")] * len(self.given)

    @property
    def new(self) -> list[str]:
        return [name for name, _, _ in self.given if name]


def done(*names: str) -> None:
    """Have parts done, as their jobs would."""
    for name in names:
        folder = Path("out") / name.removesuffix(".train")
        if name.endswith(".train"):
            (folder / "result.json").write_text("{}")
        else:
            finish(folder, 1.0)
        if name == "base":
            Path(json.loads((folder / "node.json").read_text())["commands"][0][1]["path"]).mkdir(parents=True)
