"""The main job on a language of five words: in one go, interrupted, changed, failing. Nodes are forked, not spawned."""

from __future__ import annotations

import csv
import json
import os
import shutil
import signal
import statistics
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from alignlab.cli import main
from alignlab.comparison.graph import local, node, work
from alignlab.comparison.graph.node import Command, Node
from alignlab.config import config_folder
from tests import tiny
from tests.comparison.small import (
    BATCH,
    BUDGET,
    COSTS,
    EXPERIMENT,
    LONGEST,
    PARTS,
    RUNS,
    board,
    changed,
    command,
    compare,
    log_of,
    rows,
    write,
)
from tests.training import forks


@pytest.fixture(scope="module")
def whole(home: Path) -> str:
    """An undisturbed comparison."""
    status, parts = compare(home, "whole")
    assert status == 0, log_of(home, "whole")
    assert parts == sorted([*PARTS, *RUNS])
    return "whole"


# ------------------------------------------------------------------ in one go


def test_the_leaderboard_has_what_scripts_rely_on(home: Path, whole: str) -> None:
    found = board(home, whole)
    assert found["benchmark"] == "exact"
    assert found["budget"]["trained_tokens"] == BUDGET
    assert {row["algorithm"] for row in found["rows"]} == {"sft", "rejection_sampling", "dpo"}
    for row in found["rows"]:
        assert row["seeds"] == [0, 1]
        for figure in ("reward", "kl", "win_rate", "frontier_efficiency", "objective_score", *COSTS):
            assert figure in row, figure
        for figure in ("reward", "kl", "objective_score"):
            assert row[f"{figure}_low"] <= row[figure] <= row[f"{figure}_high"]
        assert 0 <= row["reward"] <= 1
        assert row["kl"] >= 0
        assert row["objective_score"] <= 1 + 1e-6
    scores = [row["objective_score"] for row in found["rows"]]
    assert scores == sorted(scores, reverse=True)
    for name in ("leaderboard.csv", "leaderboard.md", "report.html"):
        assert "rejection_sampling" in (home / whole / name).read_text()
    with (home / whole / "leaderboard.csv").open() as file:
        assert {line["algorithm"] for line in csv.DictReader(file)} == {"sft", "rejection_sampling", "dpo"}


def test_rows_are_means_of_the_runs(home: Path, whole: str) -> None:
    for name, row in rows(home, whole).items():
        evaluations = [json.loads((home / whole / f"runs/{name}-seed{s}/evaluation.json").read_text()) for s in (0, 1)]
        for figure in ("reward", "kl", "win_rate", "objective_score"):
            assert row[figure] == pytest.approx(statistics.mean(e[figure] for e in evaluations), abs=1e-9)


def test_the_baseline_is_the_reference_itself(home: Path, whole: str) -> None:
    sft = rows(home, whole)["sft"]
    assert sft["kl"] == pytest.approx(0, abs=1e-6)
    assert sft["win_rate"] == pytest.approx(0.5, abs=1e-6)
    assert sft["objective_score"] == pytest.approx(0, abs=1e-6)
    others = [row for name, row in rows(home, whole).items() if name != "sft"]
    assert all(row["kl"] > 1e-4 for row in others)  # they have moved


def test_all_start_from_the_same_checkpoint_and_see_the_same_data(home: Path, whole: str) -> None:
    out = home / whole
    for folder in sorted((out / "runs").iterdir()):
        plan = json.loads((folder / "node.json").read_text())["commands"]
        train, evaluate = (next((c for k, c in plan if k == kind), None) for kind in ("train", "evaluate"))
        assert evaluate is not None and evaluate["reference"] == f"{out}/sft/model"
        if folder.name.startswith("sft-"):
            assert train is None and evaluate["run"] == f"{out}/sft/model"
            continue
        saved = yaml.safe_load((folder / "config.yaml").read_text())
        assert saved["model"]["path"] == f"{out}/sft/model"
        assert saved["training"]["seed"] == int(folder.name[-1])
        assert saved["data"]["path"] == {
            "dpo": f"{out}/pairs/groups.jsonl",
            "rejection_sampling": f"{out}/data/prompts.jsonl",
        }.get(folder.name.rsplit("-seed", 1)[0])
    pairs = [json.loads(line) for line in (out / "pairs/groups.jsonl").read_text().splitlines()]
    assert len(pairs) == 4 * 8 * 2  # prompts, copies, rounds


def test_budgets_are_kept(home: Path, whole: str) -> None:
    """The step that reaches the budget is the last: at most one batch over."""
    for name, responses in (("dpo", 2), ("rejection_sampling", 1)):
        for seed in (0, 1):
            folder = home / whole / f"runs/{name}-seed{seed}"
            tokens = json.loads((folder / "result.json").read_text())["trained_tokens"]
            assert BUDGET <= tokens < BUDGET + BATCH * responses * LONGEST
            lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
            assert lines[-2]["trained_tokens"] < BUDGET <= lines[-1]["trained_tokens"] == tokens
            row = rows(home, whole)[name]
            assert row["trained_tokens"] == pytest.approx(
                statistics.mean(
                    json.loads((home / whole / f"runs/{name}-seed{s}/result.json").read_text())["trained_tokens"]
                    for s in (0, 1)
                )
            )


# ------------------------------------------------------------------ again


def test_repeating_the_command_runs_nothing(home: Path, whole: str) -> None:
    before = board(home, whole)
    assert compare(home, whole) == (0, [])
    assert board(home, whole) == before


def test_the_report_can_be_rebuilt(home: Path, whole: str, capsys: pytest.CaptureFixture[str]) -> None:
    before = {p.name: p.read_bytes() for p in (home / whole).glob("leaderboard.*")}
    for path in [*(home / whole).glob("leaderboard.*"), home / whole / "report.html"]:
        path.unlink()
    assert main(["report", str(home / whole)]) == 0
    assert {p.name: p.read_bytes() for p in (home / whole).glob("leaderboard.*")} == before
    assert (home / whole / "report.html").exists()
    assert "rejection_sampling" in capsys.readouterr().out


def test_a_changed_algorithm_runs_again_and_no_other(home: Path, whole: str) -> None:
    shutil.copytree(home / whole, home / "copied")
    before = rows(home, whole)
    algorithms = EXPERIMENT["comparison"]["algorithms"]
    other = [w.replace("beta=0.25", "beta=4") for w in algorithms["dpo"]]
    write(home, "other-beta", changed(algorithms=algorithms | {"dpo": other}))
    # The folder is part of what a run computes (its paths), so the copy goes where the original was.
    shutil.rmtree(home / whole)
    try:
        shutil.copytree(home / "copied", home / whole)
        assert compare(home, whole, experiment="other-beta") == (0, ["runs/dpo-seed0", "runs/dpo-seed1"])
        after = rows(home, whole)
        standing = ("rank", "indistinguishable_from_best")  # among the others, one of which has changed
        untouched, same = (
            {k: v for k, v in r["rejection_sampling"].items() if k not in standing} for r in (after, before)
        )
        assert untouched == same
        assert after["dpo"]["kl"] < before["dpo"]["kl"]  # a stronger constraint
        # One seed fewer: nothing to run, and the runs of the other seed are no longer part of it.
        assert compare(home, whole, "comparison.seeds=[0]", experiment="other-beta") == (0, [])
        assert {tuple(row.get("seeds", [row.get("seed")])) for row in board(home, whole)["rows"]} == {(0,)}
    finally:
        shutil.rmtree(home / whole)
        (home / "copied").rename(home / whole)


@pytest.mark.parametrize("moment", ["sft/metrics.jsonl", "runs/*/metrics.jsonl"])
def test_interrupted_and_repeated_it_ends_as_if_undisturbed(home: Path, whole: str, moment: str) -> None:
    """In the very folder of the undisturbed one: whatever might depend on a path is then the same."""
    before = rows(home, whole)
    (home / whole).rename(home / "kept")
    try:
        child = forks.fork(forks.command(command(home, whole)), home / "interrupted.log")
        deadline = time.monotonic() + 120
        while not list((home / whole).glob(moment)) and time.monotonic() < deadline:
            time.sleep(0.005)
        os.kill(child, signal.SIGTERM)
        said = (home / "interrupted.log").read_text
        assert forks.wait(child) == 143, said()
        assert "alignlab: stopped by SIGTERM; the same command goes on with what is not done" in said()
        assert not (home / whole / "leaderboard.json").exists()
        done = {str(p.parent.relative_to(home / whole)) for p in (home / whole).rglob("done.json")}
        assert done < {*PARTS, *RUNS}
        status, again = compare(home, whole)
        assert status == 0, log_of(home, whole)
        assert sorted([*done, *again]) == sorted([*PARTS, *RUNS])  # what was done is not done again
        assert rows(home, whole) == before
    finally:
        shutil.rmtree(home / whole, ignore_errors=True)
        (home / "kept").rename(home / whole)


# ------------------------------------------------------------------ failures


def test_one_failing_algorithm_leaves_the_rest(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its data vanished after the comparison had been planned: nothing that could have been known."""
    algorithms = {
        "dpo": EXPERIMENT["comparison"]["algorithms"]["dpo"],
        "lost": ["algorithm=sft", "data.path={data}/vanished.jsonl"],
    }
    write(home, "failing", changed(algorithms=algorithms, reward_model=None, seeds=[0]))
    status, _ = compare(home, "failing", experiment="failing")
    assert status == 1
    assert set(rows(home, "failing")) == {"sft", "dpo"}
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("failed: ")]
    assert len(said) == 1
    assert said[0].startswith(f"failed: runs/lost-seed0: {home}/failing/data/vanished.jsonl: no such file or folder")
    assert f"(log: {home}/failing/runs/lost-seed0/log.txt)" in said[0]
    # Mended, it alone is run, and all is well.
    shutil.copy(home / "failing/data/demonstrations.jsonl", home / "failing/data/vanished.jsonl")
    assert compare(home, "failing", experiment="failing") == (0, ["runs/lost-seed0"])
    assert set(rows(home, "failing")) == {"sft", "dpo", "lost"}


def test_when_what_all_wait_for_fails_it_is_named(home: Path, capfd: pytest.CaptureFixture[str]) -> None:
    write(home, "should_prune", changed(sft=["algorithm=sft", "data.path={data}/vanished.jsonl"]))
    status, parts = compare(home, "should_prune", experiment="should_prune")
    assert (status, parts) == (2, ["base", "data", "sft"])
    last = capfd.readouterr().err.strip().splitlines()[-1]
    assert last.startswith("alignlab: no run finished; the first failure: sft: ")
    assert "vanished.jsonl: no such file or folder" in last
    assert not (home / "should_prune/leaderboard.json").exists()


def test_a_killed_node_is_a_failure_with_its_signal(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(work, "run_command", lambda *_: os.kill(os.getpid(), signal.SIGKILL))
    nodes = [Node("data", home / "killed/data", [Command("data", {})])]
    failed = local.execute(nodes, workers=1, threads=1)
    assert failed == {"data": f"ended by SIGKILL (log: {home}/killed/data/log.txt)"}
    assert node.outcome(nodes[0].folder, nodes[0].key).reason == "ended by SIGKILL"


# ------------------------------------------------------------------ what is shipped


@pytest.mark.parametrize("experiment", sorted(p.stem for p in config_folder().glob("experiment/*.yaml")))
def test_every_run_of_the_shipped_experiments_can_be(
    experiment: str, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All that can be known beforehand is right, in every stage and for every algorithm."""
    from alignlab.benchmarks.exact.benchmark import ExactBenchmark
    from alignlab.comparison import compare as module

    base = home / "any-base"
    if not base.exists():
        tiny.save(base)
    monkeypatch.setattr(ExactBenchmark, "base_path", lambda self: str(base))
    planned: list[list[Any]] = []
    monkeypatch.setattr(
        module, "execute", lambda nodes, *_: planned.append(nodes) or {n.name: "not run" for n in nodes}
    )
    words = ["compare", f"experiment={experiment}", f"out={home}/shipped-{experiment}"]
    assert main([*words, *(["model.path=" + str(base)] if experiment != "demo" else [])]) == 2  # nothing finished
    names = [n.name for n in planned[0]]
    assert len(names) == len(set(names))
    assert any(name.startswith("runs/") for name in names)
    for part in planned[0]:
        assert {p.name for p in part.parents} <= set(names[: names.index(part.name)])


def test_the_embedded_default_is_the_demo(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compare", "--cfg"]) == 0
    plain = capsys.readouterr().out
    assert main(["compare", "experiment=demo", "--cfg"]) == 0
    assert capsys.readouterr().out == plain
    assert yaml.safe_load(plain)["out"] == "runs/demo"


def test_a_stage_may_choose_another_adapter_than_the_comparison(tmp_path: Path) -> None:
    """`adapter=none` in a stage's words is not undone by the comparison's own `adapter=lora`."""
    from alignlab.benchmarks.evaluate import build_benchmark
    from alignlab.build import section
    from alignlab.comparison.compare import ComparisonSettings, plan
    from alignlab.config import compose, resolve

    config = resolve(compose("compare", ["experiment=demo", "adapter=lora", "model.path=base", "comparison.seeds=[0]"]))
    config["comparison"]["reward_model"].append("adapter=none")
    settings = section(ComparisonSettings, config["comparison"], "comparison")
    nodes = {n.name: n for n in plan(config, settings, build_benchmark(config["benchmark"]), tmp_path)}
    ranks = {
        name: nodes[name].commands[0].config["adapter"].get("r") for name in ("sft", "reward_model", "runs/dpo-seed0")
    }
    assert ranks == {"sft": 16, "reward_model": None, "runs/dpo-seed0": 16}
