"""`launcher=slurm`: runs as an array of Slurm jobs, through Hydra's submitit launcher.

That launcher's own `launch` waits for the jobs' results one after the other and gives up at the first that has none.
Here its jobs are handed in the same way, with the settings of group `launcher`; then what each run leaves in its folder
is looked at, and what Slurm says of the job, until all have come to an end.
"""

from __future__ import annotations

import io
import math
import shlex
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import redirect_stderr
from pathlib import Path
from typing import Any

from alignlab.comparison.graph import last_words
from alignlab.config import section
from alignlab.core import AlignlabError, ConfigError
from alignlab.core.files import write_json
from alignlab.launch.slurm import commands
from alignlab.launch.slurm.commands import State, explain, states
from alignlab.launch.slurm.settings import SlurmSettings
from alignlab.sweeps.combinations import Combination
from alignlab.sweeps.state import failed, read, standing
from alignlab.training.settings import DistributedSettings

JOBS, LOGS = "jobs.json", "slurm"
POLL, ASK = 0.5, 5.0
"""Seconds between looks at the folders, and at the queue."""

ALWAYS = 10**6
"""Times that a job may be queued again after its time limit: as often as it takes."""


def tasks(settings: SlurmSettings, config: Mapping[str, Any]) -> int:
    """How many tasks a training run's job has on each node: on a single one, alignlab starts its processes itself.

    Raises:
        ConfigError: the run cannot be spread over the nodes.
    """
    if settings.nodes == 1:
        return 1
    distributed = section(DistributedSettings, config.get("distributed", {}), "distributed")
    if distributed.mode == "single":
        raise ConfigError(f"launcher.nodes={settings.nodes}: distributed=single runs on one node: choose another mode")
    return settings.processes_per_node(distributed.processes)


def submit(
    launcher: Any,
    settings: SlurmSettings,
    command: str,
    combinations: Sequence[Combination],
    words: Sequence[Sequence[str]],
    first: int,
) -> dict[str, dict[str, str]]:
    """Hand the runs in as one array; each run's job and its log, by the run's name.

    Args:
        launcher: Hydra's, set up.
        words: of each run, for Hydra.
        first: the number of the first run.

    Raises:
        AlignlabError: Slurm is not here, or does not take the jobs.
    """
    import submitit
    from hydra.core.singleton import Singleton

    commands.require()
    counts = {tasks(settings, c.config) if command == "train" else 1 for c in combinations}
    if command == "compare" and settings.nodes > 1:
        raise ConfigError(f"launcher.nodes={settings.nodes}: a comparison runs on one node; for more: alignlab submit")
    if len(counts) > 1:
        raise ConfigError(f"launcher.nodes={settings.nodes}: the runs have different numbers of processes per node")
    folder = combinations[0].folder.parent / LOGS
    python = shlex.join([*settings.prefix, settings.python or sys.executable])
    try:
        executor = submitit.AutoExecutor(
            folder=folder / "%j", cluster="slurm", slurm_max_num_timeout=ALWAYS, slurm_python=python
        )
        executor.update_parameters(**_parameters(launcher.params, settings, counts.pop()))
        arguments = [(list(w), "hydra.sweep.dir", first + i, "", Singleton.get_state()) for i, w in enumerate(words)]
        with redirect_stderr(io.StringIO()):  # where submitit repeats what sbatch says
            jobs = executor.map_array(launcher, *zip(*arguments, strict=True))
    except (submitit.core.utils.FailedJobError, submitit.core.utils.FailedSubmissionError, RuntimeError) as error:
        raise AlignlabError(explain(str(error))) from error
    except (ValueError, TypeError) as error:
        raise ConfigError(f"launcher: submitit does not take these settings: {error}") from error
    return {
        c.name: {"job": job.job_id, "log": str(job.paths.stdout)} for c, job in zip(combinations, jobs, strict=True)
    }


def _parameters(params: Mapping[str, Any], settings: SlurmSettings, per_node: int) -> dict[str, Any]:
    """Submitit's, from Hydra's and ours."""
    common = ("nodes", "timeout_min")
    special = ("partition", "account", "qos", "constraint", "signal_delay_s", "array_parallelism")
    dropped = ("submitit_folder", "max_num_timeout", "mem_gb")
    from hydra_plugins.hydra_submitit_launcher.config import BaseQueueConf

    base = set(BaseQueueConf.__dataclass_fields__)
    found = {k if k in base else f"slurm_{k}": v for k, v in params.items() if k not in dropped}
    found |= {name: getattr(settings, name) for name in common}
    found |= {f"slurm_{name}": getattr(settings, name) for name in special}
    memory = {"mem": f"{math.ceil(settings.mem_gb * 1024)}M"}  # submitit's own is in whole GB
    return found | {
        "name": "alignlab",
        "tasks_per_node": per_node,
        "cpus_per_task": max(1, settings.cpus_per_task // per_node),
        "gpus_per_node": settings.gpus_per_node or None,
        "stderr_to_stdout": True,
        "slurm_setup": settings.setup or None,
        "slurm_additional_parameters": memory | settings.additional_parameters,
    }


class Jobs:
    """Which Slurm job has which run of a sweep, kept in the sweep's folder."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.path = folder, folder / JOBS

    def _known(self) -> dict[str, dict[str, str]]:
        return read(self.path)

    def add(self, found: Mapping[str, dict[str, str]]) -> None:
        write_json(self.path, self._known() | dict(found))

    def ids(self, names: Sequence[str]) -> dict[str, str]:
        known = self._known()
        return {name: known[name]["job"] for name in names if name in known}

    def active(self, names: Sequence[str], required: bool) -> dict[str, str]:
        """The jobs of these runs that are queued or at work, by the run's name.

        Args:
            required: whether it is an error that Slurm does not answer.

        Raises:
            AlignlabError: it does not.
        """
        ids = self.ids(names)
        try:
            found = _ask(ids.values())
        except AlignlabError:
            if required:
                raise
            return {}
        return {name: job for name, job in ids.items() if job in found and found[job].active}

    def wait(self, ids: Mapping[str, str], left: Callable[[], list[str]], command: str) -> Iterator[str]:
        """Until all have come to an end; what is to be said meanwhile.

        A run whose job is over without a word in its folder has failed: that is noted there.

        Args:
            left: the runs that have not.
        """
        numbers = sorted({job.partition("_")[0] for job in ids.values()})
        logs = ", ".join(f"{self.folder / LOGS}/{number}*/*.out" for number in numbers)
        yield f"Slurm job {' '.join(numbers)}: {len(ids)} runs; logs: {logs}"
        told, asked, gone = "", -math.inf, Counter[str]()
        while names := left():
            time.sleep(POLL)
            if time.monotonic() - asked < ASK:
                continue
            asked = time.monotonic()
            try:
                found = _ask(ids[name] for name in names)
            except AlignlabError as error:  # it may come back
                if told != str(error):
                    told = str(error)
                    yield told
                continue
            for name in names:
                state = found.get(ids[name], State("UNKNOWN"))
                gone[name] = 0 if state.active else gone[name] + 1
                if gone[name] == 3:  # files of another node, and the accounting, may lag
                    self._lost(name, ids[name], state, command)
            line = _summary([found[ids[name]] for name in names if ids[name] in found])
            if line and line != told:
                told = line
                yield line

    def _lost(self, name: str, job: str, state: State, command: str) -> None:
        if standing(command, self.folder / name).state != "unfinished":
            return
        log = Path(self._known()[name]["log"])
        words = "" if state.state == "CANCELLED" else last_words(log)
        failed(self.folder / name, f"Slurm job {job} ended as {state.state}{f': {words}' if words else ''}", log)


def _ask(jobs: Any) -> dict[str, State]:
    wanted = list(jobs)
    return states({job.partition("_")[0] for job in wanted}) if wanted else {}


def _summary(found: Sequence[State]) -> str:
    """`2 running, 1 pending (Resources)`."""
    waiting = {s.reason for s in found if s.state == "PENDING" and s.reason}
    counts = Counter(s.state for s in found if s.active)
    why = f" ({', '.join(sorted(waiting))})" if waiting else ""
    parts = [f"{n} {state.lower()}{why if state == 'PENDING' else ''}" for state, n in sorted(counts.items())]
    return f"Slurm: {', '.join(parts)}" if parts else ""
