"""Sweeps over every combination: what is run, what is left alone, what is told."""

from __future__ import annotations

import base64
import json
import os
import re
import shlex
import signal
import sqlite3
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from alignlab.cli import main
from alignlab.comparison.graph import local
from alignlab.comparison.graph.local import is_free
from alignlab.comparison.graph.process import NodeProcess
from alignlab.core import Algorithm
from alignlab.training.signals import StopRequest
from tests.sweeps import helpers as sweeps
from tests.training import forks, runs

GRID = ["optimizer.lr=0.02,0.05", "algorithm.beta=0.1,0.2"]
NAMES = [f"algorithm.beta={beta},optimizer.lr={lr}" for beta in (0.1, 0.2) for lr in (0.02, 0.05)]


class Broken(Algorithm):
    """An algorithm of a user's that has a fault."""

    def loss(self, outputs: Any, batch: Any) -> Any:
        raise RuntimeError("the user's own fault\nand more of it")


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sweeps")
    runs.prepare(folder)
    return folder


@pytest.fixture(scope="module")
def grid(home: Path) -> Path:
    """Four runs, all finished."""
    assert sweeps.sweep(home, "grid", *GRID) == 0
    return home / "grid"


@pytest.fixture
def none_started(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_arguments: object) -> None:
        raise AssertionError("started")

    monkeypatch.setattr("alignlab.launch.start.train", never)


# ------------------------------------------------------------------ what is run


def test_every_combination_has_a_folder_named_after_what_varies(grid: Path) -> None:
    assert sorted(p.name for p in grid.iterdir() if p.is_dir()) == [*NAMES, "cache"]
    table = sweeps.table(grid)
    assert sorted(table) == NAMES
    for name, row in table.items():
        assert row["state"] == "finished"
        assert name == f"algorithm.beta={row['algorithm.beta']},optimizer.lr={row['optimizer.lr']}"
        assert float(row["loss"]) == sweeps.lines(grid / name)[-1]["loss"]


def test_the_runs_share_what_the_reference_says(grid: Path) -> None:
    """Of 12 pairs, once."""
    (path,) = (grid / "cache").iterdir()
    with sqlite3.connect(path) as file:
        assert file.execute("SELECT count(*) FROM logps").fetchone() == (24,)


def test_the_best_is_named_with_the_words_that_do_it_again(home: Path, grid: Path) -> None:
    losses = {name: sweeps.lines(grid / name)[-1]["loss"] for name in NAMES}
    best = min(losses, key=losses.__getitem__)
    told = sweeps.told(grid)
    assert (told["best"], told["metric"], told["direction"]) == (best, "loss", "minimize")
    assert [r["value"] for r in told["runs"]] == sorted(losses.values())
    command = re.search(r"^ +(alignlab train .*)$", (grid / "sweep.md").read_text(), re.MULTILINE)
    assert command is not None
    words = [w for w in shlex.split(command[1])[2:] if not w.startswith("out=")]
    assert words == [w for w in told["runs"][0]["overrides"] if not w.startswith("out=")]
    assert main(["train", *words, f"out={home}/again"]) == 0
    assert runs.identical(runs.weights(home, "again"), runs.weights(grid, best))


def test_repeated_nothing_is_started_and_the_same_is_told(grid: Path, home: Path, none_started: None) -> None:
    before = {p.name: p.read_text() for p in grid.glob("sweep.*")}
    assert sorted(before) == ["sweep.csv", "sweep.html", "sweep.json", "sweep.md"]
    assert sweeps.sweep(home, "grid", *GRID) == 0
    assert {p.name: p.read_text() for p in grid.glob("sweep.*")} == before
    for name in ("sweep.csv", "sweep.md", "sweep.html"):
        (grid / name).unlink()
    assert main(["report", str(grid)]) == 0
    assert {p.name: p.read_text() for p in grid.glob("sweep.*")} == before


def test_a_grid_that_grows_runs_what_is_new(grid: Path, home: Path) -> None:
    forks.Process.started.clear()
    assert sweeps.sweep(home, "grid", "optimizer.lr=0.02,0.05", "algorithm.beta=0.1,0.2,0.3") == 0
    assert [Path(folder).name for folder in forks.Process.started] == [
        f"algorithm.beta=0.3,optimizer.lr={lr}" for lr in (0.02, 0.05)
    ]
    assert len(sweeps.table(grid)) == 6
    assert sweeps.sweep(home, "grid", *GRID) == 0  # as the other tests expect it


def test_other_settings_in_the_same_folder_are_refused_for_each_run(
    home: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert sweeps.sweep(home, "other", "optimizer.lr=0.02,0.05") == 0
    assert sweeps.sweep(home, "other", "optimizer.lr=0.02,0.05", "algorithm.beta=0.7") == 1
    for row in sweeps.table(home / "other").values():
        assert row["state"] == "failed"
        assert "this folder holds a run with another algorithm.beta" in row["reason"]
    assert sweeps.sweep(home, "other", "optimizer.lr=0.02,0.05") == 0  # what was there is as it was
    assert {row["state"] for row in sweeps.table(home / "other").values()} == {"finished"}
    assert "2 of 2 runs are already finished" in capfd.readouterr().err


def test_what_fails_ends_nothing_else(home: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """An impossible value, a loss that is not finite, a fault in a class of the user's."""
    broken = f"{Broken.__module__}.Broken"
    assert sweeps.sweep(home, "failing", "algorithm.beta=0,0.1") == 1
    assert sweeps.sweep(home, "diverging", "optimizer.lr=1e30,0.01") == 1
    assert (
        sweeps.sweep(home, "broken", f"algorithm._target_=alignlab.algorithms.sft.SFT,{broken}", algorithm="sft") == 1
    )
    said = capfd.readouterr()
    assert "Traceback" not in said.out + said.err
    for out, failing, why in (
        ("failing", "algorithm.beta=0", "algorithm.beta=0.0: must be > 0"),
        ("diverging", "optimizer.lr=1e+30", "not finite"),
        ("broken", f"algorithm._target_={broken}", "RuntimeError: the user's own fault"),
    ):
        table = sweeps.table(home / out)
        assert sorted(row["state"] for row in table.values()) == ["failed", "finished"]
        assert why in table[failing]["reason"]
        assert re.search(rf"failed: {re.escape(failing)}: .*{re.escape(why)}", said.out)
    log = (home / "broken" / f"algorithm._target_={broken}" / "log.txt").read_text()
    assert "Broken.loss: RuntimeError: the user's own fault" in log


def test_a_sweep_that_is_stopped_goes_on_where_it_was(
    home: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    words = ["training.seed=0,1,2", "training.checkpoint_every=null"]
    assert sweeps.sweep(home, "whole", *words) == 0
    with monkeypatch.context() as patch:
        told: list[int] = []  # in the run's process: the signal has come

        def update(_self: object, step: int, metrics: Any) -> None:
            if torch.initial_seed() == 1 and step == 3:
                os.kill(os.getppid(), signal.SIGTERM)  # the sweep, which passes it on
                while not told:
                    time.sleep(0.01)

        patch.setattr("alignlab.training.callbacks.progress.ProgressDisplay.update", update)
        handle = StopRequest._handle
        patch.setattr(StopRequest, "_handle", lambda self, *a: (told.append(a[0]), handle(self, *a)))
        assert sweeps.sweep(home, "parted", *words) == 128 + signal.SIGTERM
    said = capfd.readouterr().err
    assert "alignlab: stopped by SIGTERM; the same command goes on with what is not done" in said
    assert "checkpoint of step 3 saved" in (home / "parted/training.seed=1/log.txt").read_text()
    states = {name: row["state"] for name, row in sweeps.table(home / "parted").items()}
    assert states == {"training.seed=0": "finished", "training.seed=1": "unfinished", "training.seed=2": "unfinished"}
    assert sweeps.sweep(home, "parted", *words) == 0
    for seed in range(3):
        name = f"training.seed={seed}"
        assert [line["step"] for line in sweeps.lines(home / "parted" / name)] == [1, 2, 3, 4, 5, 6]
        assert runs.identical(runs.weights(home / "parted", name), runs.weights(home / "whole", name))


def test_anew_means_anew(home: Path) -> None:
    words = ["training.seed=0,1", "training.resume=never"]
    assert sweeps.sweep(home, "anew", *words) == 0
    before = [(home / f"anew/training.seed={seed}/result.json").stat().st_mtime_ns for seed in (0, 1)]
    assert sweeps.sweep(home, "anew", *words) == 0
    after = [(home / f"anew/training.seed={seed}/result.json").stat().st_mtime_ns for seed in (0, 1)]
    assert all(b < a for b, a in zip(before, after, strict=True))


def test_runs_apart_survive_what_kills_one_of_them(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two at a time: the run with the first seed kills itself with no word."""
    monkeypatch.setattr(local, "NodeProcess", NodeProcess)  # the real ones
    monkeypatch.setenv("PYTHONPATH", str(runs.REPOSITORY))
    words = ["launcher.n_jobs=2", "training.seed=0,1", "+algorithm.gamma=1", "training.steps=2"]
    target = f"algorithm._target_={Deadly.__module__}.Deadly"
    monkeypatch.setenv("ALIGNLAB_TEST_DEADLY", "0")
    assert sweeps.sweep(home, "apart", target, *words, algorithm="sft") == 1
    table = sweeps.table(home / "apart")
    assert table["training.seed=0"]["reason"] == "ended by SIGKILL"
    assert table["training.seed=1"]["state"] == "finished"
    assert "groups: train 12" in (home / "apart/training.seed=1/log.txt").read_text()
    monkeypatch.setenv("ALIGNLAB_TEST_DEADLY", "none")
    assert sweeps.sweep(home, "apart", target, *words[1:], algorithm="sft") == 0
    assert all(is_free(lock.parent) for lock in (home / "apart").glob("*/lock"))


class Deadly(Algorithm):
    """Ends its process where the seed is the one that the environment says."""

    unit = "token"

    def __init__(self, gamma: float = 1.0) -> None:
        self.gamma = gamma

    def loss(self, outputs: Any, batch: Any) -> Any:
        import os

        import torch

        if os.environ["ALIGNLAB_TEST_DEADLY"] == str(torch.initial_seed()):
            os.kill(os.getpid(), signal.SIGKILL)
        return -self.gamma * outputs.logp_T, {}


# ------------------------------------------------------------------ comparisons


def test_a_comparison_is_over_when_all_its_parts_are_as_planned(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from alignlab.comparison.compare import nodes_of
    from alignlab.comparison.graph.node import Node, finish, write_plan
    from alignlab.config import compose, resolve
    from alignlab.sweeps.combinations import node_of
    from alignlab.sweeps.results import state_of

    folder = tmp_path / "beta=0.1,seed=2"  # as a sweep names it
    monkeypatch.setenv("ALIGNLAB_CACHE", str(tmp_path / "cache"))

    def sweeps_node(*words: str) -> Node:
        config = resolve(compose("compare", ["experiment=demo", f"out='{folder}'", *words]))
        return node_of("compare", "c", folder, config, None)

    def state() -> str:
        return state_of("compare", folder, now.key).state

    now = sweeps_node()
    nodes = nodes_of(now.commands[0].config["config"], folder, None)[1]
    assert state() == "unfinished"
    now.begin()
    for node in nodes:
        node.begin()
        for made in (c.config["path"] for c in node.commands if c.name == "base"):
            Path(made).mkdir(parents=True)
        (node.folder / "done.json").write_text(json.dumps({"key": node.key}))
    write_plan(folder, nodes)
    finish(folder, 1.0)
    assert state() == "unfinished"  # no leaderboard yet
    (folder / "leaderboard.json").write_text(json.dumps({"rows": [{"algorithm": "dpo", "reward": 0.5}]}))
    finish(folder, 1.0)
    assert state() == "finished"
    assert now.done
    assert not sweeps_node("comparison.seeds=[7]").done
    (nodes[-1].folder / "done.json").unlink()
    assert state() == "unfinished"
    assert not now.done


# ------------------------------------------------------------------ what is told


def test_another_metric_ranks_without_running(grid: Path, home: Path, none_started: None) -> None:
    assert sweeps.sweep(home, "grid", *GRID, "sweeper.metric=grad_norm", "sweeper.direction=maximize") == 0
    norms = {name: sweeps.lines(grid / name)[-1]["grad_norm"] for name in NAMES}
    assert sweeps.told(grid)["best"] == max(norms, key=norms.__getitem__)
    assert sweeps.sweep(home, "grid", *GRID) == 0


def test_a_metric_that_nobody_has(
    home: Path, grid: Path, capfd: pytest.CaptureFixture[str], none_started: None
) -> None:
    assert sweeps.sweep(home, "grid", *GRID, "sweeper.metric=lose") == 2
    said = capfd.readouterr().err
    assert "sweeper.metric=lose: no run has it; did you mean 'loss'?; there are: accuracy, " in said
    assert sweeps.sweep(home, "grid", *GRID) == 0


def test_the_page_has_a_panel_for_each_setting_and_a_point_for_each_run(home: Path) -> None:
    assert sweeps.sweep(home, "drawn", "optimizer.lr=0.001,0.01,0.1", "schedule=linear,constant") == 0
    page = (home / "drawn/sweep.html").read_text()
    image = r'<img src="data:image/svg\+xml;base64,([^"]*)" alt="loss of every run against ([^"]*)\."'
    sources = re.findall(image, page)
    assert [key for _, key in sources] == ["optimizer.lr", "schedule"]
    for source, _ in sources:
        points = re.findall(r'<g id="run(\d)">', base64.b64decode(source).decode())
        assert sorted(points) == list("012345")  # tests/sweeps/test_page.py says where they stand
