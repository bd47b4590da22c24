"""Sweeps through `launcher=slurm`, on a real Slurm: spread over nodes, skipped when done, queued again and the same."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.components import need
from tests.slurm.conftest import REPOSITORY, Slurm, until
from tests.slurm.pace import HOLD
from tests.sweeps import helpers as sweeps
from tests.training import runs

need("submitit")

SMALL = ["launcher=slurm", "launcher.gpus_per_node=0", "launcher.cpus_per_task=1", "launcher.mem_gb=2"]
SLOW = ["scoring.function.path=tests.slurm.pace.count_of_a", "training.progress=off", "training.steps=6"]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("slurm-sweeps")
    runs.prepare(folder)
    return folder


def words(home: Path, out: str, *more: str, algorithm: str = "sft") -> list[str]:
    return [sys.executable, "-m", "alignlab", "train", "-m", *runs.words_for(home, algorithm, out, *more)]


def jobs(folder: Path) -> dict[str, str]:
    """Run → Slurm job."""
    path = folder / "submitted.json"
    return {name: entry["id"] for name, entry in entries(folder).items()} if path.exists() else {}


def entries(folder: Path) -> dict[str, dict[str, str]]:
    found: dict[str, dict[str, str]] = json.loads((folder / "submitted.json").read_text())["entries"]
    return found


def steps(folder: Path) -> list[int]:
    return [line["step"] for line in sweeps.lines(folder)] if (folder / "metrics.jsonl").exists() else []


def test_four_runs_on_two_nodes(slurm: Slurm, home: Path) -> None:
    """Each wants half of a node's GPUs: two fit on one. Told in one table; repeated, nothing is submitted."""
    more = ["optimizer.lr=0.01,0.05", "training.seed=0,1", "launcher=slurm", "launcher.gpus_per_node=2"]
    command = words(home, "grid", *more, "launcher.mem_gb=2", "launcher.cpus_per_task=1")
    done = slurm.run(*command)
    folder = home / "grid"
    table = sweeps.table(folder)
    assert sorted(table) == [f"optimizer.lr={lr},training.seed={seed}" for lr in (0.01, 0.05) for seed in (0, 1)]
    for name, row in table.items():
        assert row["state"] == "finished"
        assert float(row["loss"]) == sweeps.lines(folder / name)[-1]["loss"]
    assert "best: " in done.stdout
    (array,) = {job.partition("_")[0] for job in jobs(folder).values()}
    assert f"Slurm job {array}: 4 runs; logs: {folder}/slurm/{array}_*.out" in done.stderr
    # A run has ended when its result is there; its job, and the accounting, a moment later.
    until(lambda: [row["State"] for row in slurm.history(array)] == ["COMPLETED"] * 4, 30, "all have ended")
    history = slurm.history(array, "AllocTRES")
    assert sorted(row["NodeList"] for row in history) == ["node1", "node1", "node2", "node2"]
    assert all("gres/gpu=2" in row["AllocTRES"] for row in history)

    before = slurm.run("sacct", "-XnP", "-o", "JobID").stdout
    again = slurm.run(*command)
    assert "4 of 4 runs are already finished" in again.stderr
    assert slurm.run("sacct", "-XnP", "-o", "JobID").stdout == before
    assert sweeps.table(folder) == table


def test_queued_again_a_run_ends_as_if_undisturbed(slurm: Slurm, home: Path, tmp_path: Path) -> None:
    """At submitit's signal, at a bare SIGTERM as some clusters preempt, but not when it is cancelled. Meanwhile the
    sweep is stopped: its jobs go on, another launcher leaves them alone, and repeated it waits for them."""
    hold = tmp_path / "hold"
    environment = slurm.environment(**{HOLD: str(hold)})
    common = ["training.seed=0,1,2", *SLOW]
    done = subprocess.run(
        words(home, "quick", *common, algorithm="rloo"), env=environment, cwd=REPOSITORY, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    folder = home / "held"
    command = words(home, "held", *common, *SMALL, algorithm="rloo")
    hold.write_text("0.4")
    sweep = subprocess.Popen(command, env=environment, cwd=REPOSITORY, stderr=subprocess.PIPE, text=True)
    names = [f"training.seed={seed}" for seed in range(3)]
    until(lambda: all(len(steps(folder / name)) >= 2 for name in names), 120, "all runs are at their second step")
    # The last task of an array has the number of the whole array in SLURM_JOB_ID: it must not ask about the others.
    cancelled, by_usr2, by_term = (jobs(folder)[name] for name in names)

    hold.write_text("1.5")  # 18 s a step: they are to be at work while the commands below begin
    sweep.send_signal(signal.SIGINT)
    assert sweep.wait(60) == 130
    assert sweep.stderr is not None
    array = by_usr2.partition("_")[0]
    assert f"Slurm job {array} goes on: scancel {array} stops it; the same command waits" in sweep.stderr.read()
    other = slurm.run(*words(home, "held", *common, algorithm="rloo"), check=False)
    assert other.returncode == 2
    assert f"3 parts of it are in the queue (training.seed=0: Slurm job {cancelled}, …)" in other.stderr
    assert slurm.run("alignlab", "status", str(folder)).stdout.count("running") >= 3  # and how far they are

    slurm.run("scancel", "--signal=TERM", by_term)  # while the others are at work
    until(lambda: slurm.show(by_term)["Restarts"] == "1", 120, "it is queued again")
    slurm.run("scancel", "--signal=USR2", by_usr2)
    slurm.run("scancel", cancelled)
    until(lambda: slurm.show(by_usr2)["Restarts"] == "1", 120, "it is queued again too")
    saved = [len(steps(folder / name)) for name in names[1:]]
    assert all(0 < count < 6 for count in saved)
    hold.unlink()
    again = slurm.run(*command, check=False, environment={HOLD: str(hold)})
    assert again.returncode in (0, 1), again.stderr
    assert sorted(jobs(folder)) == names
    assert [jobs(folder)[name] for name in names[1:]] == [by_usr2, by_term]  # not submitted a second time
    for name, job in zip(names[1:], (by_usr2, by_term), strict=True):
        log = Path(entries(folder)[name]["log"]).read_text()
        assert f"job {job} is queued again and goes on from its checkpoint" in log
        assert steps(folder / name) == [1, 2, 3, 4, 5, 6]
        assert runs.identical(runs.weights(folder, name), runs.weights(home / "quick", name))
    assert slurm.history(cancelled)[-1]["State"].startswith("CANCELLED")
    assert len(slurm.history(cancelled)) == 1  # it was not queued again
    last = slurm.run(*command, environment={HOLD: str(hold)})
    assert last.returncode == 0
    assert runs.identical(runs.weights(folder, names[0]), runs.weights(home / "quick", names[0]))


def test_a_run_over_two_nodes(slurm: Slurm, home: Path) -> None:
    """Of each run two tasks on each node, which submitit's srun starts, are its four processes."""
    nodes = ["launcher.nodes=2", "distributed=ddp", "distributed.processes=4", "optimizer.lr=0.01,0.05"]
    slurm.run(*words(home, "nodes", *SMALL, *nodes, "launcher.cpus_per_task=2"))
    for lr in (0.01, 0.05):
        result = json.loads((home / f"nodes/optimizer.lr={lr}/result.json").read_text())
        assert (result["processes"], result["engine"]) == (4, "DistributedDataParallel")
    history = slurm.history(jobs(home / "nodes")["optimizer.lr=0.01"].partition("_")[0])
    assert {row["NodeList"] for row in history} == {"node[1-2]"}


def test_a_search_prunes_through_jobs(slurm: Slurm, home: Path) -> None:
    search = [
        "sweeper=optuna",
        "sweeper.trials=6",
        "sweeper.batch=3",
        "sweeper.pruner=median",
        "sweeper.startup_trials=2",
    ]
    space = ["optimizer.lr=tag(log,interval(1e-4,1))", "training.eval_every=1", "data.validation=0.3"]
    slurm.run(*words(home, "search", *SMALL, *search, *space))
    table = sweeps.table(home / "search")
    assert sorted(table) == [f"trial-{n:04}" for n in range(6)]
    assert {row["state"] for row in table.values()} <= {"finished", "pruned"}
    assert sum(row["state"] == "finished" for row in table.values()) >= 2


def test_what_a_user_sees_of_mistakes(slurm: Slurm, home: Path) -> None:
    for more, message in (
        (["launcher.partition=nosuch"], "alignlab: launcher.partition: invalid partition specified: nosuch"),
        (["launcher.account=nobody"], "alignlab: launcher.account: "),
        (["launcher.gpus_per_node=9"], "alignlab: launcher."),
        (["launcher.nodes=2"], "launcher.nodes=2: training.seed=0 has distributed=single, one process"),
    ):
        done = slurm.run(*words(home, "mistaken", *SMALL, "training.seed=0,1", *more), check=False)
        assert done.returncode in (1, 2)
        assert message in done.stderr
        assert "Traceback" not in done.stderr
        if done.returncode == 2:
            assert done.stderr.count("\n") == 1, done.stderr
    assert not jobs(home / "mistaken")


def test_slurm_that_does_not_answer(slurm: Slurm, home: Path) -> None:
    path = os.pathsep.join(str(p) for p in (Path(sys.executable).parent, home))
    done = slurm.run(*words(home, "absent", *SMALL, "training.seed=0,1"), check=False, environment={"PATH": path})
    assert done.returncode == 2
    assert done.stderr.startswith("alignlab: there is no Slurm here (sbatch is not on the PATH)")
