"""Slurm's commands: ask how jobs stand, and end them. What goes wrong is said with a way out."""

from __future__ import annotations

import getpass
import os
import re
import shutil
import subprocess
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from alignlab.core import AlignlabError

ABSENT = (
    "there is no Slurm here ({why}): run this on a login node of your cluster, try it on a "
    "cluster of virtual nodes on this machine (slurm/local-cluster.sh start), or do without: alignlab compare for "
    "comparisons, launcher=local for sweeps"
)

UNCONFIGURED = ("Could not establish a configuration source", "resolve_ctls_from_dns_srv")
"""Part of what Slurm's commands say where no cluster is configured."""

QUEUED = frozenset({"PENDING", "REQUEUED", "REQUEUE_HOLD", "REQUEUE_FED", "SPECIAL_EXIT", "RESV_DEL_HOLD"})
GOING = frozenset(
    {"RUNNING", "CONFIGURING", "COMPLETING", "SUSPENDED", "STOPPED", "RESIZING", "SIGNALING", "STAGE_OUT"}
)

PATIENCE = 60
"""Seconds that a command of Slurm's may take before its controller counts as dead."""

ABOUT = {
    "accounting/qos": "launcher",
    "account": "launcher.account",
    "partition": "launcher.partition",
    "qos": "launcher.qos",
    "gres": "launcher.gpus_per_node",
    "feature": "launcher.constraint",
    "time limit": "launcher.timeout_min",
    **dict.fromkeys(
        ("node configuration", "node count", "memory"), "launcher.nodes, gpus_per_node, cpus_per_task or mem_gb"
    ),
}
"""A word in what Slurm complains of → the settings it is about."""


@dataclass(frozen=True)
class State:
    """Where a job, or a task of an array, stands.

    Attributes:
        state: Slurm's word, as in RUNNING.
        reason: why it waits, as in Dependency; "" otherwise.
        elapsed: time of the present attempt, as Slurm writes it.
        nodes: where it runs or ran.
    """

    state: str
    reason: str = ""
    elapsed: str = ""
    nodes: str = ""

    @property
    def active(self) -> bool:
        """Whether it is in the queue: waiting or going on."""
        return self.state in QUEUED | GOING


def require() -> None:
    """
    Raises:
        AlignlabError: Slurm is not here.
    """
    if shutil.which("sbatch") is None:
        raise AlignlabError(ABSENT.format(why="sbatch is not on the PATH"))


def probe(script: str) -> None:
    """Ask whether Slurm would take a batch script, without handing it over.

    Raises:
        AlignlabError: it would not.
    """
    _run(["sbatch", "--test-only"], script)


def states(jobs: Iterable[str]) -> dict[str, State]:
    """Where jobs stand, by id; tasks of arrays as JOB_TASK. A job that Slurm no longer knows is left out.

    Raises:
        AlignlabError: Slurm does not answer.
    """
    ids = sorted(set(jobs))
    if not ids:
        return {}
    found: dict[str, State] = {}
    # `--array`: a line for each task that waits. Old ids among the jobs make squeue fail where it is given ids.
    queue = _run(["squeue", "--noheader", "--array", f"--user={_user()}", "--format=%i|%T|%r|%M|%N"])
    for line in queue.splitlines():
        name, state, reason, elapsed, nodes = (part.strip() for part in line.split("|"))
        if name.split("_")[0] in ids:
            found[name] = State(state, "" if reason == "None" else reason, elapsed, nodes)
    return _finished(ids) | found


def _finished(ids: Sequence[str]) -> dict[str, State]:
    """What the accounting says of jobs; nothing where there is none."""
    asked = [f"--jobs={','.join(ids)}", "--format=JobID,State,Elapsed,NodeList"]
    try:
        said = _run(["sacct", "--noheader", "--parsable2", "--allocations", *asked])
    except AlignlabError:
        return {}
    found = {}
    for line in said.splitlines():
        name, state, elapsed, nodes = line.split("|")
        where = "" if nodes == "None assigned" else nodes
        for each in _tasks(name):
            found[each] = State(state.split()[0], "", elapsed.removeprefix("00:"), where)
    return found


def _tasks(name: str) -> list[str]:
    """`12_[0-2,5%4]` → 12_0, 12_1, 12_2, 12_5: tasks that have not begun are one entry."""
    array = re.fullmatch(r"(\d+)_\[([\d,-]+)(?:%\d+)?\]", name)
    if array is None:
        return [name]
    found = []
    for part in array[2].split(","):
        first, _, last = part.partition("-")
        found += [f"{array[1]}_{i}" for i in range(int(first), int(last or first) + 1)]
    return found


def cancel(jobs: Sequence[str]) -> None:
    """Cancel jobs and tasks of arrays. Those that have ended meanwhile are no error."""
    if jobs:
        _run(["scancel", *jobs])


def _user() -> str:
    """The user's name, or number where a container has no name for it."""
    try:
        return getpass.getuser()
    except (KeyError, OSError):
        return str(os.getuid())


def _run(words: Sequence[str], text: str = "") -> str:
    try:
        done = subprocess.run(words, capture_output=True, text=True, timeout=PATIENCE, input=text)
    except FileNotFoundError as error:
        raise AlignlabError(ABSENT.format(why=f"{words[0]} is not on the PATH")) from error
    except subprocess.TimeoutExpired as error:
        raise AlignlabError(
            f"{words[0]}: Slurm's controller has not answered for {PATIENCE} s: try again later"
        ) from error
    if done.returncode:
        raise AlignlabError(explain(done.stderr.strip() or done.stdout.strip(), words[0]))
    return done.stdout


def explain(said: str, command: str = "sbatch") -> str:
    """What a command of Slurm's complains of, with the setting that it is about."""
    if any(saying in said for saying in UNCONFIGURED):
        return ABSENT.format(why=f"{command} is installed and knows of no cluster")
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    errors = [re.sub(r"^(\w+: )?(error: )?", "", line) for line in lines if "error" in line.lower()] or lines[-1:]
    errors = [error.removeprefix("Batch job submission failed: ") for error in errors]
    text = "; ".join(dict.fromkeys(errors)) or f"{command} failed"
    return f"{next((setting for word, setting in ABOUT.items() if word in text.lower()), command)}: {text}"
