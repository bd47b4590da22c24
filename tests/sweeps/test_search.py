"""Searches: the same study whatever kills them, pruning by the rule, every trial once."""

from __future__ import annotations

import json
import random
import shutil
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from alignlab.core import ConfigError
from alignlab.sweeps.search import STUDY, distribution
from alignlab.training.callbacks.pruning import Pruning, Trial, make_pruner, open_study
from tests.components import need
from tests.sweeps import helpers as sweeps
from tests.training import forks, runs

optuna = need("optuna")

TRIALS, STARTUP = 12, 3
SPACE = ["optimizer.lr=tag(log,interval(1e-3,1))", "algorithm.beta=0.1,0.3", "training.batch_size=range(3,6)"]
SEARCH = [
    *("sweeper=optuna", f"sweeper.trials={TRIALS}", "sweeper.pruner=median", f"sweeper.startup_trials={STARTUP}"),
    *("training.eval_every=1", "data.validation=0.3", *SPACE),
]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("searches")
    runs.prepare(folder)
    return folder


@pytest.fixture(scope="module")
def undisturbed(home: Path) -> Path:
    assert sweeps.sweep(home, "undisturbed", *SEARCH) == 0
    return home / "undisturbed"


def trials(folder: Path) -> list[tuple[Any, ...]]:
    """All that a study says of its trials but for the time."""
    study = open_study(folder / STUDY, "sweep")
    return [(t.number, t.state.name, t.params, t.values, t.intermediate_values) for t in study.get_trials()]


def test_killed_and_repeated_it_is_the_search_that_was_left_alone(home: Path, undisturbed: Path) -> None:
    """Killed -9 four times, at odd moments of its trials."""
    folder, rng = home / "killed", random.Random(3)
    for at in (3, 5, 6, 8):
        reached = _reached(folder, at, rng.randint(1, 9))
        words = sweeps.words(home, "killed", *SEARCH)
        assert sweeps.killed(words, reached, home / "killed.log") == -9, (home / "killed.log").read_text()
        assert at < len(trials(folder)) < TRIALS
    assert sweeps.sweep(home, "killed", *SEARCH) == 0
    assert trials(folder) == trials(undisturbed)
    assert len(trials(folder)) == TRIALS
    for name, row in sweeps.table(folder).items():
        steps = [line["step"] for line in sweeps.lines(folder / name) if "lr" in line]
        assert steps == list(range(1, int(float(row["steps"])) + 1))  # no step is lost or done twice
        if row["state"] == "finished":
            assert runs.identical(runs.weights(folder, name), runs.weights(undisturbed, name))
    assert sweeps.told(folder)["best"] == sweeps.told(undisturbed)["best"]


def _reached(folder: Path, trial: int, lines: int) -> Callable[[], bool]:
    """Whether a trial has written so many lines of metrics, or is over."""

    def reached() -> bool:
        path = folder / f"trial-{trial:04}/metrics.jsonl"
        told = path.read_text().splitlines() if path.exists() else []
        return len(told) >= lines or (folder / f"trial-{trial + 1:04}").exists()

    return reached


def test_what_is_pruned_follows_from_the_medians(undisturbed: Path) -> None:
    """Worked out again from what each run has left: at each step, against the finished trials before it."""
    losses: dict[int, dict[int, float]] = {}
    finished: list[int] = []
    pruned = []
    for number in range(TRIALS):
        folder = undisturbed / f"trial-{number:04}"
        seen = {line["step"]: line["eval/loss"] for line in sweeps.lines(folder) if "eval/loss" in line}
        stop = None
        for step in sorted(seen):
            before = [losses[other][step] for other in finished]
            best = min(value for s, value in seen.items() if s <= step)
            if len(finished) >= STARTUP and best > statistics.median(before) and step < 6:
                stop = step
                break
        assert (folder / "pruned.json").exists() == (stop is not None)
        assert (folder / "result.json").exists() == (folder / "model").exists() == (stop is None)
        if stop is None:
            losses[number] = seen
            finished.append(number)
        else:
            assert max(seen) == stop == json.loads((folder / "pruned.json").read_text())["step"]
            pruned.append(number)
    assert 2 <= len(pruned) <= TRIALS - STARTUP  # else this shows nothing
    table = sweeps.table(undisturbed)
    assert sorted(n for n, row in table.items() if row["state"] == "pruned") == [f"trial-{n:04}" for n in pruned]
    best = min(finished, key=lambda n: losses[n][6])
    assert sweeps.told(undisturbed)["best"] == f"trial-{best:04}"


def test_repeated_nothing_runs_and_more_trials_go_on(home: Path, undisturbed: Path) -> None:
    shutil.copytree(undisturbed, home / "grown")
    forks.Process.started.clear()
    assert sweeps.sweep(home, "grown", *SEARCH) == 0
    assert forks.Process.started == []
    assert sweeps.sweep(home, "grown", *SEARCH, "sweeper.trials=14") == 0
    assert trials(home / "grown")[:TRIALS] == trials(undisturbed)
    assert len(trials(home / "grown")) == 14


def test_trials_at_a_time(home: Path) -> None:
    words = [
        "sweeper=optuna",
        "sweeper.trials=5",
        "sweeper.batch=3",
        "optimizer.lr=interval(0.01,0.1)",
        "training.steps=1",
    ]
    assert sweeps.sweep(home, "batches", *words) == 0
    found = trials(home / "batches")
    assert [state for _, state, *_ in found] == ["COMPLETE"] * 5
    assert len({params["optimizer.lr"] for _, _, params, *_ in found}) == 5
    for number, _, params, (value,), _ in found:
        folder = home / f"batches/trial-{number:04}"
        assert value == sweeps.lines(folder)[-1]["loss"]
        assert 0.01 <= params["optimizer.lr"] <= 0.1


def test_a_trial_that_fails_is_tried_again_by_the_next_command(
    home: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    words = ["sweeper=optuna", "sweeper.trials=4", "optimizer.lr=interval(0.01,0.1)", "training.steps=1"]
    assert sweeps.sweep(home, "unfailing", *words) == 0
    from alignlab.core import AlignlabError
    from alignlab.launch import start

    train = start.train

    def faulty(config: dict[str, Any], out: Path) -> Any:
        if out.name == "trial-0003":
            raise AlignlabError("the disk is full")
        return train(config, out)

    monkeypatch.setattr(start, "train", faulty)
    assert sweeps.sweep(home, "failing", *words) == 1
    assert [state for _, state, *_ in trials(home / "failing")] == ["COMPLETE"] * 3 + ["RUNNING"]
    assert "failed: trial-0003: the disk is full" in capfd.readouterr().out
    monkeypatch.undo()
    assert sweeps.sweep(home, "failing", *words) == 0
    assert trials(home / "failing") == trials(home / "unfailing")


def test_all_processes_of_a_trial_end_together(home: Path) -> None:
    """Two processes, of which the first alone knows the study; the trials before were all better."""
    folder = home / "many"
    folder.mkdir()
    study = open_study(folder / STUDY, "sweep", "minimize")
    space = {"x": optuna.distributions.FloatDistribution(0, 1)}
    for _ in range(3):
        done = optuna.trial.create_trial(
            params={"x": 0.5}, distributions=space, value=-9.0, intermediate_values=dict.fromkeys(range(1, 7), -9.0)
        )
        study.add_trial(done)
    study.add_trial(
        optuna.trial.create_trial(state=optuna.trial.TrialState.RUNNING, params={"x": 0.5}, distributions=space)
    )
    Trial(str(folder / STUDY), "sweep", 3, "loss", "median", 3, 2).write(folder)
    forks.train(home, "sft", "many", processes=2)
    assert json.loads((folder / "pruned.json").read_text())["processes"] == 2
    assert [line["step"] for line in sweeps.lines(folder)] == [1, 2]  # the first step is before `warmup_steps`
    assert not (folder / "result.json").exists()


def test_a_step_that_was_decided_on_is_not_decided_again(tmp_path: Path) -> None:
    """After a kill a trial goes on from a checkpoint, and comes by steps that the study knows already."""
    study = open_study(tmp_path / STUDY, "sweep", "minimize")
    space = {"x": optuna.distributions.FloatDistribution(0, 1)}
    study.add_trial(
        optuna.trial.create_trial(
            params={"x": 0.5}, distributions=space, value=1.0, intermediate_values=dict.fromkeys(range(1, 9), 1.0)
        )
    )
    study.add_trial(
        optuna.trial.create_trial(state=optuna.trial.TrialState.RUNNING, params={"x": 0.1}, distributions=space)
    )
    Trial(str(tmp_path / STUDY), "sweep", 1, "loss", "median", 1).write(tmp_path)
    first = Pruning.of(tmp_path)
    assert first is not None
    assert not first.should_prune(1, {"loss": 0.5, "other": 9.0})
    assert not first.should_prune(2, {"other": 9.0})  # no figure, no decision
    assert not first.should_prune(3, {"loss": 1.0})
    better = optuna.trial.create_trial(
        params={"x": 0.9}, distributions=space, value=0.1, intermediate_values=dict.fromkeys(range(1, 9), 0.1)
    )
    study.add_trials([better, better])  # others have ended meanwhile: the median is not what it was
    again = Pruning.of(tmp_path)
    assert again is not None
    assert not again.should_prune(1, {"loss": 0.5})
    assert study.get_trials()[1].intermediate_values == {1: 0.5, 3: 1.0}
    assert again.should_prune(3, {"loss": 1.0})  # where it was killed it may have been about to decide
    (tmp_path / "pruned.json").write_text("{}")
    assert Pruning.of(tmp_path) is None


def test_a_study_whose_last_line_is_not_whole(tmp_path: Path) -> None:
    study = open_study(tmp_path / STUDY, "sweep", "minimize")
    study.ask()
    before = (tmp_path / STUDY).read_bytes()
    (tmp_path / STUDY).write_bytes(before + before.splitlines()[-1][:20])
    again = open_study(tmp_path / STUDY, "sweep", "minimize")
    again.ask()
    assert [t.number for t in open_study(tmp_path / STUDY, "sweep").get_trials()] == [0, 1]
    assert (tmp_path / STUDY).read_bytes().startswith(before)


def test_pruners() -> None:
    assert isinstance(make_pruner("none", 1, 1), optuna.pruners.NopPruner)
    median = make_pruner("median", 4, 7)
    assert (median._n_startup_trials, median._n_warmup_steps) == (4, 7)
    assert make_pruner("halving", 4, 7)._min_resource == 7


# ------------------------------------------------------------------ what is searched, and what is refused


@pytest.mark.parametrize(
    ("word", "expected"),
    [
        ("a=x,y", optuna.distributions.CategoricalDistribution(["x", "y"])),
        ("a=choice(1,2.5,true)", optuna.distributions.CategoricalDistribution(["1", "2.5", "True"])),
        ("a=interval(0.1,2)", optuna.distributions.FloatDistribution(0.1, 2)),
        ("a=tag(log,interval(1e-5,1e-2))", optuna.distributions.FloatDistribution(1e-5, 1e-2, log=True)),
        ("a=int(interval(2,9))", optuna.distributions.IntDistribution(2, 9)),
        ("a=tag(log,int(interval(1,64)))", optuna.distributions.IntDistribution(1, 64, log=True)),
        ("a=range(2,9)", optuna.distributions.IntDistribution(2, 8)),
        ("a=range(2,9,3)", optuna.distributions.IntDistribution(2, 8, step=3)),
        ("a=range(0.5,2,0.5)", optuna.distributions.CategoricalDistribution(["0.5", "1.0", "1.5"])),
    ],
)
def test_what_varies_as_a_distribution(word: str, expected: Any) -> None:
    from hydra.core.override_parser.overrides_parser import OverridesParser

    assert distribution(OverridesParser.create().parse_override(word)) == expected


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("a=tag(log,interval(0,1))", "a=tag(log,interval(0,1)): "),
        ("a=interval(2,1)", "a=interval(2,1): "),
        ("a=tag(wide,interval(1,2))", "a=tag(wide,interval(1,2)): the tag 'wide' means nothing here; known: log"),
        ("a=tag(log,choice(1,2))", "a=tag(log,choice(1,2)): a logarithmic scale is for interval(a,b)"),
    ],
)
def test_what_cannot_be_searched(word: str, message: str) -> None:
    from hydra.core.override_parser.overrides_parser import OverridesParser

    with pytest.raises(ConfigError) as error:
        distribution(OverridesParser.create().parse_override(word))
    assert str(error.value).startswith(message)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("training.seed=0", "sweeper=optuna: no setting varies: give one, as in optimizer.lr='interval(1e-5,1e-3)'"),
        (
            "optimizer.lr=interval(0.01,0.1) sweeper.metric=eval/loss",
            "sweeper.metric=eval/loss: there are no evaluations: give training.eval_every, in steps",
        ),
    ],
)
def test_mistaken_searches(home: Path, words: str, message: str, capfd: pytest.CaptureFixture[str]) -> None:
    assert sweeps.sweep(home, "mistaken", "sweeper=optuna", *words.split(" ")) == 2
    assert capfd.readouterr().err == f"alignlab: {message}\n"


def test_another_search_in_the_same_folder(home: Path, undisturbed: Path, capfd: pytest.CaptureFixture[str]) -> None:
    for other, what in (
        ("optimizer.momentum=0.5", "optimizer.momentum"),
        ("sweeper.metric=eval/nll", "metric"),
        ("algorithm.beta=0.1,0.4", "space"),
    ):
        assert sweeps.sweep(home, "undisturbed", *SEARCH, other) == 2
        said = capfd.readouterr().err
        assert f"this folder holds a search with another {what}: choose another out=DIR" in said
    assert len(trials(undisturbed)) == TRIALS


def test_comparisons_are_not_pruned(home: Path, capfd: pytest.CaptureFixture[str]) -> None:
    from alignlab.cli import main

    words = ["sweeper=optuna", "sweeper.pruner=median", "benchmark.beta=interval(0.1,0.2)", f"out={home}/compared"]
    assert main(["compare", "-m", *words]) == 2
    assert "sweeper.pruner=median: comparisons are not pruned: their metrics come last" in capfd.readouterr().err
