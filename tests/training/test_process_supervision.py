"""Process supervision as the command line makes it: labels by completions, a model of them, what it guides."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from alignlab.benchmarks.reasoning import ReasoningBenchmark, Teacher, TeacherSettings, is_right
from alignlab.benchmarks.reasoning.base_model import BaseModelSettings, base_model
from alignlab.benchmarks.reasoning.problems import tokenizer
from alignlab.config import compose, resolve
from alignlab.core import ConfigError
from alignlab.data import DataSettings, load
from alignlab.data.steps import Steps
from alignlab.rollout.produce import produce
from alignlab.training.run import train

QUIET = ["training.progress=off", "training.batch_size=8", "training.epochs=null", "training.steps=3"]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base model that knows what a solution looks like, and a benchmark's data."""
    folder = tmp_path_factory.mktemp("chain")
    made = base_model(
        Teacher(TeacherSettings(most_steps=3)), BaseModelSettings(steps=40, batch_size=16, width=32), folder
    )
    made.rename(folder / "base")
    counts = {"demonstrations": 4, "prompts": 12, "solutions": 64, "test_problems": 4}
    ReasoningBenchmark(**counts, teacher={"most_steps": 3}).write_data(folder / "data", str(folder / "base"))
    return folder


def run(place: Path, out: str, *words: str) -> dict[str, Any]:
    config = resolve(compose("train", [f"out={place}/{out}", *QUIET, *words]))
    return train(config, place / out)


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_labels_by_completions_are_a_data_set(place: Path) -> None:
    words = [
        *(f"model={place}/base", f"data.path={place}/data/prompts.jsonl", "group_size=2", "rollout.max_new_tokens=24"),
        *("scoring=monte_carlo", "scoring.completions=3", "scoring.estimate=soft"),
        "scoring.function.path=alignlab.benchmarks.reasoning.is_right",
    ]
    result = produce(resolve(compose("sample", words)), place / "labelled")
    assert result["groups"] == 12
    splits = load(DataSettings(path=str(place / "labelled/groups.jsonl")), tokenizer())
    assert sum(splits.report.step_labels) == splits.report.loss_tokens > 24
    thirds = {round(-1 + 2 * k / 3, 6) for k in range(4)}
    for group in splits.train:
        for response in group.responses:
            labels = response.columns["step_label"]
            assert isinstance(labels, np.ndarray)
            assert response.predicted == Steps(tokenizer()).ends(response.token_ids)
            assert {round(x, 6) for x in labels} <= thirds
            assert labels[-1] == 2 * is_right(group.prompt, response.text, {}) - 1
    out = run(
        place,
        "from_completions",
        *("algorithm=process_reward_model", f"model={place}/base", "data=groups"),
        f"data.path={place}/labelled/groups.jsonl",
    )
    assert out["step"] == 3
    words[-1] = "scoring.function.path=alignlab.benchmarks.reasoning.none"
    with pytest.raises(ConfigError, match=r"scoring\.function\.path.*has no 'none'"):
        produce(resolve(compose("sample", words)), place / "never")


@pytest.mark.parametrize("adapter", ["none", "lora"])
def test_a_model_of_steps_guides_search_and_learning(place: Path, adapter: str) -> None:
    prm = f"prm_{adapter}"
    run(
        place,
        prm,
        *("algorithm=process_reward_model", f"model={place}/base", f"adapter={adapter}", "data=steps"),
        *(f"data.path={place}/data/steps.jsonl", "data.validation=0.5", "training.eval_every=3"),
    )
    watched = [m for m in lines(place / prm / "metrics.jsonl") if "eval/loss" in m][-1]
    for name in ("eval/accuracy", "eval/accuracy_right", "eval/accuracy_wrong", "eval/f1"):
        assert 0 <= watched[name] <= 1
    scorer = f"{{_target_: alignlab.scoring.ProcessRewardScorer, path: '{place}/{prm}/model'}}"
    result = run(
        place,
        f"guided_{adapter}",
        *("algorithm=expert_iteration", "algorithm.minimum=0.0", f"model={place}/base", "data=prompts"),
        *(
            f"data.path={place}/data/prompts.jsonl",
            "source=rollout",
            "source.group_size=1",
            "rollout.max_new_tokens=24",
        ),
        *("environment=steps", "environment.beams=2", "environment.expand=2", f"environment.scorer={scorer}"),
        *("scoring=process_reward", f"scoring.path={place}/{prm}/model"),
    )
    assert result["generated_tokens"] > 2 * result["trained_tokens"], "what was thrown away counts"
    last = lines(place / f"guided_{adapter}/metrics.jsonl")[-1]
    assert 0 <= last["reward"] <= 1
    assert last["good_enough"] == 1.0
