"""Executor: a graph of nodes as jobs of a Slurm cluster, handed over by submitit.

    base → data → SFT → pairs → reward models → each algorithm, an array over the seeds → its evaluations → report

Training and evaluation of a node are tasks of their own, for they need other resources, and a run that only reads the
pairs need not wait for the reward model that it is measured with.

submitit writes the batch script, starts the processes on all nodes, and keeps the logs. It knows nothing of
dependencies between jobs, of why a job waits, and of clusters without accounting; its `results()` gives up at the first
job that is lost; it tells of a wrong setting only when the jobs before it are in the queue; and it loses a job that is
preempted before Python listens. So ours are: `--dependency` (through its additional parameters), the questions to Slurm
(`launch.slurm.commands`), `submitted.json`, and the end of the batch script, which queues a job again (`job`). Two of
its private functions are used, to show and to probe a script before it is handed over (`_make_submission_file_text`,
`_submitit_command_str`; submitit 1.5).
"""

from __future__ import annotations

import io
import math
import shlex
import sys
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from alignlab.build import section
from alignlab.comparison.graph.job import AFTERWARDS, Job
from alignlab.comparison.graph.ledger import EVALUATE, LOGS, REPORT, Entry, Ledger
from alignlab.comparison.graph.node import Command, Node, parents_of
from alignlab.core import AlignlabError, ConfigError, did_you_mean
from alignlab.core.private_api import submission_text
from alignlab.core.storage import storage_errors
from alignlab.launch.slurm import commands
from alignlab.launch.slurm.settings import SlurmSettings, check_script
from alignlab.training.run_folder import RESULT


@dataclass(frozen=True)
class Task:
    """One command, or all, of a node: what a job, or a task of an array, runs.

    Attributes:
        apart: whether another task does the rest of the node.
    """

    node: Node
    commands: Sequence[Command]
    apart: bool

    @property
    def evaluates(self) -> bool:
        return self.commands[-1].name == "evaluate"

    @property
    def trains(self) -> bool:
        return [c.name for c in self.commands] == ["train"]

    @property
    def name(self) -> str:
        return self.node.name + (EVALUATE if self.apart and self.evaluates else "")

    @property
    def array(self) -> str:
        """The tasks of an array are alike: name of the array."""
        return self.node.group + (EVALUATE if self.evaluates else "")

    @property
    def stages(self) -> list[str]:
        """Names under `launcher.stages` whose settings it takes; later ones go before earlier ones."""
        if self.node.group == self.node.name:
            return [self.node.name]
        return ["train", self.node.group] if self.trains else [self.commands[-1].name]

    @property
    def done(self) -> bool:
        if self.node.done:
            return True
        return self.apart and self.trains and self.node.begun and (self.node.folder / RESULT).exists()

    @property
    def distributed(self) -> dict[str, Any]:
        """The section of that name of a training run; nothing where it trains nothing."""
        found: dict[str, Any] = self.commands[0].config.get("distributed", {}) if self.trains else {}
        return found

    @property
    def distributes(self) -> bool:
        """Whether it is a run of several processes."""
        return str(self.distributed.get("mode", "single")) != "single"


def tasks_of(node: Node) -> list[Task]:
    """A node's commands by the job that runs them: an evaluation apart from what comes before it."""
    if len(node.commands) > 1 and node.commands[-1].name == "evaluate":
        return [Task(node, node.commands[:-1], True), Task(node, node.commands[-1:], True)]
    return [Task(node, node.commands, False)]


@dataclass(frozen=True)
class Batch:
    """Tasks that are handed over together: an array where there are several, else a job.

    Attributes:
        name: of the job; that of several, where tasks that are alike wait for different ones.
        waits: name of a task → kind of Slurm's dependency on it.
        asked: its resources.
        per_node: tasks of Slurm's on each node.
    """

    name: str
    tasks: Sequence[Task]
    waits: dict[str, str]
    asked: SlurmSettings
    per_node: int

    @property
    def label(self) -> str:
        """What tells it from others."""
        return self.name if len(self.tasks) > 1 else self.tasks[0].name.removeprefix("runs/")

    def __str__(self) -> str:
        """The job in a line."""
        asked = self.asked
        amounts = ((asked.nodes, "node"), (asked.gpus_per_node, "GPU"), (asked.cpus_per_task, "core"))
        size = [f"{n} {what}{'s' if n > 1 else ''}" for n, what in amounts if n and (n, what) != (1, "node")]
        needs = ", ".join([*size, f"{asked.mem_gb:g} GB", f"{asked.timeout_min} min"])
        what = f" × {len(self.tasks)}" if len(self.tasks) > 1 else ""
        after = sorted({name.rsplit("-seed", 1)[0].removeprefix("runs/") for name in self.waits})
        waits = f", after {', '.join(after)}" if after else ""
        if "afterany" in self.waits.values():
            waits = ", when all others have ended"
        return f"{self.label}{what}{waits}: {needs}"


class Slurm:
    """A graph of nodes, and what of it is done, in the queue, or to be handed over.

    Args:
        out: the folder of the whole.
        title: of it; the jobs are called TITLE:NAME.
        nodes: each after those that it waits for.
        is_all: whether these are all of the graph; what else is in the queue is then of an earlier plan.

    Raises:
        ConfigError: resources cannot be, or a part is in the queue that was planned otherwise.
        AlignlabError: Slurm does not answer.
    """

    def __init__(
        self, out: Path, title: str, nodes: Sequence[Node], settings: SlurmSettings, is_all: bool = True
    ) -> None:
        self.out, self.title, self.settings, self.is_all = out, title, settings, is_all
        tasks = [task for node in nodes for task in tasks_of(node)]
        tasks.sort(key=lambda t: (t.name == REPORT, t.array.endswith(EVALUATE)))  # measured after all is trained
        self.tasks = {task.name: task for task in tasks}
        self.asked = {task.name: self._resources(task) for task in tasks}
        self.ledger = Ledger.read(out)
        self.active = self.ledger.active(None if is_all else self.tasks)
        for name, entry in self.active.items():
            if name != REPORT and (name not in self.tasks or entry.key != self.tasks[name].node.key):
                raise ConfigError(
                    f"out={out}: {name} is in the queue (job {entry.id}) as it was planned before: "
                    f"`alignlab cancel {out}` first, or choose another out=DIR"
                )

    @property
    def logs(self) -> Path:
        return self.out / LOGS

    # ------------------------------------------------------------------ resources

    def _resources(self, task: Task) -> SlurmSettings:
        """What a task asks for, where that and its run's mode of distribution can be."""
        values = self.settings.model_dump() | {"stages": {}}
        for stage in task.stages:
            own = self.settings.stages.get(stage, {})
            for key in own:
                if key not in SlurmSettings.model_fields or key in ("kind", "stages"):
                    unknown = did_you_mean(key, SlurmSettings.model_fields)
                    raise ConfigError(f"launcher.stages.{stage}.{key}: unknown key{unknown}")
            values |= own
        last = task.stages[-1]
        place = f"launcher.stages.{last}" if last in self.settings.stages else "launcher"
        asked = section(SlurmSettings, values, place)
        if not task.trains:  # one process
            return asked.model_copy(update={"nodes": 1})
        if asked.nodes > 1 and not task.distributes:
            raise ConfigError(
                f"launcher.nodes={asked.nodes}: {task.name} has distributed=single, one process: choose a mode, as in "
                "distributed=zero2, or give it one node (`alignlab submit` has launcher.stages for single parts)"
            )
        self._per_node(task, asked)
        return asked

    @staticmethod
    def _per_node(task: Task, asked: SlurmSettings) -> int:
        """Tasks of Slurm's on each node: on a single one, alignlab starts its processes itself."""
        return asked.processes_per_node(task.distributed.get("processes")) if asked.nodes > 1 else 1

    def notes(self) -> list[str]:
        """What may be a mistake: `launcher.stages` that no part has, which may be meant for other comparisons on this
        cluster; GPUs that would idle."""
        known = {stage for task in self.tasks.values() for stage in task.stages}
        found = [
            f"launcher.stages.{stage}: this comparison has no such part{did_you_mean(stage, known)}"
            for stage in self.settings.stages
            if stage not in known
        ]
        several = [t for n, t in self.tasks.items() if self.asked[n].gpus_per_node > 1]
        idle = dict.fromkeys(t.array for t in several if t.trains and not t.distributes)
        if idle:
            found.append(f"{', '.join(idle)}: several GPUs are asked for; distributed=single uses one")
        return found

    # ------------------------------------------------------------------ what is to be handed over

    def after(self, task: Task) -> list[str]:
        """Names of the tasks that a task comes after."""
        if task.name == REPORT:
            return [name for name in self.tasks if name != REPORT]
        last = [parent.name + EVALUATE for parent in parents_of(task.commands)]
        found = [name if name in self.tasks else name.removesuffix(EVALUATE) for name in last]
        return [*found, task.node.name] if task.apart and task.evaluates else found

    def batches(self) -> list[Batch]:
        """What is neither done nor in the queue, in order."""
        found: list[Batch] = []
        alike: dict[tuple[Any, ...], list[Task]] = defaultdict(list)
        for name, task in self.tasks.items():
            if name != REPORT and not task.done and name not in self.active:
                # Slurm knows one dependency for a whole array.
                waits = tuple(before for before in self.after(task) if not self.tasks[before].done)
                alike[(task.array, waits, self._per_node(task, self.asked[name]))].append(task)
        for (array, waits, per_node), tasks in alike.items():
            found.append(Batch(array, tasks, dict.fromkeys(waits, "afterok"), self.asked[tasks[0].name], per_node))
        report = self.tasks.get(REPORT)
        left = [*self.active, *(t.name for b in found for t in b.tasks)]
        if report is not None and (found or not (REPORT in self.active or report.done)):
            others = {name: "afterany" for name in left if name != REPORT}
            found.append(Batch(REPORT, [report], others, self.asked[REPORT], 1))
        return found

    # ------------------------------------------------------------------ submitit

    def executor(self, batch: Batch, dependency: str = "") -> Any:
        """Submitit's, set up for a batch.

        Raises:
            AlignlabError: submitit is not installed, or does not take the settings.
        """
        import submitit

        class Executor(submitit.SlurmExecutor):  # type: ignore[misc]
            """For a dry run there need be no Slurm."""

            @classmethod
            def affinity(cls) -> int:
                return 2

        asked = batch.asked
        check_script({"name": f"{self.title}:{batch.name}", "out": str(self.logs.absolute())}, "comparison")
        check_script(asked.model_dump(exclude={"stages"}), "launcher")
        if "%" in str(self.logs.absolute()):
            raise ConfigError(f"out={self.out}: Slurm does not write to a folder with % in its path: choose another")
        cores = max(1, asked.cpus_per_task // batch.per_node)
        ours = [
            f'export OMP_NUM_THREADS="${{OMP_NUM_THREADS:-{cores}}}"',
            'export SRUN_CPUS_PER_TASK="${SLURM_CPUS_PER_TASK:-1}"  # srun no longer takes it over from sbatch',
        ]
        extra: dict[str, Any] = {"requeue": True}
        extra |= {"dependency": dependency, "kill-on-invalid-dep": "yes"} if dependency else {}
        try:
            executor = Executor(
                self.logs,
                python=shlex.join([*asked.prefix, asked.python or sys.executable]),
            )
            given = {key: getattr(asked, key) for key in ("partition", "account", "qos", "constraint")}
            executor.update_parameters(
                **{key: value for key, value in given.items() if value is not None},
                **({"gpus_per_node": asked.gpus_per_node} if asked.gpus_per_node else {}),
                job_name=f"{self.title}:{batch.name}",
                nodes=asked.nodes,
                ntasks_per_node=batch.per_node,
                cpus_per_task=cores,
                mem=f"{math.ceil(asked.mem_gb * 1024)}M",
                time=asked.timeout_min,
                signal_delay_s=asked.signal_delay_s,
                array_parallelism=asked.array_parallelism,
                stderr_to_stdout=True,
                setup=[*asked.setup, *ours],
                teardown=AFTERWARDS.splitlines(),
                srun_args=["--gpu-bind=none"],  # each process takes the GPU of its local rank
                additional_parameters=extra | asked.additional_parameters,
            )
        except (ValueError, TypeError) as error:
            raise ConfigError(f"launcher: submitit does not take these settings: {error}") from error
        return executor

    def script(self, batch: Batch) -> str:
        """The batch script, but for its dependencies on jobs that are not in the queue yet."""
        executor = self.executor(batch)
        if len(batch.tasks) > 1:
            executor.parameters["map_count"] = len(batch.tasks)
        return submission_text(executor)

    def show(self, batches: Sequence[Batch]) -> None:
        """Print the scripts and the graph."""
        for batch in batches:
            print(f"==> {batch.label}: {', '.join(t.name for t in batch.tasks)}\n\n{self.script(batch)}")
        print("\n".join(["the graph:", *(f"  {batch}" for batch in batches)]))

    def probe(self, batches: Sequence[Batch]) -> None:
        """Ask Slurm whether it would take all of this.

        Raises:
            AlignlabError: it would not; nothing has been handed over.
        """
        commands.require()
        for script, batch in {self.script(batch): batch for batch in batches}.items():
            with _said_of(batch):
                commands.probe(script)

    def hand_over(self, batches: Sequence[Batch]) -> None:
        """Hand over what Slurm would take; note each job at once.

        Raises:
            AlignlabError: Slurm does not take one; the message says which are in the queue.
        """
        if not batches:
            print(f"{self._counted()}: nothing to hand over")
            return
        if REPORT in self.active:  # it would come too early
            commands.cancel([self.active.pop(REPORT).id])
        before = {} if self.is_all else self.ledger.graph
        self.ledger.graph = before | {name: self.after(task) for name, task in self.tasks.items()}
        given: list[str] = []
        for batch in batches:
            for task in batch.tasks:
                task.node.begin()
            try:
                with _said_of(batch), storage_errors(self.out, "the jobs could not be handed over"):
                    self.logs.mkdir(parents=True, exist_ok=True)
                    jobs = submit(self.executor(batch, self._dependency(batch)), batch)
            except AlignlabError as error:
                so_far = f"; {len(given)} jobs were handed over and go on: {', '.join(given)}" if given else ""
                raise AlignlabError(f"{error}{so_far}; the same command hands over the rest") from error
            given.append(batch.label)
            for task, (job, log) in zip(batch.tasks, jobs, strict=True):
                folder = str(task.node.folder.relative_to(self.out))
                self.active[task.name] = self.ledger.entries[task.name] = Entry(job, task.node.key, folder, log)
            self.ledger.write()
            print(f"job {jobs[0][0].partition('_')[0]}: {batch}")
        print(self._counted())

    def _dependency(self, batch: Batch) -> str:
        """As `sbatch --dependency` has it."""
        found: dict[str, dict[str, None]] = defaultdict(dict)
        for name, kind in sorted(batch.waits.items()):
            entry = self.active[name]
            found[kind][entry.id if kind == "afterok" else entry.job] = None  # `afterok:12_1`: a task of an array
        return ",".join(f"{kind}:{':'.join(ids)}" for kind, ids in found.items())

    def _counted(self) -> str:
        names = [name for name in self.tasks if name != REPORT]
        done = sum(self.tasks[name].done for name in names)
        queued = sum(name in self.active for name in names)
        return f"{done} of {len(names)} parts are done, {queued} in the queue"


def submit(executor: Any, batch: Batch) -> list[tuple[str, str]]:
    """Hand over a batch; the job of each task, and where it writes.

    Raises:
        AlignlabError: Slurm does not take it.
    """
    from submitit.core.utils import FailedJobError, FailedSubmissionError

    try:
        with redirect_stderr(io.StringIO()):  # where submitit repeats what sbatch says
            jobs = executor.submit_array([job_of(task) for task in batch.tasks])
    except (FailedJobError, FailedSubmissionError, RuntimeError) as error:
        raise AlignlabError(commands.explain(str(error))) from error
    return [(job.job_id, str(job.paths.stdout)) for job in jobs]


def job_of(task: Task) -> Any:
    """What submitit is to run for a task."""
    return Job(str(task.node.folder), tuple(c.name for c in task.commands))


@contextmanager
def _said_of(batch: Batch) -> Iterator[None]:
    """Errors that say which job they are about."""
    try:
        yield
    except AlignlabError as error:
        raise AlignlabError(f"{error} (job {batch.label})") from error
