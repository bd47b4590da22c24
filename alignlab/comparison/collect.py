"""From the runs on disk to the leaderboard and the report."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from alignlab.build import section
from alignlab.comparison.graph.node import DONE, NODES, PLAN, altered, is_result, planned, read
from alignlab.comparison.report import leaderboard as board
from alignlab.comparison.report import write_report
from alignlab.comparison.settings import COSTS, ComparisonSettings
from alignlab.config import read_yaml
from alignlab.core import AlignlabError
from alignlab.core.files import read_json, read_lines
from alignlab.training.callbacks.trackers import how_to_sync
from alignlab.training.run_folder import RESULT

CURVES = (
    *("loss", "reward", "kl", "accuracy", "grad_norm"),
    *("ratio", "clip_fraction", "explained_variance", "entropy", "response_length"),  # the health of policy gradients
)
"""Metrics of training that the report draws, where a run has them."""
BOARD = "leaderboard.json"
AGAIN = "delete its folder and run the comparison again"
NOT_METRICS = ("benchmark", "frontier", "samples")


def collect(out: Path) -> board.Leaderboard:
    """Read every finished run of the comparison in `out`; write the leaderboard, `report.html` and `plots/` there. A
    run whose files are not what it wrote is left out, and said to be.

    Raises:
        AlignlabError: there is no finished run, or a file is damaged.
    """
    config = _config_of(out)
    rows, provenance, left_out = [], [], []
    curves: dict[str, dict[int, list[dict[str, Any]]]] = {}
    samples: dict[str, dict[str, str]] = {}
    frontier = None
    for folder in sorted((out / "runs").glob("*-seed*")):
        if not is_result(out, f"runs/{folder.name}"):
            continue
        if what := altered(folder):
            left_out.append(f"{folder.name}: {what}; to have it again, delete {folder} and run the comparison again")
            print(f"warning: {out}: left out: {left_out[-1]}", file=sys.stderr)
            continue
        algorithm, seed = folder.name.rsplit("-seed", 1)
        evaluation, result = (read_json(folder / name, AGAIN, absent={}) for name in ("evaluation.json", RESULT))
        measured = {k: v for k, v in evaluation.items() if k not in NOT_METRICS}
        costs = {k: result.get(k, 0) for k in COSTS}
        rows.append({"algorithm": algorithm, "seed": int(seed), **measured, **costs})
        frontier = evaluation.get("frontier", frontier)
        for sample in _samples(folder / "evaluation.json", evaluation):
            samples.setdefault(sample["prompt"], {}).setdefault(algorithm, sample["answer"])
        points = [line for _, line in read_lines(folder / "metrics.jsonl", {"step": int})]
        if points:
            curves.setdefault(algorithm, {})[int(seed)] = points
        key = read(folder / PLAN).get("key", "")
        provenance.append({"algorithm": algorithm, "seed": int(seed), "folder": str(folder), "config hash": key})
    if not rows:
        why = left_out[0] if left_out else "run `alignlab compare` first"
        raise AlignlabError(f"{out}: no finished run in it: {why}")
    comparison = config["comparison"]
    budget = {k: v for k, v in comparison["budget"].items() if v is not None}
    stages = ("sft", "pairs", "reward_model", *comparison.get("models", {}))
    shared = {n: read(out / n / RESULT) for n in stages if is_result(out, n)}
    kept = ("trained_tokens", "generated_tokens", "seconds")
    budget["shared"] = {n: {k: r[k] for k in kept if k in r} for n, r in shared.items() if r}
    if all(row.get("samples_per_answer", 1) == 1 for row in rows):
        for row in rows:
            row.pop("samples_per_answer", None)
    name = rows[0].get("benchmark") or _name(config)
    found = board.build(rows, str(name), budget, comparison["sort_by"], left_out)
    found.write(out)
    write_report(
        out / "report.html",
        found,
        frontier=frontier,
        curves=_by_metric(curves),
        samples=samples,
        provenance=provenance,
    )
    return found


def is_current(out: Path) -> bool:
    """Whether the leaderboard was made after what it is made of: the plan, and what of it has finished."""
    board = out / BOARD
    if not board.exists():
        return False
    parts = [out / name / DONE for name in planned(out)]
    return all(p.stat().st_mtime_ns <= board.stat().st_mtime_ns for p in (out / NODES, *parts) if p.exists())


def is_complete(out: Path) -> bool:
    """Whether every part of the comparison is done as it was last planned, and the leaderboard made of them."""
    names = planned(out)
    return bool(names) and is_current(out) and all(is_result(out, name) for name in names)


def rebuild(out: Path) -> None:
    """Leaderboard and report again from what is on disk, printed."""
    collect(out).print()
    if (read_yaml(out / "config.yaml").get("tracker") or {}).get("mode") == "offline":
        print(how_to_sync(out))
    print(f"{out}/leaderboard.json, .csv, .md and report.html")


def run_node(config: dict[str, Any], folder: Path) -> None:
    """The command `report` of a graph: `config["out"]` is the comparison's folder."""
    rebuild(Path(config["out"]))


def _name(config: dict[str, Any]) -> str:
    return str(config["benchmark"]["_target_"]).rsplit(".", 1)[-1].removesuffix("Benchmark").lower()


def _by_metric(curves: dict[str, dict[int, list[dict[str, Any]]]]) -> dict[str, Any]:
    """metric → algorithm → seed → [(step, value), …]."""
    found: dict[str, Any] = {}
    for metric in CURVES:
        for algorithm, seeds in curves.items():
            for seed, lines in seeds.items():
                points = [(line["step"], line[metric]) for line in lines if line.get(metric) is not None]
                if points:
                    found.setdefault(metric, {}).setdefault(algorithm, {})[seed] = points
    return found


def _samples(path: Path, evaluation: dict[str, Any]) -> list[dict[str, str]]:
    """What an evaluation shows of the answers.

    Raises:
        AlignlabError: it has another shape; a benchmark of the user's may have it so.
    """
    try:
        return TypeAdapter(list[dict[str, str]]).validate_python(
            [{key: sample[key] for key in ("prompt", "answer")} for sample in evaluation.get("samples") or []]
        )
    except (ValidationError, TypeError, KeyError) as error:
        what = 'samples must be a list of {"prompt": TEXT, "answer": TEXT}'
        raise AlignlabError(f"{path}: {what}: is it the benchmark that returns it so?") from error


def _config_of(out: Path) -> dict[str, Any]:
    """The config of the comparison in a folder.

    Raises:
        ConfigError: it is damaged, or there is none.
    """
    advice = "is this the folder of a comparison? The command that made it writes it anew"
    config = read_yaml(out / "config.yaml", "comparison", "benchmark", advice=advice)
    section(ComparisonSettings, config["comparison"], f"{out / 'config.yaml'}: comparison")
    return config
