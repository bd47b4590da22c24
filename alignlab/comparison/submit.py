"""A comparison handed to a Slurm cluster as a graph of jobs, each of which starts when those it waits for went well.

The same command again hands over what is neither done nor in the queue: what failed, what was cancelled, what is new.
"""

from __future__ import annotations

import sys
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from alignlab.benchmarks.evaluate import build_benchmark
from alignlab.build import section
from alignlab.comparison.collect import is_current
from alignlab.comparison.graph import Node, is_planned, write_plan
from alignlab.comparison.jobs import EVALUATE, REPORT, Job, Task, folder_of_logs, jobs_of, resources, unknown_stages
from alignlab.comparison.ledger import Entry, Ledger
from alignlab.comparison.planning import plan
from alignlab.comparison.settings import ComparisonSettings
from alignlab.core import AlignlabError, ConfigError
from alignlab.core.files import write_text
from alignlab.core.storage import storage_errors
from alignlab.launch.slurm import commands
from alignlab.launch.slurm.script import render
from alignlab.launch.slurm.settings import SlurmSettings

Waits = frozenset[tuple[str, str]]
"""(kind of Slurm's dependency, name of the task)."""


@dataclass(frozen=True)
class Batch:
    """Tasks of a job that wait for the same, and so are handed over together.

    Attributes:
        name: of the job; with a number where its tasks wait for different things.
        tasks: (index in the array, task); none for the report.
        log: where it writes; `%a` in it is the index.
    """

    name: str
    tasks: Sequence[tuple[int, Task]]
    array: bool
    waits: Waits
    asked: SlurmSettings
    log: Path
    script: str

    @property
    def file(self) -> str:
        return f"{self.name}.sbatch"

    def __str__(self) -> str:
        """The job in a line."""
        asked = self.asked
        amounts = ((asked.nodes, "node"), (asked.gpus_per_node, "GPU"), (asked.cpus_per_task, "core"))
        size = [f"{n} {what}{'s' if n > 1 else ''}" for n, what in amounts if n and (n, what) != (1, "node")]
        needs = ", ".join([*size, f"{asked.mem_gb:g} GB", f"{asked.timeout_min} min"])
        what = f" [{', '.join(str(i) for i, _ in self.tasks)}]" if self.array else ""
        after = sorted({name.rsplit("-seed", 1)[0].removeprefix("runs/") for _, name in self.waits})
        waits = (
            f", after {', '.join(after)}" if after and self.tasks else ", when all others have ended" if after else ""
        )
        return f"{self.name}{what}{waits}: {needs}"


def submit(config: dict[str, Any], out: Path, own: Path | None = None, dry_run: bool = False) -> None:
    """Hand over what is neither done nor in the queue.

    Args:
        own: a folder of the user's configs, searched for those of the runs too.
        dry_run: print the graph and the scripts instead; nothing is written or handed over.

    Raises:
        ConfigError: a setting is wrong, or a part is in the queue that was planned otherwise.
        AlignlabError: Slurm does not take a job. None was handed over, or the message says which were.
    """
    settings = section(ComparisonSettings, config["comparison"], "comparison")
    slurm = section(SlurmSettings, config["launcher"], "launcher")
    nodes = plan(config, settings, build_benchmark(config["benchmark"]), out, own)
    jobs = jobs_of(nodes)
    graph = _Graph(config["name"], out, nodes, jobs, resources(slurm, jobs), Ledger.read(out))
    batches = graph.batches()
    for text in unknown_stages(slurm, jobs):
        print(f"note: {text}", file=sys.stderr)
    idle = [j.name for j in jobs if j.trains and graph.asked[j.name].gpus_per_node > 1 and not j.distributes]
    if idle:
        print(f"note: {', '.join(idle)}: several GPUs are asked for; distributed=single uses one", file=sys.stderr)
    if dry_run:
        for batch in batches:
            print(f"==> {folder_of_logs(out) / batch.file}\n\n{batch.script}")
        print("\n".join(["the graph:", *(f"  {batch}" for batch in batches)]))
        return
    with storage_errors(out, "the comparison could not be written"):
        folder_of_logs(out).mkdir(parents=True, exist_ok=True)
        kept = {k: v for k, v in config.items() if k != "launcher"}
        write_text(out / "config.yaml", yaml.safe_dump(kept, sort_keys=False, allow_unicode=True))
        for batch in batches:
            write_text(folder_of_logs(out) / batch.file, batch.script)
    graph.hand_over(batches)


class _Graph:
    """The jobs of a comparison, and what of them is done, in the queue, or to be handed over."""

    def __init__(
        self,
        name: str,
        out: Path,
        nodes: Sequence[Node],
        jobs: Sequence[Job],
        asked: dict[str, SlurmSettings],
        ledger: Ledger,
    ) -> None:
        self.name, self.out, self.nodes, self.jobs, self.asked, self.ledger = name, out, nodes, jobs, asked, ledger
        self.tasks = {task.name: task for job in jobs for task in job.tasks}
        self.active = ledger.active()
        for task, entry in self.active.items():
            if task != REPORT and (task not in self.tasks or entry.key != self.tasks[task].node.key):
                raise ConfigError(
                    f"out={out}: {task} is in the queue (job {entry.id}) as it was planned before: "
                    f"`alignlab cancel {out}` first, or choose another out=DIR"
                )

    def after(self, task: Task) -> list[tuple[str, str]]:
        """What a task comes after: (kind of dependency, name)."""
        found = [("afterok", self._last(parent)) for parent in task.parents]
        if task.name.endswith(EVALUATE) and task.node.name in self.tasks:
            found.append(("aftercorr", task.node.name))
        return found

    def waits(self, task: Task) -> Waits:
        """That of it which is not done."""
        return frozenset((kind, name) for kind, name in self.after(task) if not self.tasks[name].done)

    def _last(self, node: Node) -> str:
        """The task with which a node is done."""
        apart = node.name + EVALUATE
        return apart if apart in self.tasks else node.name

    def batches(self) -> list[Batch]:
        """What is to be handed over, in order."""
        found = []
        for job in self.jobs:
            todo = [(i, t) for i, t in enumerate(job.tasks) if not t.done and t.name not in self.active]
            together: dict[Waits, list[tuple[int, Task]]] = defaultdict(list)
            for index, task in todo:
                # Of an array that is partly in the queue, tasks wait for several jobs of Slurm's.
                apart = frozenset((kind, self._job_of(name)) for kind, name in self.waits(task))
                together[apart].append((index, task))
            for number, tasks in enumerate(together.values()):
                name = job.name if number == 0 else f"{job.name}.{number + 1}"
                found.append(self._batch(name, job, tasks))
        reported = is_planned(self.out, self.nodes) and (REPORT in self.active or is_current(self.out))
        if found or not reported:
            found.append(self._report([*self.active, *(t.name for b in found for _, t in b.tasks)]))
        return found

    def _job_of(self, task: str) -> str:
        """What tells jobs of Slurm's apart, of a task in the queue or to be handed over."""
        if task in self.active:
            return self.active[task].id.split("_")[0]
        return task.rsplit("-seed", 1)[0]

    def _batch(self, name: str, job: Job, tasks: Sequence[tuple[int, Task]]) -> Batch:
        asked = self.asked[job.name]
        several = asked.processes_per_node(job.distributed.get("processes")) if asked.nodes > 1 else None
        log = folder_of_logs(self.out) / (f"{job.name}-%a.log" if job.array else f"{job.name}.log")
        title = f"{self.name}: {', '.join(t.name for _, t in tasks)}"
        words = [(i, t.words) for i, t in tasks]
        script = self._script(title, job.name, words, asked, log, job.array, several)
        return Batch(name, tasks, job.array, self.waits(tasks[0][1]), asked, log, script)

    def _report(self, before: Sequence[str]) -> Batch:
        asked = self.asked[REPORT].model_copy(update={"nodes": 1})
        log = folder_of_logs(self.out) / f"{REPORT}.log"
        title = f"{self.name}: leaderboard and report of what has finished"
        script = self._script(title, REPORT, [(0, ["report", str(self.out)])], asked, log)
        waits = frozenset(("afterany", name) for name in before if name != REPORT)
        return Batch(REPORT, [], False, waits, asked, log, script)

    def _script(
        self,
        title: str,
        job: str,
        tasks: Sequence[tuple[int, Sequence[str]]],
        asked: SlurmSettings,
        log: Path,
        array: bool = False,
        several: int | None = None,
    ) -> str:
        name = f"{self.name}:{job}"
        title += ". Written by `alignlab submit`."
        return render(title, name, tasks, asked, log, Path.cwd(), array=array, processes=several)

    # ------------------------------------------------------------------ handing over

    def hand_over(self, batches: Sequence[Batch]) -> None:
        """Give Slurm the scripts that are written; note each at once."""
        if not batches:
            print(f"{self._counted()}: nothing to hand over")
            return
        scripts = folder_of_logs(self.out)
        for batch in batches:  # nothing is handed over where something would be refused
            with _said_of(batch):
                commands.probe(scripts / batch.file)
        write_plan(self.out, self.nodes)
        if REPORT in self.active:  # it would come too early
            commands.cancel([self.active.pop(REPORT).id])
        self.ledger.graph = {name: [n for _, n in self.after(task)] for name, task in self.tasks.items()}
        self.ledger.graph |= {REPORT: list(self.tasks)}
        given: list[str] = []
        for batch in batches:
            for _, task in batch.tasks:
                task.node.begin()
            try:
                with _said_of(batch):
                    job = commands.submit(scripts / batch.file, self._dependency(batch))
            except AlignlabError as error:
                so_far = f"; {len(given)} jobs were handed over and go on: {', '.join(given)}" if given else ""
                raise AlignlabError(f"{error}{so_far}; the same command hands over the rest") from error
            given.append(batch.name)
            for name, entry in self._entries(batch, job):
                self.ledger.entries[name] = entry
                self.active[name] = entry
            self.ledger.write()
            print(f"job {job}: {batch}")
        print(f"{self._counted()}\nalignlab status {self.out}    shows how it goes; logs are in {scripts}")

    def _entries(self, batch: Batch, job: str) -> Iterator[tuple[str, Entry]]:
        for index, task in batch.tasks:
            folder = str(task.node.folder.relative_to(self.out))
            log = str(batch.log).replace("%a", str(index))
            yield task.name, Entry(f"{job}_{index}" if batch.array else job, task.node.key, folder, log)
        if not batch.tasks:
            yield REPORT, Entry(job, "", ".", str(batch.log))

    def _dependency(self, batch: Batch) -> list[str]:
        found: dict[str, dict[str, None]] = defaultdict(dict)
        for kind, name in sorted(batch.waits):
            entry = self.active[name]
            one = "_" not in entry.id
            # Whole arrays: each task waits for its like (aftercorr), the report for all.
            found["afterok" if kind == "aftercorr" and one else kind][entry.id.split("_")[0]] = None
        if not found:
            return []
        text = ",".join(f"{kind}:{':'.join(ids)}" for kind, ids in found.items())
        return [f"--dependency={text}", "--kill-on-invalid-dep=yes"]

    def _counted(self) -> str:
        done = sum(task.done for task in self.tasks.values())
        queued = sum(name in self.tasks for name in self.active)
        return f"{done} of {len(self.tasks)} parts are done, {queued} in the queue"


@contextmanager
def _said_of(batch: Batch) -> Iterator[None]:
    """Errors that say which job they are about."""
    try:
        yield
    except AlignlabError as error:
        raise AlignlabError(f"{error} (job {batch.name})") from error
