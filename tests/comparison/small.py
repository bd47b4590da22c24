"""A comparison on a language of five words, and what its tests ask of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml

from alignlab.cli import main
from tests.training import forks

BUDGET = 100
BATCH, LONGEST = 8, 3
EXPERIMENT: dict[str, Any] = {
    "name": "tiny",
    "model": {"dtype": "float32"},
    "rollout": {"max_new_tokens": LONGEST},
    "benchmark": {
        "demonstrations": 64,
        "prompt_copies": 8,
        "world": {"words": 5, "max_tokens": LONGEST, "prompts": 4},
        "base": {"layers": 1, "width": 32, "steps": 30, "batch_size": 64},
    },
    "comparison": {
        "seeds": [0, 1],
        "budget": {"trained_tokens": BUDGET},
        "common": ["training.progress=plain", f"training.batch_size={BATCH}", "optimizer.lr=2e-3"],
        "sft": ["algorithm=sft", "data=demonstrations", "data.path={demonstrations}"],
        "pairs": {"rounds": 2, "temperature": 0.2},
        "reward_model": ["algorithm=reward_model", "data=groups", "data.path={pairs}"],
        "algorithms": {
            "rejection_sampling": [
                *("algorithm=rejection_sampling", "source=rollout", "data=prompts", "data.path={prompts}"),
                *("scoring=reward_model", "scoring.path={reward_model}"),
            ],
            "dpo": ["algorithm=dpo", "algorithm.beta=0.25", "data=groups", "data.path={pairs}"],
        },
    },
}

PARTS = ["base", "data", "sft", "pairs", "reward_model"]
RUNS = [f"runs/{name}-seed{seed}" for seed in (0, 1) for name in ("sft", "rejection_sampling", "dpo")]
COSTS = ("seconds", "generated_tokens", "trained_tokens", "peak_memory_mb")


def write(home: Path, name: str, experiment: dict[str, Any]) -> None:
    (home / "configs/experiment").mkdir(parents=True, exist_ok=True)
    text = yaml.safe_dump(experiment, sort_keys=False)
    (home / f"configs/experiment/{name}.yaml").write_text(f"# @package _global_\n{text}")


def changed(**comparison: Any) -> dict[str, Any]:
    return EXPERIMENT | {"comparison": EXPERIMENT["comparison"] | comparison}


def command(home: Path, out: str, *more: str, experiment: str = "tiny") -> list[str]:
    return ["compare", "--config-dir", str(home / "configs"), f"experiment={experiment}", f"out={home / out}", *more]


def started(home: Path, out: str) -> list[str]:
    """The parts that have been started since the last call, by name."""
    found = [str(Path(folder).relative_to(home / out)) for folder in forks.Process.started]
    forks.Process.started.clear()
    return sorted(found)


def compare(home: Path, out: str, *more: str, experiment: str = "tiny") -> tuple[int, list[str]]:
    """Run it in this process; the status, and the parts that were started."""
    forks.Process.started.clear()
    status = main(command(home, out, *more, experiment=experiment))
    return status, started(home, out)


def board(home: Path, out: str) -> dict[str, Any]:
    found = json.loads((home / out / "leaderboard.json").read_text())
    assert isinstance(found, dict)
    return found


def rows(home: Path, out: str) -> dict[str, dict[str, Any]]:
    """What is determined by the settings: figures without those that depend on the machine."""
    found = {}
    for row in board(home, out)["rows"]:
        found[row["algorithm"]] = {
            k: v for k, v in row.items() if not k.startswith(("seconds", "peak_memory_mb", "config"))
        }
    return found


def log_of(home: Path, out: str) -> str:
    """The last lines of every part, for a failing test to show."""
    logs = sorted((home / out).rglob("log.txt"))
    return "\n".join(f"{p}:\n{p.read_text()[-800:]}" for p in logs)
