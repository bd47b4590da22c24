"""A real Slurm to test against: the cluster of slurm/local-cluster.sh, never another one."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from tests.components import missing

REPOSITORY = Path(__file__).parents[2]
START = "slurm/local-cluster.sh start (root, on Debian or Ubuntu)"
CONF = Path(os.environ.get("SLURM_CONF", "/etc/slurm/slurm.conf"))
MARK = "# written by slurm/local-cluster.sh"
ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "OUT_OF_MEMORY", "DEADLINE", "BOOT_FAIL")
"""States after which nothing more comes. (PREEMPTED, NODE_FAIL and REQUEUED are followed by PENDING.)"""


@pytest.fixture(scope="session")
def slurm() -> Iterator[Slurm]:
    """The local cluster, idle. Skips where none runs, and fails instead where ALIGNLAB_REQUIRE_COMPONENTS=1."""
    if problem := _problem():
        missing(problem)
    cluster = Slurm()
    yield cluster
    if cluster.jobs:
        cluster.run("scancel", *cluster.jobs)


def _problem() -> str:
    """Why no job may be submitted here; empty where all is well."""
    if shutil.which("sbatch") is None:
        return f"Slurm is not installed here: {START}"
    try:  # without a controller they wait for one, without a configuration for a name server
        found = subprocess.run(["scontrol", "show", "config"], capture_output=True, text=True, timeout=15)
        alive = subprocess.run(["sinfo", "--noheader"], capture_output=True, text=True, timeout=15)
    except subprocess.TimeoutExpired:
        return f"no Slurm answers here: {START}"
    if found.returncode or alive.returncode:
        return f"no Slurm answers here: {START}"
    values = dict(line.split("=", 1) for line in found.stdout.splitlines() if "=" in line)
    config = {name.strip(): value.strip() for name, value in values.items()}
    if Path(config.get("SLURM_CONF", "")) != CONF or not CONF.read_text().startswith(MARK):
        return f"the Slurm here ({config.get('ClusterName')}) is not ours to submit tests to; for one that is: {START}"
    return ""


def until(met: Callable[[], Any], timeout: float, what: str | Callable[[], str]) -> Any:
    """What `met` returns, once it is true.

    Raises:
        AssertionError: not within `timeout` seconds; says what was waited for.
    """
    deadline = time.monotonic() + timeout
    while not (found := met()):
        assert time.monotonic() < deadline, f"not within {timeout:g} s: {what if isinstance(what, str) else what()}"
        time.sleep(0.25)
    return found


@dataclass
class Slurm:
    """The commands of a cluster, for tests.

    Attributes:
        jobs: numbers of those submitted here; whatever of them is left is cancelled at the end.
    """

    jobs: list[str] = field(default_factory=list)

    def run(self, *words: str, check: bool = True, **options: Any) -> subprocess.CompletedProcess[str]:
        """A command to its end, and what it said; from the repository, with its Python first on the path."""
        environment = self.environment(**options.pop("environment", {}))
        done = subprocess.run(
            words, capture_output=True, text=True, timeout=300, env=environment, **{"cwd": REPOSITORY, **options}
        )
        assert not check or done.returncode == 0, f"{' '.join(words)}: {done.stdout}{done.stderr}"
        return done

    @staticmethod
    def environment(**more: str) -> dict[str, str]:
        """What jobs inherit: this interpreter as `python`, one thread, our modules."""
        path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        values = {"PATH": path, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY), "PYTHONWARNINGS": "ignore"}
        return {**os.environ, **values, **more}

    def sbatch(self, *words: str, **environment: str) -> str:
        """Submit a batch script; the job's number."""
        job = self.run("sbatch", "--parsable", *words, environment=environment).stdout.strip()
        self.jobs.append(job)
        return job

    def show(self, job: str) -> dict[str, str]:
        """What the controller knows of a job, by field."""
        line = self.run("scontrol", "--oneliner", "show", "job", job).stdout.strip()
        return dict(word.split("=", 1) for word in line.split(" ") if "=" in word)

    def state(self, job: str) -> str:
        return self.show(job)["JobState"]

    def wait(self, job: str, *states: str, timeout: float = 120) -> str:
        """Wait until a job has one of these states (default: until it has ended); which one."""
        wanted = states or ENDED
        until(lambda: self.state(job) in wanted, timeout, lambda: f"job {job} {wanted}: it is {self.show(job)}")
        return self.state(job)

    def history(self, job: str, *columns: str) -> list[dict[str, str]]:
        """Each time a job ran, the first one first: `State`, `ExitCode`, `NodeList` and more columns, from accounting.

        Accounting lags behind; this waits until the last time has ended there.
        """
        names = ["JobIDRaw", "State", "ExitCode", "NodeList", *columns]

        def read() -> list[dict[str, str]]:
            found = self.run("sacct", "-DXnP", "-j", job, f"--format={','.join(names)}").stdout
            lines = [dict(zip(names, line.split("|"), strict=True)) for line in found.splitlines()]
            return lines if lines and lines[-1]["State"].split(" ")[0] in ENDED else []

        return until(read, 30, f"job {job} has ended in sacct")

    @contextmanager
    def configured(self, **values: str) -> Iterator[None]:
        """Other settings of the cluster, for as long as the block lasts; an empty one is left out."""
        before = CONF.read_text()
        kept = [line for line in before.splitlines() if line.partition("=")[0] not in values]
        try:
            CONF.write_text("\n".join([*kept, *(f"{name}={value}" for name, value in values.items() if value)]) + "\n")
            self.run("scontrol", "reconfigure")
            yield
        finally:
            CONF.write_text(before)
            self.run("scontrol", "reconfigure")

    def restore(self) -> None:
        """Start again what of the cluster was killed, and take back nodes that are down."""
        lines = CONF.read_text().splitlines()
        first_port = next(line for line in lines if line.startswith("SlurmctldPort="))
        own = {
            "ALIGNLAB_SLURM": str(self.folder()),
            "ALIGNLAB_SLURM_CONF": str(CONF.parent),
            "ALIGNLAB_SLURM_PORT": first_port.partition("=")[2],
        }
        self.run("scontrol", "update", "nodename=ALL", "state=resume", check=False)  # says so of those that are up
        self.run("slurm/local-cluster.sh", "start", environment=own)

    @staticmethod
    def folder() -> Path:
        """Where the cluster's daemons keep their files."""
        return Path(CONF.read_text().splitlines()[0].removeprefix(f"{MARK} for "))

    def preempt(self, nodes: Sequence[str]) -> str:
        """Have a job of higher priority take these nodes for a second; its number."""
        whole = ("--partition=high", "--exclusive", "--mem=100", "--time=1", "--output=/dev/null")
        return self.sbatch(*whole, f"--nodes={len(nodes)}", f"--nodelist={','.join(nodes)}", "--wrap=sleep 1")
