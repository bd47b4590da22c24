"""A comparison with best-of-N sampling and a further model, run to its end."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from alignlab.cli import main
from tests.comparison.small import EXPERIMENT, board, changed, compare, log_of, rows, write

RANKED = [w.replace("{reward_model}", "{ranker}") for w in EXPERIMENT["comparison"]["algorithms"]["rejection_sampling"]]


@pytest.fixture(scope="module")
def staged(home: Path) -> str:
    judge = EXPERIMENT["comparison"]["reward_model"]
    experiment = changed(
        seeds=[0], best_of=[2, 6], models={"ranker": [*judge, "optimizer.lr=1e-3"]}, algorithms={"ranked": RANKED}
    )
    write(home, "staged", experiment)
    status, parts = compare(home, "staged", experiment="staged")
    assert status == 0, log_of(home, "staged")
    runs = [f"runs/{name}-seed0" for name in ("sft", "best_of_2", "best_of_6", "ranked")]
    assert parts == sorted(["base", "data", "sft", "pairs", "reward_model", "ranker", *runs])
    return "staged"


def evaluation(home: Path, staged: str, name: str) -> dict[str, Any]:
    found = json.loads((home / staged / f"runs/{name}-seed0/evaluation.json").read_text())
    assert isinstance(found, dict)
    return found


def test_best_of_n_has_its_rows(home: Path, staged: str) -> None:
    found = rows(home, staged)
    assert set(found) == {"sft", "best_of_2", "best_of_6", "ranked"}
    for n in (2, 6):
        row = found[f"best_of_{n}"]
        assert row["trained_tokens"] == row["generated_tokens"] == 0  # nothing was trained
        assert row["samples_per_answer"] == n  # what it costs instead
        assert 0 < row["kl"] <= {2: 0.193148, 6: 0.958427}[n]  # log n - (n - 1)/n
    assert {found[name]["samples_per_answer"] for name in ("sft", "ranked")} == {1}
    assert found["sft"]["proxy_reward"] < found["best_of_2"]["proxy_reward"] < found["best_of_6"]["proxy_reward"]
    for name in ("leaderboard.md", "report.html"):
        assert "best_of_6" in (home / staged / name).read_text()


def test_costs_of_further_models_are_told(home: Path, staged: str) -> None:
    shared = board(home, staged)["budget"]["shared"]
    assert list(shared) == ["sft", "pairs", "reward_model", "ranker"]
    assert shared["ranker"]["trained_tokens"] == shared["reward_model"]["trained_tokens"] > 0


def test_evaluate_gives_what_the_comparison_gives(home: Path, staged: str) -> None:
    out = home / staged
    words = [
        f"run={out}/sft/model",
        f"reference={out}/sft/model",
        f"reward_model={out}/reward_model/model",
        "best_of=6",
    ]
    world = ["++benchmark.world={words: 5, max_tokens: 3, prompts: 4}", "model.dtype=float32"]
    assert main(["evaluate", *words, *world, f"out={home}/alone"]) == 0
    alone = json.loads((home / "alone/evaluation.json").read_text())
    assert alone == evaluation(home, staged, "best_of_6")


def test_runs_were_scored_by_the_model_they_named(home: Path, staged: str) -> None:
    plan = json.loads((home / staged / "runs/ranked-seed0/node.json").read_text())["commands"]
    assert dict(plan)["train"]["scoring"]["path"] == f"{home}/{staged}/ranker/model"
    assert dict(plan)["evaluate"]["reward_model"] == f"{home}/{staged}/reward_model/model"


def test_without_best_of_n_there_is_no_column_for_it(home: Path, staged: str) -> None:
    """In the same folder, so that nothing else runs again."""
    status, parts = compare(home, "staged", "comparison.best_of=null", experiment="staged")
    assert (status, parts) == (0, [])
    assert set(rows(home, staged)) == {"sft", "ranked"}
    assert not any("samples_per_answer" in row for row in board(home, staged)["rows"])
