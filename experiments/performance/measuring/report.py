"""From measurements to rows, targets and Markdown."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, fields
from statistics import median
from typing import Any, Literal

from measuring.processes import Case
from measuring.work import Scale

TOLERANCE = 1e-4
"""Largest difference of a step's loss that is put down to rounding in float32, as a part of it where it is above 1."""
NOISY = 0.15
"""CPU cores that other processes may have used during a measurement without its being called noisy."""

Quantity = Literal["speed", "memory", "share", "seconds", "exponent"]


@dataclass(frozen=True)
class Measured:
    """What a process of a case found."""

    work: str
    key: str
    repeat: int
    figures: dict[str, Any]


@dataclass(frozen=True)
class Row:
    """A case: medians over its processes, and ratios to the base of the same work.

    Attributes:
        seconds, cpu_seconds: of a step; NaN where there was none. `low`, `high`: the range of the medians of seconds.
        above_mb: most memory above the loaded model. `loaded_mb`: before it.
        tokens_per_second: tokens of prompts and responses as they are, each once; NaN where not known.
        least_cpu: the fewest CPU seconds of any step, which other programs disturb least.
        seconds_ratio, cpu_ratio, least_ratio, memory_ratio: this one's by the base's.
        loss_difference: the most that a step's loss differs from the base's, as a part of it where it is above 1; None
            where there is no base.
        others: cores that other processes used meanwhile, at most.
    """

    work: str
    key: str
    label: str
    seconds: float
    low: float
    high: float
    cpu_seconds: float
    least_cpu: float
    above_mb: float
    loaded_mb: float
    tokens_per_second: float
    seconds_ratio: float
    cpu_ratio: float
    least_ratio: float
    memory_ratio: float
    loss_difference: float | None
    others: float
    failed: str = ""


@dataclass(frozen=True)
class Target:
    """What was to be reached, and what was. `measured` and `cpu` are NaN where it could not be measured.

    Attributes:
        measured: times the speed, part of the memory, share of the peak, seconds, or an exponent of growth.
        cpu, least: the same from CPU seconds, of the median step and of the one with fewest, for speeds.
        at_least: whether more is better.
    """

    part: str
    work: str
    against: str
    quantity: Quantity
    wanted: float
    measured: float
    cpu: float = math.nan
    least: float = math.nan
    at_least: bool = True

    @property
    def met(self) -> bool | None:
        if math.isnan(self.measured):
            return None
        return self.measured >= self.wanted if self.at_least else self.measured <= self.wanted

    @property
    def key(self) -> str:
        return f"{self.part} | {self.work} | {self.against} | {self.quantity}"


@dataclass
class Summary:
    """What a part came to: a table, targets, and whatever else there is to keep."""

    rows: list[Row] = field(default_factory=list)
    targets: list[Target] = field(default_factory=list)
    table: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    more: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Part:
    """A part of the study.

    Attributes:
        cases: what is measured at a scale.
        summarise: what it comes to, given the cases and their measurements.
    """

    name: str
    title: str
    cases: Callable[[Scale], list[Case]]
    summarise: Callable[[Scale, Sequence[Case], Sequence[Measured]], Summary]


@dataclass(frozen=True)
class Wanted:
    """A target of a comparison: the base against the case `key` of the work."""

    work: str
    key: str
    speed: float | None = None
    memory: float | None = None


def rows(cases: Sequence[Case], measured: Sequence[Measured]) -> list[Row]:
    """A row for each case that was measured or has failed, in the order of the cases."""
    made = [_row(case, [m for m in measured if (m.work, m.key) == (case.work, case.key)]) for case in cases]
    bases = {case.work: case.key for case in cases if case.base}
    found = []
    for row in (r for r in made if r is not None):
        base = next((r for r in made if r and r.work == row.work and r.key == bases.get(row.work)), None)
        found.append(row if base is None else _against(row, base, measured))
    return found


def _row(case: Case, runs: list[Measured]) -> Row | None:
    good = [m.figures for m in runs if "failed" not in m.figures]
    if not runs:
        return None
    nan = math.nan
    if not good:
        reason = str(runs[0].figures["failed"]).strip().splitlines()[-1]
        unknown = dict.fromkeys((f.name for f in fields(Row) if f.type == "float"), nan)
        return Row(case.work, case.key, case.label, loss_difference=None, failed=reason, **unknown)

    def middle(name: str) -> float:
        return median(m[name] for m in good) if all(name in m for m in good) else nan

    seconds = [median(m["seconds"]) for m in good if m.get("seconds")] or [nan]
    cpu = [median(m["cpu_seconds"]) for m in good if m.get("cpu_seconds")] or [nan]
    others = max(m.get("cores_of_others", nan) for m in good)
    return Row(
        work=case.work,
        key=case.key,
        label=case.label,
        seconds=median(seconds),
        low=min(seconds),
        high=max(seconds),
        cpu_seconds=median(cpu),
        least_cpu=min((min(m["cpu_seconds"]) for m in good if m.get("cpu_seconds")), default=nan),
        above_mb=middle("above_mb"),
        loaded_mb=middle("loaded_mb"),
        tokens_per_second=middle("tokens") / median(seconds),
        seconds_ratio=nan,
        cpu_ratio=nan,
        least_ratio=nan,
        memory_ratio=nan,
        loss_difference=None,
        others=others,
    )


def _against(row: Row, base: Row, measured: Sequence[Measured]) -> Row:
    def losses(key: str) -> list[list[float]]:
        runs = [m.figures for m in measured if (m.work, m.key) == (row.work, key) and "failed" not in m.figures]
        return [m["losses"] for m in runs if m.get("losses") and not math.isnan(m["losses"][0])]

    mine, theirs = losses(row.key), losses(base.key)
    apart = (
        [abs(a - b) / max(1.0, abs(b)) for each in mine for a, b in zip(each, theirs[0], strict=False)]
        if theirs
        else []
    )
    ratios: dict[str, Any] = {
        "seconds_ratio": row.seconds / base.seconds,
        "cpu_ratio": row.cpu_seconds / base.cpu_seconds,
        "least_ratio": row.least_cpu / base.least_cpu,
        "memory_ratio": row.above_mb / base.above_mb if base.above_mb else math.nan,
        "loss_difference": max(apart, key=lambda d: (math.isnan(d), d)) if apart else None,
    }
    return Row(**(asdict(row) | ratios))


def comparison(part: str, made: Sequence[Row], wanted: Sequence[Wanted], tolerance: float = TOLERANCE) -> Summary:
    """Rows with their targets and a table; a loss that differs is a problem."""
    summary = Summary(rows=list(made), table=table(made))
    for want in wanted:
        row = next((r for r in made if (r.work, r.key) == (want.work, want.key)), None)
        label = row.label if row else want.key
        if want.speed is not None:
            ratios = (row.seconds_ratio, row.cpu_ratio, row.least_ratio) if row else (math.nan,) * 3
            summary.targets.append(Target(part, want.work, label, "speed", want.speed, *ratios))
        if want.memory is not None:
            memory = 1 / row.memory_ratio if row else math.nan
            summary.targets.append(Target(part, want.work, label, "memory", want.memory, memory, at_least=False))
    for row in made:
        if row.failed:
            summary.problems.append(f"{part}: {row.work}, {row.label}: {row.failed}")
        elif row.loss_difference is not None and not row.loss_difference <= tolerance:
            summary.problems.append(
                f"{part}: {row.work}: NOT THE SAME WORK: the losses of {row.label} differ by {row.loss_difference:.1e}"
            )
    return summary


def table(made: Sequence[Row]) -> list[str]:
    """The rows as Markdown. Columns that no row has a figure for are left out."""
    columns: dict[str, Callable[[Row], str]] = {
        "seconds (range)": lambda r: f"{seconds(r.seconds)} ({seconds(r.low)} to {seconds(r.high)})",
        "×": lambda r: times(r.seconds_ratio),
        "CPU s": lambda r: seconds(r.cpu_seconds),
        "× ": lambda r: times(r.cpu_ratio),
        "tokens/s": lambda r: "" if math.isnan(r.tokens_per_second) else f"{r.tokens_per_second:,.0f}",
        "MB above the model": lambda r: "" if math.isnan(r.above_mb) else f"{r.above_mb:,.0f}",
        "×  ": lambda r: times(r.memory_ratio),
        "loss apart": lambda r: "" if r.loss_difference is None else f"{r.loss_difference:.0e}",
    }
    cells = {name: [_quiet(cell(r)) for r in made] for name, cell in columns.items()}
    kept = {name: column for name, column in cells.items() if any(column)}
    lines = ["| work | | " + " | ".join(kept) + " |", "|:--|:--|" + "--:|" * len(kept)]
    for i, row in enumerate(made):
        noise = f" (others used {row.others:.1f} cores)" if row.others > NOISY else ""
        failed = f" **failed**: {row.failed}" if row.failed else ""
        values = " | ".join(column[i] for column in kept.values())
        lines.append(f"| {row.work} | {row.label}{noise}{failed} | {values} |")
    return lines


def _quiet(cell: str) -> str:
    return "" if "nan" in cell else cell


def seconds(value: float) -> str:
    """Three significant digits."""
    return "nan" if math.isnan(value) else f"{value:.{max(0, 2 - math.floor(math.log10(value)))}f}" if value else "0"


def times(ratio: float) -> str:
    return "" if math.isnan(ratio) else f"{ratio:.2f}×" if ratio < 10 else f"{ratio:.1f}×"


def target_lines(targets: Sequence[Target]) -> list[str]:
    """The targets as Markdown."""
    lines = ["| part | work | against | wanted | measured | by CPU seconds | |", "|:--|:--|:--|--:|--:|--:|:--|"]
    for t in targets:
        sign = "≥" if t.at_least else "≤"
        verdict = {True: "met", False: "**missed**", None: "not measured"}[t.met]
        lines.append(
            f"| {t.part} | {t.work} | {t.against} | {sign} {_amount(t, t.wanted)} | {_amount(t, t.measured)} | "
            f"{_amount(t, t.cpu)} | {verdict} |"
        )
    return lines


def _amount(target: Target, value: float) -> str:
    if math.isnan(value):
        return ""
    if target.quantity == "share":
        return f"{100 * value:.0f} %"
    if target.quantity == "seconds":
        return f"{value:.2f} s"
    if target.quantity == "exponent":
        return f"{value:.2f}"
    memory = " memory" if target.quantity == "memory" else " speed"
    return f"{value:.2f}×{memory}" if value < 10 else f"{value:.1f}×{memory}"
