"""A comparison as a graph of jobs, without a cluster: with a stand-in for Slurm's commands."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from alignlab.cli import main
from alignlab.comparison import status
from alignlab.comparison.graph.slurm import job_of
from alignlab.launch.slurm.commands import State
from tests.comparison import small
from tests.comparison.cluster import SMALL, Cluster, done

SHARED = ["base", "data", "sft", "pairs", "reward_model"]
GRAPH = {
    "base": "",
    "data": "afterok:base",
    "sft": "afterok:base:data",
    "pairs": "afterok:data:sft",
    "reward_model": "afterok:pairs:sft",
    "rejection_sampling": "afterok:data:reward_model:sft",
    "dpo": "afterok:pairs:sft",  # not the reward model, which it does not use
    "sft.evaluate": "afterok:base:reward_model:sft",
    # Each evaluation after its own training, whatever becomes of the other seeds.
    **{
        f"{name}-seed{seed}.evaluate": f"afterok:base:reward_model:{name}_{seed}:sft"
        for name in ("rejection_sampling", "dpo")
        for seed in (0, 1)
    },
}


def test_the_graph(submit: Callable[..., int], cluster: Cluster) -> None:
    """Each job waits for those whose results it reads, written down by hand."""
    assert submit() == 0
    found = cluster.graph()
    report = found.pop("report")
    assert {k: sorted(v.split(":")) for k, v in found.items()} == {k: sorted(v.split(":")) for k, v in GRAPH.items()}
    assert report.split(":")[0] == "afterany"
    assert set(report.split(":")[1:]) == set(GRAPH)


def test_what_is_done_or_in_the_queue_is_not_handed_over_again(submit: Callable[..., int], cluster: Cluster) -> None:
    submit()
    before = len(cluster.given)
    assert submit() == 0  # all in the queue
    assert len(cluster.given) == before
    done(*SHARED, "runs/dpo-seed0", "runs/sft-seed0", "runs/sft-seed1", "runs/rejection_sampling-seed0.train")
    entries = json.loads(Path("out/submitted.json").read_text())["entries"]
    ids = {name: entry["id"] for name, entry in entries.items()}
    for job in cluster.states:
        cluster.states[job] = State("COMPLETED")
    cluster.states[ids["runs/dpo-seed1"]] = State("FAILED")
    cluster.states[ids["runs/dpo-seed1.evaluate"]] = State("CANCELLED")
    cluster.states[ids["runs/rejection_sampling-seed1"]] = State("RUNNING")
    cluster.states[ids["runs/rejection_sampling-seed0.evaluate"]] = State("FAILED")
    cluster.states[ids["runs/rejection_sampling-seed1.evaluate"]] = State("PENDING", "Dependency")
    cluster.states[ids["report"]] = State("PENDING", "Dependency")
    cluster.forget()
    assert submit() == 0
    assert cluster.new == ["dpo-seed1", "rejection_sampling-seed0.evaluate", "dpo-seed1.evaluate", "report"]
    assert not any("--array" in text for _, _, text in cluster.given)  # of each one is left
    graph = {name: waits for name, waits, _ in cluster.given if name}
    again = {name: str(100 + i) for i, (name, _, _) in enumerate(cluster.given) if name}
    assert graph["dpo-seed1"] == graph["rejection_sampling-seed0.evaluate"] == ""  # all that they read is there
    assert graph["dpo-seed1.evaluate"] == f"afterok:{again['dpo-seed1']}"
    assert cluster.cancelled == [ids["report"]]  # it would have come too early
    assert set(graph["report"].removeprefix("afterany:").split(":")) == {
        *(again[n] for n in ("dpo-seed1", "rejection_sampling-seed0.evaluate", "dpo-seed1.evaluate")),
        ids["runs/rejection_sampling-seed1"].partition("_")[0],
        ids["runs/rejection_sampling-seed1.evaluate"],
    }


def test_an_evaluation_waits_for_its_own_training_wherever_that_is(
    submit: Callable[..., int], cluster: Cluster
) -> None:
    """One seed's is at work since before, the other's is handed over again."""
    submit()
    done(*SHARED)
    entries = json.loads(Path("out/submitted.json").read_text())["entries"]
    for name in ("runs/dpo-seed1", "runs/dpo-seed0.evaluate", "runs/dpo-seed1.evaluate"):
        cluster.states[entries[name]["id"]] = State("CANCELLED")
    cluster.states[entries["runs/dpo-seed0"]["id"]] = State("RUNNING")
    cluster.forget()
    submit()
    again = {name: (str(100 + i), waits) for i, (name, waits, _) in enumerate(cluster.given) if name}
    assert set(again) == {"dpo-seed1", "dpo-seed0.evaluate", "dpo-seed1.evaluate", "report"}
    assert again["dpo-seed0.evaluate"][1] == f"afterok:{entries['runs/dpo-seed0']['id']}"
    assert again["dpo-seed1.evaluate"][1] == f"afterok:{again['dpo-seed1'][0]}"


def test_a_plan_changed_while_its_jobs_wait(
    submit: Callable[..., int], cluster: Cluster, capsys: pytest.CaptureFixture[str]
) -> None:
    submit()
    capsys.readouterr()
    assert submit("model.dtype=float64") == 2
    assert capsys.readouterr().err.startswith("alignlab: out=out: sft is in the queue (job 102) as it was planned")
    assert main(["cancel", "out"]) == 0
    assert submit("model.dtype=float64") == 0


def test_nobody_else_works_in_the_folder_meanwhile(
    submit: Callable[..., int], cluster: Cluster, capsys: pytest.CaptureFixture[str]
) -> None:
    submit()
    assert main(["compare", "--config-dir", "configs", "experiment=tiny", "out=out"]) == 2
    assert capsys.readouterr().err.startswith("alignlab: out=out: 16 parts of it are in the queue")


def test_gpus_that_would_idle_are_noted(
    submit: Callable[..., int], cluster: Cluster, capsys: pytest.CaptureFixture[str]
) -> None:
    submit("launcher.stages.sft.gpus_per_node=4", "--dry-run")
    assert capsys.readouterr().err == "note: sft: several GPUs are asked for; distributed=single uses one\n"


def test_a_leaderboard_older_than_its_runs_is_made_again(submit: Callable[..., int], cluster: Cluster) -> None:
    """As where the job that was to make it failed, or an algorithm was taken out."""
    submit()
    runs = [f"runs/{name}-seed{seed}" for name in ("dpo", "rejection_sampling", "sft") for seed in (0, 1)]
    done(*SHARED, *runs[:-1])
    Path("out/leaderboard.json").write_text("{}")  # without the last one
    cluster.states = {job: State("COMPLETED") for job in cluster.states}
    assert status.parts(Path("out"))[-1].state == "done"
    time.sleep(0.01)
    done(runs[-1])
    assert status.parts(Path("out"))[-1].state == "failed"
    cluster.forget()
    submit()
    assert cluster.new == ["report"]
    Path("out/leaderboard.json").write_text("{}")
    cluster.states = {job: State("COMPLETED") for job in cluster.states}
    cluster.forget()
    submit()
    assert cluster.new == []
    submit("~comparison.algorithms.dpo")
    assert cluster.new == ["report"]


def test_stages_of_other_comparisons_are_noted(
    submit: Callable[..., int], cluster: Cluster, capsys: pytest.CaptureFixture[str]
) -> None:
    """A file of resources serves a cluster, not one comparison."""
    assert submit("launcher.stages.ppo.mem_gb=3", "--dry-run") == 0
    assert "note: launcher.stages.ppo: this comparison has no such part" in capsys.readouterr().err


NAMELESS = """
import getpass

def nameless():
    raise KeyError("uid not found")

getpass.getuser = nameless
from alignlab.launch.slurm import commands  # as every comparison does
print(commands.states(["1"]), commands.explain("Invalid account"))
"""


def test_a_user_without_a_name(tmp_path: Path) -> None:
    """As in containers: Slurm takes the number too, and nobody asks before Slurm is."""
    asked = tmp_path / "squeue"
    asked.write_text(f'#!/bin/bash\necho "$@" > {tmp_path}/asked\n')
    asked.chmod(0o755)
    environment = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    done = subprocess.run([sys.executable, "-c", NAMELESS], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("{} launcher.account: Invalid account")
    assert f"--user={os.getuid()} " in (tmp_path / "asked").read_text()


def test_what_slurm_refuses_leaves_nothing_behind(
    submit: Callable[..., int], cluster: Cluster, capsys: pytest.CaptureFixture[str]
) -> None:
    cluster.refuses["--partition=nope"] = "sbatch: error: invalid partition specified: nope"
    assert submit("launcher.stages.dpo.partition=nope") == 2
    assert "launcher.partition: invalid partition specified: nope" in capsys.readouterr().err
    assert cluster.given == []  # the jobs before it neither


def test_a_dry_run_needs_no_slurm_and_writes_nothing(
    submit: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert submit("--dry-run") == 0
    said = capsys.readouterr().out
    assert "  dpo × 2, after pairs, sft: 1 GPU, 1 core, 2 GB, 240 min" in said.splitlines()
    assert "==> dpo: runs/dpo-seed0, runs/dpo-seed1" in said.splitlines()
    assert said.count("#!/bin/bash") == len(GRAPH) + 1
    assert not Path("out").exists()
    monkeypatch.undo()
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    assert submit() == 2
    assert "there is no Slurm here (sbatch is not on the PATH)" in capsys.readouterr().err


# ------------------------------------------------------------------ resources and scripts


def test_resources_of_stages(submit: Callable[..., int], cluster: Cluster) -> None:
    """What a stage says goes before the launcher, an algorithm's before all training runs'."""
    words = [
        "stages.train.timeout_min=30",
        "stages.dpo.timeout_min=60",
        "stages.evaluate.gpus_per_node=0",
        "stages.data.gpus_per_node=1",
    ]
    words += [
        "stages.report.mem_gb=1",
        "partition=big",
        "array_parallelism=1",
        "additional_parameters.comment='to be read'",
    ]
    submit(*(f"launcher.{word}" for word in words))
    texts = {name: text for name, _, text in cluster.given}
    times = {name: next(w for w in t.splitlines() if "--time=" in w).partition("time=")[2] for name, t in texts.items()}
    assert times["rejection_sampling"] == "30"
    assert times["dpo"] == "60"
    assert times["sft"] == times["dpo-seed0.evaluate"] == "240"
    assert {name for name, t in texts.items() if "--gpus-per-node=1\n" in t} == {
        *SHARED, "dpo", "rejection_sampling",
    }  # fmt: skip
    assert "--mem=1024M\n" in texts["report"] and "--mem=2048M\n" in texts["dpo"]
    for text in texts.values():
        assert "#SBATCH --partition=big\n" in text and "#SBATCH --comment='to be read'\n" in text
    assert "#SBATCH --array=0-1%1\n" in texts["dpo"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["launcher.stages.dpo.mem=3"], "launcher.stages.dpo.mem: unknown key; did you mean 'mem_gb'?"),
        (["launcher.stages.dpo.mem_gb=-1"], "launcher.stages.dpo.mem_gb=-1"),
        (["launcher.nodes=2"], "launcher.nodes=2: sft has distributed=single"),
        (
            ["launcher.nodes=2", "distributed=ddp", "distributed.processes=3"],
            "distributed.processes=3: cannot be spread evenly over 2 nodes",
        ),
        (["launcher=local"], "launcher.cpus_per_task: unknown key of launcher=local"),
    ],
)
def test_mistakes(
    words: list[str], message: str, submit: Callable[..., int], cluster: Cluster, capsys: pytest.CaptureFixture[str]
) -> None:
    assert submit(*words) == 2
    assert capsys.readouterr().err.startswith(f"alignlab: {message}")
    assert not Path("out").exists()


def test_several_nodes_are_for_training_alone(submit: Callable[..., int], cluster: Cluster) -> None:
    submit("launcher.nodes=2", "launcher.gpus_per_node=2", "distributed=zero2")
    for name, _, text in cluster.given:
        trains = name in ("sft", "reward_model", "dpo", "rejection_sampling")
        assert ("#SBATCH --nodes=2\n" in text) == ("#SBATCH --ntasks-per-node=2\n" in text) == trains, name


def test_jobs_run_what_they_say(submit: Callable[..., int], cluster: Cluster, tmp_path: Path) -> None:
    """Each task of an array runs the node of its seed, whatever its path; logs are where status looks."""
    import submitit

    home = tmp_path / "an odd 'place'"
    home.mkdir()
    os.chdir(home)
    small.write(home, "tiny", small.EXPERIMENT)
    assert main(["submit", "--config-dir", "configs", "experiment=tiny", "out=its out", *SMALL]) == 0
    batch = next(b for b in cluster.batches if b.name == "dpo")
    (text,) = (text for name, _, text in cluster.given if name == "dpo")
    output = next(line for line in text.splitlines() if "--output" in line and line.startswith("#")).partition("=")[2]
    assert shlex.split(output) == [f"{home}/its out/slurm/%A_%a_0_log.out"]
    # What submitit would have each of them run, taken through its pickle.
    for task, seed in zip(batch.tasks, (0, 1), strict=True):
        work = submitit.core.utils.DelayedSubmission(job_of(task))
        work.dump(tmp_path / "work.pkl")
        again = submitit.core.utils.DelayedSubmission.load(tmp_path / "work.pkl").function
        assert (again.folder, again.commands) == (f"its out/runs/dpo-seed{seed}", ("train",))


def test_a_folder_that_slurm_cannot_write_to(
    submit: Callable[..., int], cluster: Cluster, capsys: pytest.CaptureFixture[str]
) -> None:
    assert submit("out='100% odd'") == 2
    assert "out=100% odd: Slurm does not write to a folder with % in its path" in capsys.readouterr().err
    assert cluster.given == []


def test_hooks_come_before_the_run(submit: Callable[..., int], cluster: Cluster) -> None:
    hooks = ["module load cuda", "export X='a b'"]
    submit(
        f"launcher.setup={json.dumps(hooks)}", "launcher.prefix=[apptainer,exec,a b.sif]", "launcher.python=python3.12"
    )
    for _, _, text in cluster.given:
        lines = text.splitlines()
        (run,) = (line for line in lines if line.startswith("srun "))
        assert " apptainer exec 'a b.sif' python3.12 -u -m submitit.core._submit " in run
        places = [lines.index(w) for w in (*hooks, run)]
        assert places == sorted(places)
        assert subprocess.run(["bash", "-n"], input=text, text=True, check=False).returncode == 0


def test_a_run_gets_its_cores(submit: Callable[..., int], cluster: Cluster) -> None:
    """Since Slurm 22.05 srun does not take them over from sbatch; threads follow, where the user has not set them."""
    submit("launcher.stages.sft.cpus_per_task=6")
    (text,) = (text for name, _, text in cluster.given if name == "sft")
    assert "#SBATCH --cpus-per-task=6\n" in text
    lines = [line for line in text.splitlines() if line.startswith("export ")]
    said = "\n".join([*lines, "echo $OMP_NUM_THREADS $SRUN_CPUS_PER_TASK"])
    for given, expected in (({}, "6 6"), ({"OMP_NUM_THREADS": "2"}, "2 6")):
        environment = {"PATH": os.environ["PATH"], "SLURM_CPUS_PER_TASK": "6", **given}
        found = subprocess.run(["bash", "-c", said], env=environment, capture_output=True, text=True, check=True)
        assert found.stdout.strip() == expected


def test_settings_of_the_launcher_are_no_part_of_the_comparison(submit: Callable[..., int], cluster: Cluster) -> None:
    """The same folder may be gone on with by `alignlab compare`: its parts are planned alike."""
    submit()
    assert "launcher" not in yaml.safe_load(Path("out/config.yaml").read_text())
    before = json.loads(Path("out/nodes.json").read_text())
    main(["cancel", "out"])
    submit("launcher.mem_gb=3")
    assert json.loads(Path("out/nodes.json").read_text()) == before
