"""Learning curves out of runs' `metrics.jsonl`, and their thinning for a plot."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from math import isfinite
from pathlib import Path

from alignlab.core import DataError

Point = tuple[float, float]
Curves = dict[str, dict[str, dict[int, list[Point]]]]
"""metric → algorithm → seed → (step, value) pairs, steps ascending."""


def read_curves(folders: Mapping[str, Mapping[int, str | os.PathLike[str]]], metrics: Sequence[str]) -> Curves:
    """Read some metrics of runs from the `metrics.jsonl` in their folders.

    Args:
        folders: algorithm → seed → the run's folder.
        metrics: names as in the files. What no run has recorded is left out of the result.

    Raises:
        DataError: a file is absent, or a line is no JSON object with a `step`.
    """
    curves: Curves = {}
    for algorithm, seeds in folders.items():
        for seed, folder in seeds.items():
            for name, points in _read(Path(folder) / "metrics.jsonl", metrics).items():
                curves.setdefault(name, {}).setdefault(algorithm, {})[seed] = points
    return {name: curves[name] for name in metrics if name in curves}


def _read(path: Path, metrics: Sequence[str]) -> dict[str, list[Point]]:
    found: dict[str, dict[float, float]] = {}
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise DataError(f"{path}: the run's metrics cannot be read ({error.strerror})") from error
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
            step = float(entry["step"])
        except (ValueError, TypeError, KeyError) as error:
            raise DataError(f"{path}:{number}: not a JSON object with a numeric 'step'") from error
        for name in metrics:
            value = entry.get(name)
            if isinstance(value, int | float) and isfinite(value):
                found.setdefault(name, {})[step] = float(
                    value
                )  # a resumed run writes some steps again: the last counts
    return {name: sorted(points.items()) for name, points in found.items()}


def thin(points: Sequence[Point], low: float, high: float, bins: int = 80) -> list[Point]:
    """Average points within equal bins of [low, high]: what a plot can show, and a mild smoothing of long runs.

    A point's x becomes its bin's middle, so that curves thinned over the same range can be averaged with each other.
    Values that are not finite are left out.
    """
    sums: dict[int, tuple[float, int]] = {}
    for x, y in points:
        if isfinite(y):
            index = min(bins - 1, int((x - low) / (high - low) * bins)) if high > low else 0
            total, count = sums.get(index, (0.0, 0))
            sums[index] = (total + y, count + 1)
    width = (high - low) / bins
    return [(low + (index + 0.5) * width, total / count) for index, (total, count) in sorted(sums.items())]


def mean_curve(curves: Sequence[Sequence[Point]]) -> list[Point]:
    """The mean over curves at each x that all of them have."""
    at: dict[float, list[float]] = {}
    for curve in curves:
        for x, y in curve:
            at.setdefault(x, []).append(y)
    return [(x, sum(ys) / len(ys)) for x, ys in sorted(at.items()) if len(ys) == len(curves)]
