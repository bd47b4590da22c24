"""A comparison as a graph of jobs on a real Slurm: the leaderboard that `alignlab compare` makes, whatever happens."""

from __future__ import annotations

import contextlib
import json
import sys
from pathlib import Path
from typing import Any

import pytest

from alignlab.comparison import status
from tests.comparison import small
from tests.slurm.conftest import Slurm, until

SMALL = ["launcher.cpus_per_task=1", "launcher.mem_gb=2", "launcher.gpus_per_node=0"]
TASKS = {
    *("base", "data", "sft", "pairs", "reward_model"),
    *(f"runs/{name}-seed{seed}" for name in ("sft", "dpo", "rejection_sampling") for seed in (0, 1)),
    *(f"runs/{name}-seed{seed}.evaluate" for name in ("dpo", "rejection_sampling") for seed in (0, 1)),
    "report",
}


class Home:
    """A folder with the small comparison in it, and alignlab's commands there."""

    def __init__(self, slurm: Slurm, folder: Path) -> None:
        self.slurm, self.folder = slurm, folder
        self.slurm_words = SMALL
        small.write(folder, "tiny", small.EXPERIMENT)

    def alignlab(self, *words: str, status: int = 0, **environment: str) -> str:
        """What a command says."""
        environment = {"ALIGNLAB_CACHE": str(self.folder / "cache"), "COLUMNS": "200", **environment}
        done = self.slurm.run("alignlab", *words, check=False, cwd=self.folder, environment=environment)
        assert done.returncode == status, f"{words}: {done.returncode}\n{done.stdout}\n{done.stderr}"
        return done.stdout + done.stderr

    def comparison(self, command: str, out: str, *more: str, status: int = 0, **environment: str) -> str:
        words = [command, "--config-dir", "configs", "experiment=tiny", f"out={out}", *more]
        said = self.alignlab(*words, status=status, **environment)
        if command == "submit":
            jobs = [line.split()[1].strip(":") for line in said.splitlines() if line.startswith("job ")]
            self.slurm.jobs += jobs
        return said

    def parts(self, out: str) -> dict[str, status.Part]:
        """What `alignlab status` shows; in this process, for it is asked often."""
        with contextlib.chdir(self.folder):
            return {part.name: part for part in status.parts(Path(out))}

    def ended(self, out: str, timeout: float = 300) -> dict[str, str]:
        """The states of all parts, once none is waiting or running."""

        def states() -> dict[str, str]:
            return {name: part.state for name, part in self.parts(out).items()}

        until(lambda: not {"waiting", "running"} & set(states().values()), timeout, lambda: str(self.parts(out)))
        return states()

    def rows(self, out: str) -> dict[str, dict[str, Any]]:
        return small.rows(self.folder, out)


@pytest.fixture
def home(slurm: Slurm, tmp_path: Path) -> Home:
    return Home(slurm, tmp_path)


def test_the_leaderboard_is_that_of_one_machine(home: Home, slurm: Slurm) -> None:
    """The same seeds give the same figures to the last bit: one thread each, as `alignlab compare` has them.

    On the way the job that trains the SFT policy is preempted: it is queued again, and nothing else notices.
    """
    home.comparison("submit", "jobs", *SMALL)
    queue = slurm.run("squeue", "--noheader", "--array", "--format=%j|%T|%E").stdout.splitlines()
    names = {line.split("|")[0] for line in queue}
    algorithms = {f"tiny:{name}{kind}" for name in ("dpo", "rejection_sampling") for kind in ("", ".evaluate")}
    assert {*algorithms, "tiny:sft.evaluate", "tiny:reward_model", "tiny:report"} <= names
    for line in queue:
        name, state, after = line.split("|")
        if name in {"tiny:pairs", "tiny:dpo", "tiny:dpo.evaluate"}:
            assert state == "PENDING" and "afterok" in after, line
            assert ("_" in after) == (name == "tiny:dpo.evaluate"), line  # a task of an array
    sft = json.loads((home.folder / "jobs/submitted.json").read_text())["entries"]["sft"]["id"]
    slurm.wait(sft, "RUNNING")
    slurm.preempt(["node1", "node2"])
    until(lambda: int(slurm.show(sft)["Restarts"]) == 1, 90, lambda: str(slurm.show(sft)))
    assert home.ended("jobs") == dict.fromkeys(TASKS, "done")
    entries = json.loads((home.folder / "jobs/submitted.json").read_text())["entries"]
    for name, entry in entries.items():
        assert slurm.history(entry["id"].split("_")[0])[-1]["State"] == "COMPLETED", name
        array = name.startswith("runs/") and not name.endswith(".evaluate")
        assert ("_" in entry["id"]) == (array or ("seed" in name and "sft" in name)), name
    assert "16 done" in home.alignlab("status", "jobs")
    assert "nothing to hand over" in home.comparison("submit", "jobs", *SMALL)
    home.comparison("compare", "here")
    assert home.rows("jobs") == home.rows("here")
    assert list(home.rows("jobs")) == ["rejection_sampling", "dpo", "sft"]
    # The folder is a comparison as any other: there is nothing left to do in it.
    assert "11 of 11 parts are already done" in home.comparison("compare", "jobs")


def test_a_failed_part_and_the_same_command_again(home: Home) -> None:
    """What does not need it goes on; the rest says what it needed; the same command does what is left."""
    later = home.folder / "later.jsonl"
    words = [*SMALL, f"comparison.algorithms.dpo=['algorithm=dpo','data=preferences','data.path={later}']"]
    home.comparison("submit", "jobs", *words)
    found = home.ended("jobs")
    assert {name for name, state in found.items() if state != "done"} == {
        *(f"runs/dpo-seed{seed}{part}" for seed in (0, 1) for part in ("", ".evaluate"))
    }
    parts = home.parts("jobs")
    assert parts["runs/dpo-seed1"].state == "failed"
    assert f"{later}: no such file or folder" in parts["runs/dpo-seed1"].why
    assert Path(home.folder, parts["runs/dpo-seed1"].log).exists()
    assert parts["runs/dpo-seed1.evaluate"].state == "not run"
    assert parts["runs/dpo-seed1.evaluate"].why == "needs its training"
    assert list(home.rows("jobs")) == ["rejection_sampling", "sft"]
    record = {"prompt": "the sees", "chosen": " red sees", "rejected": " fox"}
    later.write_text("\n".join(json.dumps(record) for _ in range(16)))
    said = home.comparison("submit", "jobs", *words)
    assert [line.split()[2].strip(",:") for line in said.splitlines() if line.startswith("job ")] == [
        *("dpo", "dpo-seed0.evaluate", "dpo-seed1.evaluate", "report"),
    ]
    assert set(home.ended("jobs").values()) == {"done"}
    assert set(home.rows("jobs")) == {"rejection_sampling", "sft", "dpo"}


def test_cancelling_and_going_on(home: Home, slurm: Slurm) -> None:
    home.comparison("submit", "jobs", *SMALL)
    until(lambda: home.parts("jobs")["base"].state == "done", 60, "the first part is done")
    assert "jobs cancelled" in home.alignlab("cancel", "jobs")
    assert set(home.ended("jobs", 60).values()) <= {"done", "cancelled", "not run"}
    assert "hands over again" in home.alignlab("status", "jobs", status=0)
    assert "job " in home.comparison("submit", "jobs", *SMALL)
    home.alignlab("cancel", "jobs")


def test_what_slurm_does_not_take(home: Home, slurm: Slurm) -> None:
    """The setting to blame in Slurm's own words, and nothing in the queue."""

    def jobs() -> set[str]:
        return set(slurm.run("squeue", "--noheader", "--format=%A").stdout.split())

    before = jobs()
    for word, said in {
        "launcher.partition=nope": "launcher.partition: invalid partition specified: nope",
        "launcher.account=nobody": "launcher.account: ",
        "launcher.gpus_per_node=99": "launcher.nodes, gpus_per_node, cpus_per_task or mem_gb: ",
        "launcher.stages.report.constraint=a100": "launcher.constraint: ",
    }.items():
        found = home.comparison("submit", "refused", *SMALL, word, status=2).splitlines()
        assert found[-1].startswith(f"alignlab: {said}"), found
        assert all(line.startswith("note: ") for line in found[:-1])
    assert jobs() <= before, "those of the tests before this one may be ending"


def test_without_slurm(home: Home) -> None:
    python = str(Path(sys.executable).parent)  # alignlab itself is still found
    said = home.comparison("submit", "nowhere", *SMALL, status=2, PATH=python)
    assert said.startswith("alignlab: there is no Slurm here (sbatch is not on the PATH): run this on a login node")
