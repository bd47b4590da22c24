"""A comparison as a graph of jobs, without a cluster: with a stand-in for Slurm's commands."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml

from alignlab.cli import main
from alignlab.comparison import status
from alignlab.comparison.graph import finish
from alignlab.core import AlignlabError
from alignlab.launch.slurm import commands
from alignlab.launch.slurm.commands import State
from tests.comparison import small

SMALL = ["launcher.cpus_per_task=1", "launcher.mem_gb=2"]


class Cluster:
    """What Slurm would be asked, and what it answers.

    Attributes:
        given: (name of the script, its --dependency, its text), in order.
        states: by id; a job that was submitted waits.
        refuses: a word of a script that it does not take → what it says.
    """

    def __init__(self) -> None:
        self.given: list[tuple[str, str, str]] = []
        self.states: dict[str, State] = {}
        self.refuses: dict[str, str] = {}
        self.cancelled: list[str] = []

    def probe(self, script: Path) -> None:
        for word, said in self.refuses.items():
            if word in script.read_text():
                raise AlignlabError(commands.explain(said))

    def submit(self, script: Path, options: Sequence[str] = ()) -> str:
        job = str(100 + len(self.given))
        waits = next((o.removeprefix("--dependency=") for o in options if o.startswith("--dependency=")), "")
        assert bool(waits) == ("--kill-on-invalid-dep=yes" in options)
        text = script.read_text()
        self.given.append((script.stem, waits, text))
        array = next((w for w in text.splitlines() if w.startswith("#SBATCH --array=")), "").partition("=")[2]
        first, _, last = array.partition("%")[0].partition("-")
        tasks = [f"_{i}" for i in range(int(first), int(last or first) + 1)] if array else [""]
        self.states |= {job + task: State("PENDING", "Dependency" if waits else "Priority", "0:00") for task in tasks}
        return job

    def answer(self, jobs: Iterable[str]) -> dict[str, State]:
        wanted = set(jobs)
        return {name: state for name, state in self.states.items() if name.split("_")[0] in wanted}

    def cancel(self, jobs: Sequence[str]) -> None:
        self.cancelled += jobs
        self.states |= {job: State("CANCELLED") for job in jobs}

    def graph(self) -> dict[str, str]:
        """Script → what it waits for, with names for the ids, as in "afterok:sft:pairs"."""
        names = {str(100 + i): name for i, (name, _, _) in enumerate(self.given)}
        return {
            n: ":".join(names.get(w, w) for w in waits.replace(",", ":,:").split(":")) for n, waits, _ in self.given
        }

    def forget(self) -> None:
        """Begin to read anew; ids go on."""
        self.given = [("", "", "")] * len(self.given)

    @property
    def new(self) -> list[str]:
        return [name for name, _, _ in self.given if name]


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Cluster:
    found = Cluster()
    monkeypatch.setattr(commands, "probe", found.probe)
    monkeypatch.setattr(commands, "submit", found.submit)
    monkeypatch.setattr(commands, "cancel", found.cancel)
    monkeypatch.setattr("alignlab.comparison.ledger.states", found.answer)
    return found


@pytest.fixture
def submit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ALIGNLAB_CACHE", str(tmp_path / "cache"))

    def act(*words: str, experiment: dict[str, Any] = small.EXPERIMENT) -> int:
        small.write(tmp_path, "tiny", experiment)
        return main(["submit", "--config-dir", "configs", "experiment=tiny", "out=out", *SMALL, *words])

    return act


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
    "rejection_sampling.evaluate": "aftercorr:rejection_sampling:,:afterok:base:reward_model:sft",
    "dpo.evaluate": "aftercorr:dpo:,:afterok:base:reward_model:sft",
}


def test_the_graph(submit: Callable[..., int], cluster: Cluster) -> None:
    """Each job waits for those whose results it reads, written down by hand."""
    assert submit() == 0
    found = cluster.graph()
    report = found.pop("report")
    assert {k: _sorted(v) for k, v in found.items()} == {k: _sorted(v) for k, v in GRAPH.items()}
    assert report.split(":")[0] == "afterany"
    assert set(report.split(":")[1:]) == set(GRAPH)


def _sorted(waits: str) -> list[list[str]]:
    return sorted([kind, *sorted(names)] for kind, *names in (part.strip(":").split(":") for part in waits.split(",")))


def test_what_is_done_or_in_the_queue_is_not_handed_over_again(submit: Callable[..., int], cluster: Cluster) -> None:
    submit()
    before = len(cluster.given)
    assert submit() == 0  # all in the queue
    assert len(cluster.given) == before
    done(*SHARED, "runs/dpo-seed0", "runs/sft-seed0", "runs/sft-seed1", "runs/rejection_sampling-seed0.train")
    ids = {name: str(100 + i) for i, (name, _, _) in enumerate(cluster.given)}
    for job in cluster.states:
        cluster.states[job] = State("COMPLETED")
    cluster.states[f"{ids['dpo']}_1"] = State("FAILED")
    cluster.states[f"{ids['dpo.evaluate']}_1"] = State("CANCELLED")
    cluster.states[f"{ids['rejection_sampling']}_1"] = State("RUNNING")
    cluster.states[f"{ids['rejection_sampling.evaluate']}_0"] = State("FAILED")
    cluster.states[f"{ids['rejection_sampling.evaluate']}_1"] = State("PENDING", "Dependency")
    cluster.states[ids["report"]] = State("PENDING", "Dependency")
    cluster.forget()
    assert submit() == 0
    assert cluster.new == ["dpo", "rejection_sampling.evaluate", "dpo.evaluate", "report"]
    texts = {name: text for name, _, text in cluster.given if name}
    assert "#SBATCH --array=1\n" in texts["dpo"]  # the index is that of the seed, as before
    assert "#SBATCH --array=0\n" in texts["rejection_sampling.evaluate"]
    graph = {name: waits for name, waits, _ in cluster.given if name}
    again = {name: str(100 + i) for i, (name, _, _) in enumerate(cluster.given) if name}
    assert graph["dpo"] == graph["rejection_sampling.evaluate"] == ""  # all that they read is there
    assert graph["dpo.evaluate"] == f"aftercorr:{again['dpo']}"
    assert cluster.cancelled == [ids["report"]]  # it would have come too early
    assert set(graph["report"].removeprefix("afterany:").split(":")) == {
        *(again[n] for n in ("dpo", "rejection_sampling.evaluate", "dpo.evaluate")),
        *(ids[n] for n in ("rejection_sampling", "rejection_sampling.evaluate")),
    }


def test_tasks_of_an_array_that_wait_for_different_jobs_are_apart(submit: Callable[..., int], cluster: Cluster) -> None:
    """Slurm knows one dependency for a whole array: one for each of the training jobs, the old one and the new."""
    submit()
    done(*SHARED)
    ids = {name: str(100 + i) for i, (name, _, _) in enumerate(cluster.given)}
    for name in ("dpo.evaluate", "dpo"):
        for index in (0, 1):
            cluster.states[f"{ids[name]}_{index}"] = State("CANCELLED")
    cluster.states[f"{ids['dpo']}_0"] = State("RUNNING")
    cluster.forget()
    submit()
    again = {name: (str(100 + i), waits) for i, (name, waits, _) in enumerate(cluster.given) if name}
    assert set(again) == {"dpo", "dpo.evaluate", "dpo.evaluate.2", "report"}
    assert again["dpo.evaluate"][1] == f"aftercorr:{ids['dpo']}"
    assert again["dpo.evaluate.2"][1] == f"aftercorr:{again['dpo'][0]}"


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
    assert "  dpo [0, 1], after pairs, sft: 1 GPU, 1 core, 2 GB, 240 min" in said.splitlines()
    assert said.count("#!/bin/bash") == len(GRAPH) + 1
    assert not Path("out").exists()
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
    words += ["stages.report.mem_gb=1", "partition=big", "array_parallelism=1", "additional_parameters.mail-type=FAIL"]
    submit(*(f"launcher.{word}" for word in words))
    texts = {name: text for name, _, text in cluster.given}
    times = {name: next(w for w in t.splitlines() if "--time=" in w).partition("time=")[2] for name, t in texts.items()}
    assert times["rejection_sampling"] == "30"
    assert times["dpo"] == "60"
    assert times["sft"] == times["dpo.evaluate"] == "240"
    assert {name for name, t in texts.items() if "--gpus-per-node=1\n" in t} == {
        *SHARED, "dpo", "rejection_sampling",
    }  # fmt: skip
    assert "--mem=1024M\n" in texts["report"] and "--mem=2048M\n" in texts["dpo"]
    for text in texts.values():
        assert "#SBATCH --partition=big\n" in text and "#SBATCH --mail-type=FAIL\n" in text
    assert "#SBATCH --array=0-1%1\n" in texts["dpo"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["launcher.stages.ppo.mem_gb=3"], "launcher.stages.ppo: this comparison has no such part"),
        (["launcher.stages.dpo.mem=3"], "launcher.stages.dpo.mem: unknown key; did you mean 'mem_gb'?"),
        (["launcher.stages.dpo.mem_gb=-1"], "launcher.stages.dpo.mem_gb=-1"),
        (["launcher.nodes=2"], "launcher.nodes=2: sft has distributed=single"),
        (
            ["launcher.nodes=2", "distributed=ddp", "distributed.processes=3"],
            "distributed.processes=3: cannot be spread evenly over 2 nodes",
        ),
        (["launcher=local"], "launcher.cpus_per_task: is a key of launcher=slurm"),
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
        assert ("#SBATCH --nodes=2\n" in text) == ("torchrun" in text) == trains, name
        assert ("PROCESSES_PER_NODE=2\n" in text) == trains


def test_scripts_run_what_they_say(submit: Callable[..., int], cluster: Cluster, tmp_path: Path) -> None:
    """Each task of an array runs the node of its seed, whatever its path; logs are where status looks."""
    home = tmp_path / "a 100% odd 'place'"
    home.mkdir()
    os.chdir(home)
    small.write(home, "tiny", small.EXPERIMENT)
    assert main(["submit", "--config-dir", "configs", "experiment=tiny", "out=its out", *SMALL]) == 0
    fake = tmp_path / "bin"
    fake.mkdir()
    (fake / "srun").write_text('#!/bin/bash\nprintf "%s\\n" "${@: -4}" "$PREPARED" > "$SAID"\n')
    (fake / "srun").chmod(0o755)
    script = next(Path("its out/slurm").glob("dpo.sbatch"))
    environment = os.environ | {"PATH": f"{fake}:{os.environ['PATH']}", "SLURM_ARRAY_TASK_ID": "1"}
    environment |= {"SLURM_JOB_ID": "7", "SLURM_ARRAY_JOB_ID": "7", "SAID": str(tmp_path / "said"), "PREPARED": "-"}
    subprocess.run(["bash", str(script)], env=environment, check=True, timeout=60)
    said = (tmp_path / "said").read_text().splitlines()
    assert said == ["alignlab", "node", "its out/runs/dpo-seed1", "train", "-"]
    entry = json.loads(Path("its out/submitted.json").read_text())["entries"]["runs/dpo-seed1"]
    assert entry["log"] == "its out/slurm/dpo-1.log"
    output = next(w for w in script.read_text().splitlines() if "--output" in w).partition("=")[2]
    assert output == f'"{home}/its out/slurm/dpo-%a.log"'.replace("100%", "100%%")


def test_hooks_come_before_the_run(submit: Callable[..., int], cluster: Cluster) -> None:
    hooks = ["module load cuda", "export X='a b'"]
    submit(
        f"launcher.setup={json.dumps(hooks)}", "launcher.prefix=[apptainer,exec,a b.sif]", "launcher.python=python3.12"
    )
    for _, _, text in cluster.given:
        lines = text.splitlines()
        places = [
            lines.index(w) for w in (*hooks, "PREFIX=(apptainer exec 'a b.sif')", "PYTHON=python3.12", "# ---- run")
        ]
        assert places == sorted(places)
        assert subprocess.run(["bash", "-n"], input=text, text=True, check=False).returncode == 0


# ------------------------------------------------------------------ what Slurm says


@pytest.mark.parametrize(
    ("said", "setting"),
    [
        (
            "sbatch: error: invalid partition specified: nope\nsbatch: error: Invalid partition name specified",
            "partition",
        ),
        ("allocation failure: Invalid account or account/partition combination specified", "account"),
        ("sbatch: error: Batch job submission failed: Invalid qos specification", "qos"),
        ("sbatch: error: Batch job submission failed: Invalid generic resource (gres) specification", "gpus_per_node"),
        ("allocation failure: Invalid feature specification", "constraint"),
        ("allocation failure: Requested time limit is invalid (missing or exceeds some limit)", "timeout_min"),
        (
            "allocation failure: Requested node configuration is not available",
            "nodes, gpus_per_node, cpus_per_task or mem_gb",
        ),
    ],
)
def test_complaints_name_the_setting(said: str, setting: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")  # what there is to choose from cannot be asked for
    found = commands.explain(said)
    assert found.startswith(f"launcher.{setting}: ")
    assert "error:" not in found


def test_ids_of_tasks_that_have_not_begun() -> None:
    assert commands._tasks("12_[0-2,5%4]") == ["12_0", "12_1", "12_2", "12_5"]
    assert commands._tasks("12_3") == ["12_3"]
    assert commands._tasks("12") == ["12"]


# ------------------------------------------------------------------ status


def test_states_of_parts(submit: Callable[..., int], cluster: Cluster, capsys: pytest.CaptureFixture[str]) -> None:
    submit()
    done("base", "data", "sft")
    ids = {name: str(100 + i) for i, (name, _, _) in enumerate(cluster.given)}
    cluster.states |= {ids[name]: State("COMPLETED") for name in ("base", "data", "sft")}
    cluster.states[ids["pairs"]] = State("RUNNING", "", "0:42", "node7")
    cluster.states[ids["reward_model"]] = State("OUT_OF_MEMORY", "", "1:00", "node7")
    Path("out/slurm/reward_model.log").write_text("slurmstepd: error: Detected 1 oom_kill event\n")
    cluster.states[f"{ids['rejection_sampling']}_0"] = State("CANCELLED")
    cluster.states[f"{ids['dpo']}_0"] = State("FAILED", "", "0:03", "node1")
    Path("out/slurm/dpo-0.log").write_text(
        "alignlab: pairs.jsonl:3: no key 'chosen'\nsrun: error: node1: task 0: Exited\n"
    )
    cluster.states[f"{ids['dpo']}_1"] = State("RUNNING", "", "0:05", "node2")
    folder = Path("out/runs/dpo-seed1")
    (folder / "metrics.jsonl").write_text(json.dumps({"step": 3, "time": 1.0, "trained_tokens": 40}) + "\n")
    del cluster.states[ids["sft.evaluate"] + "_0"]
    found = {part.name: part for part in status.parts(Path("out"))}
    assert [found[n].state for n in ("base", "data", "sft")] == ["done"] * 3
    assert (found["pairs"].state, found["pairs"].nodes, found["pairs"].elapsed) == ("running", "node7", "0:42")
    assert found["reward_model"].state == "failed"
    assert "launcher.mem_gb" in found["reward_model"].why
    assert (found["runs/rejection_sampling-seed0"].state, found["runs/rejection_sampling-seed0"].why) == (
        "not run",
        "needs reward_model",
    )
    assert found["runs/rejection_sampling-seed1"].state == "waiting"
    assert found["runs/dpo-seed0"].why == "FAILED: pairs.jsonl:3: no key 'chosen'"
    assert found["runs/dpo-seed1"].progress == "step 3, 40 of 100 trained tokens"
    assert found["runs/dpo-seed1.evaluate"].why == "after reward_model, its training"
    assert found["runs/sft-seed0"].state == "failed"
    assert "no longer knows" in found["runs/sft-seed0"].why
    assert found["report"].why == "when all others have ended"
    capsys.readouterr()
    assert main(["status", "out"]) == 1
    said = capsys.readouterr().out
    assert "out: 3 done, 2 running, " in said
    assert main(["status", "out", "--json"]) == 0
    assert {p["name"]: p["state"] for p in json.loads(capsys.readouterr().out)} == {
        n: p.state for n, p in found.items()
    }


def test_cancelling(submit: Callable[..., int], cluster: Cluster, capsys: pytest.CaptureFixture[str]) -> None:
    submit()
    cluster.states["100"] = State("COMPLETED")
    assert main(["cancel", "out"]) == 0
    assert "100" not in cluster.cancelled
    assert len(cluster.cancelled) == len(cluster.states) - 1
    assert {p.state for p in status.parts(Path("out"))} <= {"failed", "cancelled", "not run"}
    assert main(["cancel", "out"]) == 0
    assert "0 jobs cancelled" in capsys.readouterr().out


@pytest.mark.parametrize("command", ["status", "cancel"])
def test_where_nothing_was_submitted(command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([command, str(tmp_path)]) == 2
    assert "no comparison was submitted from here" in capsys.readouterr().err


def test_a_damaged_ledger(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "submitted.json").write_text("{")
    assert main(["status", str(tmp_path)]) == 2
    assert "submitted.json: damaged" in capsys.readouterr().err


def test_settings_of_the_launcher_are_no_part_of_the_comparison(submit: Callable[..., int], cluster: Cluster) -> None:
    """The same folder may be gone on with by `alignlab compare`: its parts are planned alike."""
    submit()
    assert "launcher" not in yaml.safe_load(Path("out/config.yaml").read_text())
    before = json.loads(Path("out/nodes.json").read_text())
    main(["cancel", "out"])
    submit("launcher.mem_gb=3")
    assert json.loads(Path("out/nodes.json").read_text()) == before
