"""Folders of runs, comparisons and sweeps as they are found, some from someone else."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml

from alignlab.comparison.graph.node import MEASURED
from alignlab.core.files import checksums
from tests.comparison import small

KEY = "0123456789abcdef"


def quick_benchmark(here: Path, prepared: Path) -> None:
    """A benchmark of the user's that takes no time: `--config-dir={here}/configs benchmark=quick`."""
    code = "class Quick:\n    name = 'quick'\n    def evaluate(self, subject):\n        return {'reward': 1.0}\n"
    (here / "mine.py").write_text(code)
    (here / "configs/benchmark").mkdir(parents=True)
    (here / "configs/benchmark/quick.yaml").write_text("_target_: mine.Quick\n")


def module_that_owns(here: Path, prepared: Path) -> None:
    """A module that runs something where it is imported."""
    code = f"from pathlib import Path\nPath({str(here / 'owned')!r}).touch()\nclass Mine:\n    pass\n"
    (here / "mine_owns.py").write_text(code)


def foreign(here: Path, prepared: Path, folder: str = "run", **sections: Any) -> None:
    """Replace keys of a folder's config; `{here}` in them is the case's folder."""
    path = here / folder / "config.yaml"
    given = json.loads(json.dumps(sections).replace("{here}", str(here)))
    path.write_text(yaml.safe_dump({**yaml.safe_load(path.read_text()), **given}))


def comparison(here: Path, prepared: Path, names: tuple[str, ...] = ("a", "b"), **changes: Any) -> None:
    """A finished comparison, as `compare` leaves it.

    Args:
        changes: of the first run's evaluation.json, made before the run has noted what it wrote.
    """
    out, planned = here / "comparison", {}
    for i, name in enumerate(names):
        folder = out / f"runs/{name}-seed0"
        folder.mkdir(parents=True)
        evaluation = {"benchmark": "exact", "reward": 0.5 + i / 10, "kl": 0.1, "win_rate": 0.5, "objective_score": 0.3}
        _json(folder / "evaluation.json", evaluation | (changes if i == 0 else {}))
        _json(folder / "result.json", {"seconds": 1.0, "generated_tokens": 0, "trained_tokens": 9})
        _json(folder / "node.json", {"key": KEY, "commands": []})
        _json(folder / "done.json", {"key": KEY, "seconds": 1.0, "files": checksums(folder, MEASURED)})
        planned[f"runs/{name}-seed0"] = KEY
    _json(out / "nodes.json", planned)
    _json(out / "submitted.json", {"graph": {name: [] for name in planned}, "entries": {}})
    settings = {"seeds": [0], "common": [], "sft": None, "pairs": None, "reward_model": None, "workers": 1}
    settings |= {"budget": {"steps": 1}, "algorithms": {name: [] for name in names}, "threads": 1, "sort_by": None}
    config = {"name": "x", "out": str(out), "comparison": settings, "benchmark": {"_target_": "nowhere.Exact"}}
    (out / "config.yaml").write_text(yaml.safe_dump(config))


def tampered(here: Path, prepared: Path, file: str = "evaluation.json", runs: tuple[str, ...] = ("a",)) -> None:
    """A reward of 99 in what a run has measured."""
    for name in runs:
        path = here / f"comparison/runs/{name}-seed0" / file
        path.write_text(json.dumps({**json.loads(path.read_text()), "reward": 99}))


def sweep(here: Path, prepared: Path, name: str = "run", reason: str = "") -> None:
    """A sweep of one run that failed for a reason of its own."""
    folder = here / "sweep"
    (folder / "run").mkdir(parents=True)
    one = {"name": "run", "values": {"algorithm.name": name}, "overrides": [f"name={name}"]}
    told = {"command": "train", "own": None, "sweeper": {"kind": "grid"}, "runs": [one]}
    _json(folder / "sweep.json", told)
    _json(folder / "nodes.json", {"run": KEY})
    _json(folder / "run/failed.json", {"key": KEY, "reason": reason, "log": ""})


def experiment(here: Path, prepared: Path, **changed: Any) -> None:
    """The small comparison's experiment, with changes of its section `comparison`."""
    top = changed.pop("top", {})
    small.write(here, "tiny", small.changed(**changed) | top)


def _json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value))
