"""The leaderboard: metrics of runs in, one row per algorithm out, best first, with 95 % intervals and tests.

    board = build(rows, benchmark="exact", budget={"generated_tokens": 1_000_000})
    board.print()
    board.write("runs/demo")  # leaderboard.json, leaderboard.csv, leaderboard.md

A row of the input is a run: `algorithm`, `seed`, the metrics of `REQUIRED` and any further numeric ones. A metric that
could not be measured is left out, None or NaN. `<metric>_per_prompt` holds the same metric for each prompt of the
benchmark, in the benchmark's order, for intervals over prompts; leave it out where the prompts are all there are (the
exact benchmark) rather than a sample of those one cares for.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from alignlab.comparison.report.metrics import metric, ordered
from alignlab.comparison.statistics import Comparison, Estimate, Measured, compare_all, estimate, prompt_errors
from alignlab.core import AlignlabError, ConfigError, did_you_mean
from alignlab.core.files import write_text

if TYPE_CHECKING:
    from rich.console import Console

REQUIRED = ("reward", "kl", "win_rate", "seconds", "generated_tokens", "trained_tokens", "peak_memory_mb")
"""Metrics that every row of the leaderboard has (None where not measured), besides `algorithm` and `seed`."""

NOTE = "note"
"""What must be said of a run's metrics; stands below every table."""

PER_PROMPT = "_per_prompt"


@dataclass(frozen=True)
class Leaderboard:
    """Aggregated rows, best first, and what they were made of. Made by `build`.

    Attributes:
        benchmark: name of what was measured on.
        budget: what every algorithm was allowed, by name.
        sort_by: the metric that ranks.
        rows: one per algorithm: `algorithm`, `rank` (from 1; None without the ranking metric), `seeds`,
            `indistinguishable_from_best` (None where it cannot be tested), and for each metric its mean over seeds,
            `_low` and `_high` (None where there is none), and `_seeds`, how many seeds it is a mean over, where they
            are fewer than the row's; `note` where a run has one.
        runs: one per algorithm and seed, as given, with None for what is not finite.
        metrics: names of all metrics, in the order of their columns.
        comparisons: every pair of algorithms on the ranking metric.
        prompts: metric → number of prompts its intervals were bootstrapped over; absent where there are none.
        left_out: runs that are not among the rows, since their files were changed afterwards: which, and why.
    """

    benchmark: str
    budget: dict[str, Any]
    sort_by: str
    rows: list[dict[str, Any]]
    runs: list[dict[str, Any]]
    metrics: list[str]
    comparisons: list[Comparison] = field(default_factory=list)
    prompts: dict[str, int] = field(default_factory=dict)
    left_out: list[str] = field(default_factory=list)

    @property
    def columns(self) -> list[str]:
        """The metrics that tables show."""
        return [name for name in self.metrics if not metric(name).hidden]

    def to_dict(self) -> dict[str, Any]:
        """`{"benchmark", "budget", "rows"}`, all of it JSON."""
        return {"benchmark": self.benchmark, "budget": self.budget, "rows": self.rows}

    def estimate(self, row: Mapping[str, Any], name: str) -> Estimate | None:
        """One metric of one of `rows`, or None where it is missing."""
        mean = row.get(name)
        return None if mean is None else Estimate(mean, row[f"{name}_low"], row[f"{name}_high"])

    def between(self, a: str, b: str) -> Comparison:
        """Algorithm a against algorithm b on the ranking metric."""
        for pair in self.comparisons:
            if (pair.a, pair.b) == (a, b):
                return pair
            if (pair.a, pair.b) == (b, a):
                return pair.flipped()
        return Comparison(a, b, None, None)

    def best(self, name: str) -> set[str]:
        """The algorithms whose mean is best; empty for costs and metrics without a better direction."""
        known = metric(name)
        values = {row["algorithm"]: row[name] * known.better for row in self.rows if row[name] is not None}
        if known.cost or not known.better or not values:
            return set()
        return {algorithm for algorithm, value in values.items() if value == max(values.values())}

    def to_json(self) -> str:
        """The text of `leaderboard.json`: `to_dict()`, then `sort_by`, `comparisons` and `runs`; one row a line."""
        comparisons = [_pair_to_dict(pair) for pair in self.comparisons]
        lists = {"rows": self.rows, "comparisons": comparisons, "runs": self.runs}
        parts = [f'"{key}": {_dump(value)}' for key, value in self.to_dict().items() if key != "rows"]
        parts.append(f'"sort_by": {_dump(self.sort_by)}')
        parts += [f'"left_out": {_dump(self.left_out)}'] if self.left_out else []
        for key, items in lists.items():
            lines = ",\n".join("    " + _dump(item) for item in items)
            parts.append(f'"{key}": [\n{lines}\n  ]' if items else f'"{key}": []')
        return "{\n  " + ",\n  ".join(parts) + "\n}\n"

    def write(self, folder: str | os.PathLike[str]) -> None:
        """Write `leaderboard.json`, `.csv` and `.md` into a folder, each whole or not at all."""
        from alignlab.comparison.report.tables import to_csv, to_markdown

        Path(folder).mkdir(parents=True, exist_ok=True)
        for suffix, text in (("json", self.to_json()), ("csv", to_csv(self)), ("md", to_markdown(self))):
            write_text(Path(folder) / f"leaderboard.{suffix}", text)

    def print(self, console: Console | None = None) -> None:
        """Print the table and the verdict."""
        from alignlab.comparison.report.tables import print_leaderboard

        print_leaderboard(self, console)


def build(
    rows: Iterable[Mapping[str, Any]],
    benchmark: str,
    budget: Mapping[str, Any],
    sort_by: str | None = None,
    left_out: Sequence[str] = (),
) -> Leaderboard:
    """Aggregate runs over seeds, rank the algorithms and test every pair.

    Args:
        rows: one per algorithm and seed (see the top of this file).
        benchmark: name of what was measured on.
        budget: what every algorithm was allowed; kept and shown as it is.
        sort_by: the metric that ranks; `objective_score` where there is one, else `reward`.
        left_out: what is said of runs that are not among the rows.

    Raises:
        AlignlabError: a metric is no number, or a run appears twice.
        ConfigError: no row has the metric `sort_by`.
    """
    runs = [_checked(row) for row in rows]
    if not runs:
        raise AlignlabError("a leaderboard needs at least one run, got none: has any run of the comparison finished?")
    by_algorithm: dict[str, dict[int, dict[str, Any]]] = {}
    for run in runs:
        seeds = by_algorithm.setdefault(run["algorithm"], {})
        if run["seed"] in seeds:
            raise AlignlabError(f"two rows for algorithm '{run['algorithm']}' and seed {run['seed']}: keep one of them")
        seeds[run["seed"]] = run
    names = ordered({key for run in runs for key, value in run.items() if _is_number(value)} - {"seed"})
    if sort_by is None:
        sort_by = "objective_score" if "objective_score" in names else "reward"
    elif sort_by not in names:
        raise ConfigError(
            f"comparison.sort_by={sort_by}: no run has this metric{did_you_mean(sort_by, names)} "
            "(the same command with another one trains nothing again)"
        )

    rows_out: list[dict[str, Any]] = [
        {"algorithm": algorithm, "rank": None, "seeds": sorted(seeds), "indistinguishable_from_best": None}
        for algorithm, seeds in by_algorithm.items()
    ]
    prompts: dict[str, int] = {}
    ranking: dict[str, Measured] = {}
    for name in names:
        measured, prompts_used = _measured(by_algorithm, name)
        if prompts_used:
            prompts[name] = prompts_used
        if name == sort_by:
            ranking = measured
        for row in rows_out:
            row.update(_aggregate(name, measured.get(row["algorithm"]), len(row["seeds"])))
    for row in rows_out:
        notes = dict.fromkeys(run[NOTE] for run in by_algorithm[row["algorithm"]].values() if run.get(NOTE))
        row.update({NOTE: "; ".join(notes)} if notes else {})
    sign = -1 if metric(sort_by).better < 0 else 1
    rows_out.sort(key=lambda r: (r.get(sort_by) is None, -sign * (r.get(sort_by) or 0), r["algorithm"]))
    ranked = [row for row in rows_out if row["algorithm"] in ranking]
    comparisons = compare_all({row["algorithm"]: ranking[row["algorithm"]] for row in ranked})
    board = Leaderboard(benchmark, dict(budget), sort_by, rows_out, runs, names, comparisons, prompts, list(left_out))
    for position, row in enumerate(ranked):
        differs = board.between(ranked[0]["algorithm"], row["algorithm"]).significant if position else False
        row |= {"rank": position + 1, "indistinguishable_from_best": None if differs is None else not differs}
    return board


def _checked(row: Mapping[str, Any]) -> dict[str, Any]:
    """The row with all metrics of `REQUIRED`, None for what is not finite; an error for what cannot be a metric."""
    where = f"algorithm '{row['algorithm']}', seed {row['seed']}"
    checked: dict[str, Any] = {"algorithm": row["algorithm"], "seed": row["seed"]}
    for key, value in {**row, **{name: None for name in REQUIRED if name not in row}}.items():
        if key in ("algorithm", "seed", NOTE):
            checked[key] = value
        elif not key.endswith(PER_PROMPT):
            checked[key] = _number(value, f"{where}: '{key}'")
        elif value is not None:
            if not isinstance(value, list):
                raise AlignlabError(f"{where}: '{key}' must be a list of numbers, got {value!r}")
            checked[key] = [_number(v, f"{where}: '{key}' at prompt {i}") for i, v in enumerate(value)]
    return checked


def _number(value: object, where: str) -> int | float | None:
    if value is not None and not _is_number(value):
        raise AlignlabError(f"{where} must be a number, got {value!r}")
    return None if isinstance(value, float) and not isfinite(value) else value  # type: ignore[return-value]


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _measured(
    by_algorithm: Mapping[str, Mapping[int, Mapping[str, Any]]], name: str
) -> tuple[dict[str, Measured], int]:
    """One metric of every algorithm that has it, and the number of prompts that its errors were bootstrapped over."""
    values = {
        algorithm: {seed: float(run[name]) for seed, run in seeds.items() if run.get(name) is not None}
        for algorithm, seeds in by_algorithm.items()
    }
    values = {algorithm: seeds for algorithm, seeds in values.items() if seeds}
    key = name + PER_PROMPT
    lists: dict[tuple[str, int], list[float | None]] = {}
    for algorithm, seeds in values.items():
        with_list = {seed for seed in seeds if by_algorithm[algorithm][seed].get(key)}
        if with_list and with_list != seeds.keys():
            missing = ", ".join(str(seed) for seed in sorted(seeds.keys() - with_list))
            raise AlignlabError(f"algorithm '{algorithm}' has '{key}' for some seeds but not for {missing}")
        lists |= {(algorithm, seed): by_algorithm[algorithm][seed][key] for seed in sorted(with_list)}
    errors, prompts = _prompt_errors(lists, values, key)
    measured = {
        algorithm: Measured(seeds, {seed: errors[algorithm, seed] for seed in seeds if (algorithm, seed) in errors})
        for algorithm, seeds in values.items()
    }
    return measured, prompts


def _prompt_errors(
    lists: Mapping[tuple[str, int], Sequence[float | None]], values: Mapping[str, Mapping[int, float]], key: str
) -> tuple[dict[tuple[str, int], Any], int]:
    """Bootstrapped errors by run, over the prompts on which every run has a value, and the number of these prompts."""
    if not lists:
        return {}, 0
    lengths = {len(values_of_run) for values_of_run in lists.values()}
    if len(lengths) > 1:
        raise AlignlabError(
            f"'{key}' has {min(lengths)} values in one run and {max(lengths)} in another: "
            "all runs of a leaderboard must be measured on the same prompts"
        )
    value_RQ = np.array([[np.nan if v is None else v for v in lists[run]] for run in lists], dtype=np.float64)
    for (algorithm, seed), value_Q in zip(lists, value_RQ, strict=True):
        present_Q = value_Q[np.isfinite(value_Q)]
        value = values[algorithm][seed]
        scale = max(1.0, float(np.abs(present_Q).max(initial=0.0)))
        if not len(present_Q) or abs(present_Q.mean() - value) > 1e-3 * scale:
            mean = float(present_Q.mean()) if len(present_Q) else None
            raise AlignlabError(
                f"algorithm '{algorithm}', seed {seed}: the mean of '{key}' is {mean} but the run's value is {value}"
            )
    common_RQ = value_RQ[:, np.isfinite(value_RQ).all(0)]
    if common_RQ.shape[1] < 2:
        return {}, 0
    return dict(zip(lists, prompt_errors(common_RQ), strict=True)), common_RQ.shape[1]


def _aggregate(name: str, measured: Measured | None, seeds: int) -> dict[str, Any]:
    """The keys of one metric in an aggregated row."""
    if measured is None:
        return {name: None, f"{name}_low": None, f"{name}_high": None}
    found, known = estimate(measured), metric(name)
    low = None if found.low is None else min(found.mean, max(found.low, known.low))
    high = None if found.high is None else max(found.mean, min(found.high, known.high))
    row: dict[str, Any] = {name: found.mean, f"{name}_low": low, f"{name}_high": high}
    if len(measured.values) < seeds:
        row[f"{name}_seeds"] = len(measured.values)
    return row


def _pair_to_dict(pair: Comparison) -> dict[str, Any]:
    d = pair.difference
    interval = {"difference": d and d.mean, "difference_low": d and d.low, "difference_high": d and d.high}
    return {"a": pair.a, "b": pair.b, **interval, "p": pair.p, "p_holm": pair.p_holm, "seeds": pair.seeds}


def _dump(value: object) -> str:
    return json.dumps(value, ensure_ascii=False, allow_nan=False)
