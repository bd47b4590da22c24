"""How a submitted comparison goes, and what Slurm complains of, as people are told."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from alignlab.cli import main
from alignlab.comparison import status
from alignlab.launch.slurm import commands
from alignlab.launch.slurm.commands import State
from tests.comparison.cluster import Cluster, done

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
        (
            "allocation failure: Job violates accounting/QOS policy (job submit limit, user's size and/or time limits)",
            "",
        ),
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
    assert found.startswith(f"launcher{'.' if setting else ''}{setting}: ")
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
    entries = json.loads(Path("out/submitted.json").read_text())["entries"]
    Path(entries["reward_model"]["log"]).write_text("slurmstepd: error: Detected 1 oom_kill event\n")
    cluster.states[f"{ids['rejection_sampling']}_0"] = State("CANCELLED")
    cluster.states[f"{ids['dpo']}_0"] = State("FAILED", "", "0:03", "node1")
    Path(entries["runs/dpo-seed0"]["log"]).write_text(
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
    assert {p["name"]: p["state"] for p in json.loads(capsys.readouterr().out)["out"]} == {
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
    assert "nothing was submitted from here" in capsys.readouterr().err


def test_a_damaged_ledger(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "submitted.json").write_text("{")
    assert main(["status", str(tmp_path)]) == 2
    assert "submitted.json: damaged" in capsys.readouterr().err
