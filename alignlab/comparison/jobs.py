"""A comparison as jobs of a cluster: which nodes one job runs, with what resources, and after which other jobs.

    base → data → SFT → pairs → reward models → each algorithm, an array over the seeds → its evaluations → report

A job is an array where a node is run once for each seed. Training and evaluation are jobs of their own, for they need
other resources, and a run that only reads the pairs need not wait for the reward model that it is measured with.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from alignlab.build import section
from alignlab.comparison.graph import Command, Node
from alignlab.core import ConfigError, did_you_mean
from alignlab.launch.slurm.settings import SlurmSettings
from alignlab.training.run_folder import RESULT

EVALUATE = ".evaluate"
REPORT = "report"


@dataclass(frozen=True)
class Task:
    """One command, or all, of a node.

    Attributes:
        name: as people see it: the node's, with what it does where another task does the rest.
    """

    node: Node
    commands: Sequence[Command]

    @property
    def name(self) -> str:
        alone = len(self.commands) < len(self.node.commands) and self.commands[0].name == "evaluate"
        return self.node.name + (EVALUATE if alone else "")

    @property
    def done(self) -> bool:
        if self.node.done:
            return True
        trained = (self.node.folder / RESULT).exists()
        return self.node.begun and trained and [c.name for c in self.commands] == ["train"]

    @property
    def parents(self) -> list[Node]:
        found = {p.name: p for c in self.commands for p in c.parents}
        return list(found.values())

    @property
    def words(self) -> list[str]:
        """What comes after `alignlab`."""
        return ["node", str(self.node.folder), *(c.name for c in self.commands)]


@dataclass
class Job:
    """What is handed to the cluster at once.

    Attributes:
        name: of the job, and of its files.
        stages: names under `launcher.stages` whose settings it takes; later ones go before earlier ones.
        tasks: what it runs; several are an array, in the order of their indices.
    """

    name: str
    stages: Sequence[str]
    tasks: list[Task]

    @property
    def array(self) -> bool:
        return len(self.tasks) > 1

    @property
    def trains(self) -> bool:
        return all(c.name == "train" for t in self.tasks for c in t.commands)

    @cached_property
    def distributed(self) -> dict[str, Any]:
        """The section of that name of its runs; nothing where it trains nothing."""
        found: dict[str, Any] = self.tasks[0].commands[0].config.get("distributed", {}) if self.trains else {}
        return found

    @property
    def distributes(self) -> bool:
        """Whether its runs are of several processes."""
        return str(self.distributed.get("mode", "single")) != "single"


def jobs_of(nodes: Sequence[Node]) -> list[Job]:
    """The jobs of a comparison but for its report, each after those it waits for."""
    found: dict[str, Job] = {}
    for node in nodes:
        for commands in _apart(node):
            task = Task(node, commands)
            if not node.name.startswith("runs/"):
                found[node.name] = Job(node.name, [node.name], [task])
                continue
            algorithm = node.name.removeprefix("runs/").rsplit("-seed", 1)[0]
            kind = commands[-1].name
            name = algorithm + (EVALUATE if kind == "evaluate" else "")
            stages = [kind, algorithm] if kind == "train" else [kind]
            found.setdefault(name, Job(name, stages, [])).tasks.append(task)
    trained = [job for job in found.values() if not job.name.endswith(EVALUATE)]
    return [*trained, *(job for job in found.values() if job.name.endswith(EVALUATE))]


def _apart(node: Node) -> list[list[Command]]:
    """A node's commands by the job that runs them: an evaluation apart from what comes before it."""
    if len(node.commands) > 1 and node.commands[-1].name == "evaluate":
        return [list(node.commands[:-1]), [node.commands[-1]]]
    return [list(node.commands)]


def resources(settings: SlurmSettings, jobs: Sequence[Job]) -> dict[str, SlurmSettings]:
    """What each job asks for, by its name.

    Raises:
        ConfigError: what `launcher.stages` says cannot be.
    """
    found = {}
    for name, stages in [*((j.name, j.stages) for j in jobs), (REPORT, [REPORT])]:
        values = settings.model_dump() | {"stages": {}}
        for stage in stages:
            own = settings.stages.get(stage, {})
            for key in own:
                if key not in SlurmSettings.model_fields or key in ("kind", "stages"):
                    unknown = did_you_mean(key, SlurmSettings.model_fields)
                    raise ConfigError(f"launcher.stages.{stage}.{key}: unknown key{unknown}")
            values |= own
        found[name] = section(SlurmSettings, values, f"launcher.stages.{stages[-1]}")
    for job in jobs:
        found[job.name] = _checked(found[job.name], job)
    return found


def unknown_stages(settings: SlurmSettings, jobs: Sequence[Job]) -> list[str]:
    """What to tell of `launcher.stages` that no job has: a mistake, or meant for other comparisons on this cluster."""
    known = {stage for job in jobs for stage in job.stages} | {REPORT}
    return [
        f"launcher.stages.{stage}: this comparison has no such part{did_you_mean(stage, known)}"
        for stage in settings.stages
        if stage not in known
    ]


def _checked(asked: SlurmSettings, job: Job) -> SlurmSettings:
    """What a job asks for, where that and its runs' mode of distribution can be."""
    if not job.trains:  # one process
        return asked.model_copy(update={"nodes": 1})
    if asked.nodes > 1 and not job.distributes:
        raise ConfigError(
            f"launcher.nodes={asked.nodes}: {job.name} has distributed=single, one process: choose a mode, as in "
            f"distributed=zero2, or give it one node: launcher.stages.{job.stages[-1]}.nodes=1"
        )
    if asked.nodes > 1:
        asked.processes_per_node(job.distributed.get("processes"))
    return asked


def folder_of_logs(out: Path) -> Path:
    """Where a comparison's batch scripts and their logs are."""
    return out / "slurm"
