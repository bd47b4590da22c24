"""Which parts a comparison has, what each waits for, and every mistake in it found before anything runs."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import pytest

from alignlab.benchmarks.base import Benchmark
from alignlab.benchmarks.evaluate import EvaluateSettings, build_benchmark
from alignlab.build import section
from alignlab.comparison.graph.node import Node
from alignlab.comparison.planning import plan
from alignlab.comparison.settings import ComparisonSettings
from alignlab.config import compose, resolve
from alignlab.core import ConfigError

SFT = ["algorithm=sft", "data=demonstrations", "data.path={demonstrations}"]
JUDGE = ["algorithm=reward_model", "data=groups", "data.path={pairs}"]
DPO = ["algorithm=dpo", "data=groups", "data.path={pairs}"]
ROLLOUT = ["algorithm=rejection_sampling", "source=rollout", "data=prompts", "data.path={prompts}"]
RANKED = [*ROLLOUT, "scoring=reward_model", "scoring.path={ranker}"]
GOLD = [*ROLLOUT, "scoring={gold}"]

Planned = Callable[..., dict[str, Node]]


class Bare(Benchmark):
    """A user's benchmark that writes one file and cannot measure best-of-N sampling."""

    name = "bare"
    files: ClassVar[tuple[str, ...]] = ("riddles",)


@pytest.fixture
def planned(tmp_path: Path) -> Planned:
    """The nodes of the exact comparison with these settings, by name."""

    def make(benchmark: Benchmark | None = None, words: list[str] | None = None, **comparison: Any) -> dict[str, Node]:
        config = resolve(compose("compare", ["experiment=demo", "model.path=base", *(words or [])]))
        own = {
            "seeds": [0],
            "sft": SFT,
            "reward_model": JUDGE,
            "algorithms": {"dpo": DPO},
            "models": {},
            "best_of": None,
        }
        config["comparison"] |= own | comparison
        settings = section(ComparisonSettings, config["comparison"], "comparison")
        nodes = plan(config, settings, benchmark or build_benchmark(config["benchmark"]), tmp_path)
        for i, node in enumerate(nodes):
            assert all(p in nodes[:i] for p in node.parents)
            for command, values, _ in node.commands:
                if command == "evaluate":
                    section(EvaluateSettings, {k: values[k] for k in EvaluateSettings.model_fields}, "")
        return {node.name: node for node in nodes}

    return make


def waits(nodes: dict[str, Node], name: str) -> list[str]:
    parents = {parent.name for parent in nodes[name].parents}
    return [known for known in nodes if known in parents]  # in the plan's order


def ran(nodes: dict[str, Node], name: str, command: str) -> dict[str, Any]:
    return {c.name: c.config for c in nodes[name].commands}[command]


# ------------------------------------------------------------------ what waits for what


def test_what_references_say_is_kept_for_all_runs_unless_a_run_says_where(planned: Planned, tmp_path: Path) -> None:
    nodes = planned(algorithms={"dpo": DPO, "apart": [*DPO, "training.reference_cache=elsewhere"]})
    for name, place in {"sft": tmp_path / "cache", "runs/dpo-seed0": tmp_path / "cache"}.items():
        assert ran(nodes, name, "train")["training"]["reference_cache"] == str(place)
    assert ran(nodes, "runs/apart-seed0", "train")["training"]["reference_cache"] == "elsewhere"


def test_each_part_waits_for_what_its_words_name(planned: Planned) -> None:
    nodes = planned(
        models={"ranker": JUDGE, "steps_judge": ["algorithm=sft", "data=demonstrations", "data.path={steps}"]},
        algorithms={"dpo": DPO, "sample_rank": RANKED, "golden": GOLD, "anything": [*DPO, "data.path={out}/x.jsonl"]},
    )
    assert waits(nodes, "data") == []
    assert waits(nodes, "sft") == ["data"]
    assert waits(nodes, "pairs") == ["data", "sft"]
    assert waits(nodes, "reward_model") == ["sft", "pairs"]
    assert waits(nodes, "ranker") == ["sft", "pairs"]
    assert waits(nodes, "steps_judge") == ["data", "sft"]
    # A run is measured with the reward model, and so waits for it; not for the models that others use.
    assert waits(nodes, "runs/dpo-seed0") == ["sft", "pairs", "reward_model"]
    assert waits(nodes, "runs/sample_rank-seed0") == ["data", "sft", "reward_model", "ranker"]
    assert waits(nodes, "runs/golden-seed0") == ["data", "sft", "reward_model"]
    assert waits(nodes, "runs/sft-seed0") == ["sft", "reward_model"]
    shared = ["data", "sft", "pairs", "reward_model", "ranker", "steps_judge"]
    assert waits(nodes, "runs/anything-seed0") == shared  # it may mean any of them


def test_without_a_reward_model_nothing_waits_for_one(planned: Planned) -> None:
    nodes = planned(reward_model=None)
    assert waits(nodes, "runs/dpo-seed0") == ["sft", "pairs"]
    assert waits(nodes, "runs/sft-seed0") == ["sft"]


def test_without_sft_runs_start_from_the_base(planned: Planned) -> None:
    nodes = planned(sft=None, algorithms={"dpo": DPO, "plain": ["algorithm=sft", "data.path={start}"]})
    assert waits(nodes, "pairs") == ["data"]
    assert waits(nodes, "runs/dpo-seed0") == ["pairs", "reward_model"]
    assert waits(nodes, "runs/plain-seed0") == ["reward_model"]
    assert ran(nodes, "runs/dpo-seed0", "train")["model"]["path"] == "base"
    assert ran(nodes, "runs/dpo-seed0", "evaluate")["reference"] == "base"
    assert "runs/sft-seed0" not in nodes


def test_placeholders_stand_for_what_the_parts_make(planned: Planned, tmp_path: Path) -> None:
    second = ["algorithm=sft", "data=demonstrations", "data.path={ranker}/beside.jsonl"]  # one model may use another
    nodes = planned(
        models={"ranker": JUDGE, "second": second},
        algorithms={"sample_rank": RANKED, "steps": [*DPO, "data.path={steps}"]},
    )
    assert ran(nodes, "runs/sample_rank-seed0", "train")["scoring"]["path"] == f"{tmp_path}/ranker/model"
    assert ran(nodes, "runs/steps-seed0", "train")["data"]["path"] == f"{tmp_path}/data/steps.jsonl"
    assert ran(nodes, "second", "train")["data"]["path"] == f"{tmp_path}/ranker/model/beside.jsonl"
    assert waits(nodes, "second") == ["sft", "ranker"]
    assert ran(nodes, "ranker", "train")["model"]["path"] == f"{tmp_path}/sft/model"
    assert ran(nodes, "ranker", "train")["out"] == f"{tmp_path}/ranker"


def test_a_changed_model_changes_those_that_use_it_and_no_other(planned: Planned) -> None:
    algorithms = {"dpo": DPO, "sample_rank": RANKED}
    before = planned(models={"ranker": JUDGE}, algorithms=algorithms)
    after = planned(models={"ranker": [*JUDGE, "optimizer.lr=0.5"]}, algorithms=algorithms)
    changed = {name for name in before if before[name].key != after[name].key}
    assert changed == {"ranker", "runs/sample_rank-seed0"}


def test_where_metrics_go_changes_no_part(planned: Planned) -> None:
    """Otherwise switching wandb on would do everything again."""
    quiet, tracked = planned(best_of=4), planned(words=["tracker=wandb", "tracker.tags=[a]"], best_of=4)
    assert {name: node.key for name, node in quiet.items()} == {name: node.key for name, node in tracked.items()}
    assert all(
        c.config["tracker"] == {"_target_": None} for n in quiet.values() for c in n.commands if "tracker" in c.config
    )


def test_in_wandb_a_comparison_is_a_group_and_its_runs_say_what_they_are(planned: Planned) -> None:
    own = {
        "dpo": DPO,
        "mine": [*DPO, "tracker=wandb", "tracker.name=x", "tracker.job_type=y"],
        "silent": [*DPO, "tracker=none"],
    }
    nodes = planned(words=["tracker=wandb"], best_of=4, models={"ranker": JUDGE}, algorithms=own)

    def names(node: str, command: str) -> list[str]:
        return [ran(nodes, node, command)["tracker"][key] for key in ("group", "job_type", "name")]

    assert names("sft", "train") == ["demo", "sft", "demo/sft"]
    assert names("reward_model", "train") == ["demo", "reward_model", "demo/reward_model"]
    assert names("ranker", "train") == ["demo", "ranker", "demo/ranker"]
    assert names("runs/mine-seed0", "train") == ["demo", "y", "x"]
    for command in ("train", "evaluate"):
        assert names("runs/dpo-seed0", command) == ["demo", "dpo", "demo/dpo-seed0"]
        assert ran(nodes, "runs/silent-seed0", command)["tracker"] == {"_target_": None}
    assert names("runs/sft-seed0", "evaluate") == ["demo", "evaluate", "demo/sft-seed0"]
    assert names("runs/best_of_4-seed0", "evaluate") == ["demo", "evaluate", "demo/best_of_4-seed0"]

    nodes = planned(words=["tracker=wandb", "tracker.group=sweep", "tracker.name='lr=1'"])  # of the comparison
    assert names("sft", "train") == ["sweep", "sft", "lr=1/sft"]
    assert names("runs/sft-seed0", "evaluate") == ["sweep", "evaluate", "lr=1/sft-seed0"]


def test_plans_are_plain_data(planned: Planned) -> None:
    for node in planned(best_of=4, models={"ranker": JUDGE}).values():
        for command in node.commands:
            assert json.loads(json.dumps(command.config)) == command.config


# ------------------------------------------------------------------ best of N


def test_best_of_n_is_measured_and_not_trained(planned: Planned, tmp_path: Path) -> None:
    nodes = planned(best_of=[4, 16], seeds=[0, 3])
    names = [name for name in nodes if "best_of" in name]
    assert names == [f"runs/best_of_{n}-seed{seed}" for seed in (0, 3) for n in (4, 16)]
    for name in names:
        assert [command.name for command in nodes[name].commands] == ["evaluate"]
        assert waits(nodes, name) == ["sft", "reward_model"]
    found = ran(nodes, "runs/best_of_16-seed3", "evaluate")
    expected = {"run": f"{tmp_path}/sft/model", "reference": f"{tmp_path}/sft/model", "best_of": 16, "seed": 3}
    expected |= {"reward_model": f"{tmp_path}/reward_model/model", "out": f"{tmp_path}/runs/best_of_16-seed3"}
    assert {key: found[key] for key in expected} == expected
    assert {ran(nodes, f"runs/{n}-seed0", "evaluate")["best_of"] for n in ("sft", "dpo")} == {1}
    assert [name for name in planned(best_of=8) if "best_of" in name] == ["runs/best_of_8-seed0"]
    assert [name for name in planned(best_of=[]) if "best_of" in name] == []


# ------------------------------------------------------------------ mistakes


@pytest.mark.parametrize(
    ("comparison", "message"),
    [
        ({"best_of": 4, "reward_model": None}, "comparison.best_of=4: a reward model picks the best, and there"),
        ({"best_of": 1}, "comparison.best_of=1: should be greater than or equal to 2"),
        ({"best_of": [4, 0]}, "comparison.best_of=[4, 0]: should be a valid integer, or should be gr"),
        ({"best_of": [4, 4]}, "comparison: two of its parts are called runs/best_of_4-seed0"),
        ({"best_of": 4, "algorithms": {"best_of_4": DPO}}, "comparison: two of its parts are called runs/best_of_4-se"),
        ({"models": {"ranker": [*JUDGE, "optimizer.lr=x"]}}, "comparison: ranker: optimizer.lr='x': should be a valid"),
        ({"models": {"ranker": ["algorithm=dpoo"]}}, "comparison: ranker: algorithm=dpoo: there is no such option"),
        ({"models": {"a": [*SFT, "data.path={b}"], "b": SFT}}, "comparison: a: 'data.path={b}': {b} stands for"),
        ({"models": {"a": [*SFT, "data.path={a}"]}}, "comparison: a: 'data.path={a}': {a} stands for nothing here"),
        ({"models": {"sft": JUDGE}}, "comparison.models.sft: this name stands for something else: choose another"),
        ({"models": {"runs": JUDGE}}, "comparison.models.runs: this name stands for something else"),
        ({"models": {"steps": JUDGE}}, "comparison.models.steps: this name stands for something else"),
        ({"models": {"reward_model": JUDGE}, "reward_model": None}, "comparison.models.reward_model: this name stands"),
        ({"models": {"a/b": JUDGE}}, "comparison.models.a/b="),
        ({"sft": [*SFT, "data.path={sft}"]}, "comparison: sft: 'data.path={sft}': {sft} stands for nothing"),
        ({"algorithms": {"x": RANKED}}, "comparison: runs/x-seed0: 'scoring.path={ranker}': {ranker} st"),
    ],
    ids=str,
)  # fmt: skip
def test_mistakes(planned: Planned, comparison: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        planned(**comparison)
    assert str(error.value).startswith(message)


def test_best_of_n_needs_samples_that_differ(planned: Planned) -> None:
    with pytest.raises(ConfigError, match=r"^rollout\.temperature=0: best_of=4 needs samples that differ"):
        planned(best_of=4, words=["rollout.temperature=0"])


def test_a_benchmark_of_the_users(planned: Planned) -> None:
    """Its own files have placeholders; what it lacks is said."""
    words = ["algorithm=sft", "data=demonstrations", "data.path={riddles}"]
    nodes = planned(Bare(), pairs=None, reward_model=None, sft=None, algorithms={"x": words})
    assert waits(nodes, "runs/x-seed0") == ["data"]
    with pytest.raises(ConfigError, match=r"comparison\.pairs: the benchmark 'bare' has no prompts"):
        planned(Bare(), sft=None)
    with pytest.raises(ConfigError, match=r"comparison\.best_of=4: the benchmark 'bare' does not measure"):
        planned(Bare(), pairs=None, sft=None, reward_model=words, best_of=4, algorithms={"x": words})
