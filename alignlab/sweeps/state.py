"""What a run of a sweep has come to, as its folder says."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml

from alignlab.comparison.collect import BOARD, is_current
from alignlab.comparison.graph import NODES, is_result
from alignlab.core.files import write_json
from alignlab.sweeps.combinations import Combination
from alignlab.training.callbacks.pruning import PRUNED
from alignlab.training.run_folder import RESULT, fingerprint

FAILED = "failed.json"
"""Left by a run that failed: `reason`, and `log`, where there is more to read."""

NO_FIGURES = ("step", "time")
"""Numbers in metrics.jsonl that say where a line belongs."""


@dataclass(frozen=True)
class Standing:
    """What a run has come to.

    Attributes:
        reason, log: why it failed, and the file that says more.
    """

    state: Literal["finished", "pruned", "failed", "unfinished"]
    reason: str = ""
    log: str = ""


def standing(command: str, folder: Path) -> Standing:
    """What the run in a folder has come to."""
    if (folder / FAILED).exists():  # removed when it is begun again
        told = read(folder / FAILED)
        return Standing("failed", str(told.get("reason", "?")), str(told.get("log", "")))
    if _finished(command, folder):
        return Standing("finished")
    return Standing("pruned" if (folder / PRUNED).exists() else "unfinished")


def is_over(command: str, combination: Combination, own: Path | None) -> bool:
    """Whether a run is finished, or was pruned, with the settings that it is now to have.

    Raises:
        ConfigError: what a comparison consists of cannot be planned.
    """
    folder, config = combination.folder, combination.config
    if not _finished(command, folder) and not (folder / PRUNED).exists():
        return False
    if command == "train":
        return config["training"]["resume"] != "never" and _same(folder, config)
    from alignlab.benchmarks.evaluate import build_benchmark
    from alignlab.comparison.planning import plan
    from alignlab.comparison.settings import ComparisonSettings
    from alignlab.config import section

    settings = section(ComparisonSettings, config["comparison"], "comparison")
    return all(node.done for node in plan(config, settings, build_benchmark(config["benchmark"]), folder, own))


def begin(folder: Path, anew: bool) -> None:
    """Make the folder ready for a run to be launched.

    Args:
        anew: what it has come to before is of no account.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for name in (FAILED, *((RESULT, PRUNED) if anew else ())):
        (folder / name).unlink(missing_ok=True)


def failed(folder: Path, reason: str, log: Path | str = "") -> None:
    """Note why a run failed."""
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / FAILED, {"reason": reason, "log": str(log)})


def figures(command: str, folder: Path) -> dict[str, float]:
    """Everything measured of a run: its evaluation, else the last line of metrics.jsonl that has it, else
    evaluation.json; of a comparison, what stands in the first row of its leaderboard."""
    if command == "compare":
        rows = read(folder / BOARD).get("rows") or [{}]
        return _numbers(rows[0])
    found = _numbers(read(folder / "evaluation.json"))
    try:
        lines = (folder / "metrics.jsonl").read_text(errors="replace").splitlines()
    except OSError:
        lines = []
    for line in lines:
        try:
            found |= _numbers(json.loads(line))
        except ValueError:  # being written, or of a killed process
            continue
    result = read(folder / RESULT) or read(folder / PRUNED)
    found |= _numbers(result) | _numbers(result.get("evaluation"))
    return {name: value for name, value in found.items() if name not in NO_FIGURES} | _numbers(
        {"steps": result.get("step")}
    )


def read(path: Path) -> dict[str, Any]:
    """A JSON object; empty where there is none that can be read."""
    try:
        return dict(json.loads(path.read_text()))
    except (OSError, ValueError, TypeError):
        return {}


def _finished(command: str, folder: Path) -> bool:
    if command == "train":
        return (folder / RESULT).exists()
    nodes = read(folder / NODES)
    return is_current(folder) and bool(nodes) and all(is_result(folder, folder / name) for name in nodes)


def _same(folder: Path, config: dict[str, Any]) -> bool:
    try:
        saved = yaml.safe_load((folder / "config.yaml").read_text())
        return fingerprint(saved) == fingerprint(config)
    except (OSError, ValueError, AttributeError, yaml.YAMLError):
        return False


def _numbers(values: Any) -> dict[str, float]:
    if not isinstance(values, dict):
        return {}
    return {k: v for k, v in values.items() if isinstance(v, int | float) and not isinstance(v, bool)}
