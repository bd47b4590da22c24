"""`report.html`: one file that says which algorithm is best and shows why. It loads nothing from anywhere."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from alignlab.comparison.report import plots
from alignlab.comparison.report.leaderboard import PROVENANCE, Leaderboard
from alignlab.comparison.report.metrics import MISSING, format_interval, format_number, metric
from alignlab.comparison.report.tables import cell, limits_text, place
from alignlab.comparison.report.verdict import format_p, method, verdict
from alignlab.core import AlignlabError
from alignlab.core.files import write_text

if TYPE_CHECKING:
    from jinja2 import Environment

OWN_SCALE = ("loss",)
"""Metrics of training that cannot be compared between algorithms: each has a small plot of its own."""
FLAT = 1e-3
"""A metric of training is constant where its range is a smaller share of its largest value; it is not drawn."""
PLOTS = "plots"
"""Folder beside the report that holds the plots as PDF and PNG."""


@dataclass(frozen=True)
class Cell:
    """A cell of a table's body.

    Attributes:
        small: a second, smaller line.
        value: what it is sorted by; "" for a missing one.
        kind: CSS classes.
        tip: shown where the pointer rests.
        share: length of a bar behind it, in percent; None for no bar.
    """

    text: str
    small: str = ""
    tag: str = "td"
    value: Any = ""
    kind: str = ""
    tip: str = ""
    share: float | None = None


@dataclass(frozen=True)
class Heading:
    """A column's heading: `first` is the order that a first click on it sorts by, `sort` the order it is in now."""

    text: str
    unit: str = ""
    kind: str = ""
    first: str = "descending"
    sort: str = ""
    is_text: bool = False


@dataclass(frozen=True)
class Table:
    """A table, which scrolls sideways where it is wider than the page; `label` names it to screen readers."""

    label: str
    head: Sequence[Heading]
    rows: Sequence[Sequence[Cell]]
    sortable: bool = False


def write_report(
    path: str | os.PathLike[str],
    leaderboard: Leaderboard,
    frontier: Sequence[Sequence[float]] | None = None,
    curves: Mapping[str, plots.Curves] | None = None,
    samples: Sequence[Mapping[str, Any]] | None = None,
    provenance: Sequence[Mapping[str, Any]] | None = None,
) -> None:
    """Write the report, whole or not at all, and its plots as PDF and PNG to `plots/` beside it.

    The same input gives the same page, byte for byte.

    Args:
        path: the file to write, `report.html`.
        leaderboard: from `build` or `load`.
        frontier: `[[kl, reward], …]`, KL ascending in nats per response: the exact benchmark's R*(KL).
        curves: metric → algorithm → seed → `[(step, value), …]`. Values that are not finite are left out.
        samples: `{"prompt": text, "answers": {algorithm: text}}`, shown side by side.
        provenance: a row per run, e.g. algorithm, seed, folder, config_hash; the runs' own where not given.

    Raises:
        AlignlabError: `frontier`, `curves` or `samples` does not have that form.
    """
    path = Path(path)
    content = _content(leaderboard, frontier, curves, samples, provenance)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, render_page("report.html", **content))
    plots.write_plots(path.parent / PLOTS, [*content["overview"], *content["curves"], *content["losses"]])


def render(
    leaderboard: Leaderboard,
    frontier: Sequence[Sequence[float]] | None = None,
    curves: Mapping[str, plots.Curves] | None = None,
    samples: Sequence[Mapping[str, Any]] | None = None,
    provenance: Sequence[Mapping[str, Any]] | None = None,
) -> str:
    """The report's HTML; see `write_report`."""
    return render_page("report.html", **_content(leaderboard, frontier, curves, samples, provenance))


def render_page(template: str, **content: Any) -> str:
    """A page from one of the templates. Whatever is put in is escaped, but for the plots."""
    return _environment().get_template(template).render(content)


@cache
def _environment() -> Environment:
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    folder = Path(__file__).parent / "templates"
    options: dict[str, Any] = {"trim_blocks": True, "lstrip_blocks": True, "undefined": StrictUndefined}
    return Environment(loader=FileSystemLoader(folder), autoescape=True, **options)


def _content(
    board: Leaderboard,
    frontier: Sequence[Sequence[float]] | None,
    curves: Mapping[str, plots.Curves] | None,
    samples: Sequence[Mapping[str, Any]] | None,
    provenance: Sequence[Mapping[str, Any]] | None,
) -> dict[str, Any]:
    """What the template `report.html` puts in its places."""
    seeds = sorted({seed for row in board.rows for seed in row["seeds"]})
    facts = {
        "Benchmark": board.benchmark,
        "Algorithms": ", ".join(row["algorithm"] for row in board.rows),
        "Runs": f"{len(board.runs)} (seed{'s' if len(seeds) > 1 else ''} {', '.join(map(str, seeds))})",
        "Ranked by": metric(board.sort_by).title,
        "Budget of each run": limits_text(board) or "none given",
    }
    drawn, losses, constants = _curves(board, curves or {})
    return {
        "title": f"{board.benchmark}: comparison of alignment algorithms",
        "board": board,
        "verdict": verdict(board),
        "method": method(board),
        "facts": facts,
        "leaderboard": _leaderboard(board),
        "overview": _overview(board, frontier),
        "curves": drawn,
        "losses": losses,
        "constants": constants,
        "pairs": _pairs(board),
        "pairs_note": _pairs_note(board),
        "costs": _costs(board),
        "shared": _shared(board),
        "samples": list(_samples(board, samples or ())),
        "runs": _runs(board, provenance),
    }


def _leaderboard(board: Leaderboard) -> Table:
    """What was achieved, and the KL; the other costs have a table of their own."""
    columns = [name for name in board.columns if name == "kl" or not metric(name).cost]
    columns.sort(key=lambda name: (name != board.sort_by, name not in ("reward", "kl")))  # a phone shows the first few
    head = [Heading("#", kind="narrow", first="ascending"), Heading("algorithm", "", "name", "ascending", is_text=True)]
    head += [_heading(board, name) for name in columns]
    head.append(Heading("seeds", kind="narrow"))
    best = {name: board.best(name) for name in columns}
    rows = []
    for row in board.rows:
        algorithm, seeds = row["algorithm"], len(row["seeds"])
        cells = [Cell(place(row), value=row["rank"] or ""), Cell(algorithm, tag="th", value=algorithm)]
        cells += [_value(board, row, name, "best" if algorithm in best[name] else "") for name in columns]
        rows.append([*cells, Cell(str(seeds), value=seeds)])
    return Table("Leaderboard", head, rows, sortable=True)


def _heading(board: Leaderboard, name: str, per_run: bool = False) -> Heading:
    known = metric(name)
    first = "ascending" if known.better < 0 else "descending"
    arrow = {1: "\N{NO-BREAK SPACE}↑", -1: "\N{NO-BREAK SPACE}↓", 0: ""}[known.better]
    unit = f"{known.unit} per run" if per_run and not known.unit.startswith("per ") else known.unit
    title = known.title.replace("-", "\N{NON-BREAKING HYPHEN}") + ("" if per_run else arrow)
    return Heading(title, unit, "", first, first if name == board.sort_by else "")


def _value(board: Leaderboard, row: Mapping[str, Any], name: str, kind: str = "", share: float | None = None) -> Cell:
    """A metric's cell: the mean, and below it the interval."""
    mean, interval = cell(board, row, name)
    return Cell(mean, interval, value="" if row[name] is None else repr(float(row[name])), kind=kind, share=share)


def _overview(board: Leaderboard, frontier: Sequence[Sequence[float]] | None) -> list[plots.Plot]:
    found = []
    if any(row["rank"] for row in board.rows):
        estimates = [board.estimate(row, board.sort_by) for row in board.rows]
        found.append(plots.intervals([row["algorithm"] for row in board.rows], estimates, metric(board.sort_by)))
    points = [(row["algorithm"], board.estimate(row, "kl"), board.estimate(row, "reward")) for row in board.rows]
    if any(kl and reward for _, kl, reward in points):
        if frontier and any(len(point) != 2 for point in frontier):
            raise AlignlabError("frontier: each point must be [kl, reward]")
        found.append(plots.reward_kl(points, frontier))
    return found


def _curves(
    board: Leaderboard, curves: Mapping[str, plots.Curves]
) -> tuple[list[plots.Plot], list[plots.Plot], list[str]]:
    """The plots whose axes algorithms share, those of one algorithm each, and what is said of constant metrics."""
    ranked = [row["algorithm"] for row in board.rows]
    shared, single, constants = [], [], []
    for name, by_algorithm in curves.items():
        if not all(isinstance(seeds, Mapping) for seeds in by_algorithm.values()):
            raise AlignlabError(f"curves['{name}']: must be algorithm → seed → points; the outermost key is the metric")
        # an algorithm with curves but no row (its evaluation failed) is drawn too, after those on the leaderboard
        names = ranked + sorted(by_algorithm.keys() - set(ranked))
        drawn = [algorithm for algorithm in names if plots.finite({algorithm: by_algorithm.get(algorithm, {})})]
        values = [value for _, value in plots.finite(by_algorithm)]
        if not values:
            continue
        if len(values) > 1 and max(values) - min(values) <= FLAT * max(map(abs, values)):
            constants.append(f"{metric(name).title} ({sum(values) / len(values):.4g})")
        elif name in OWN_SCALE and len(drawn) > 1:
            single += [plots.learning(name, names, {a: by_algorithm[a]}, plots.SMALL) for a in drawn]
        else:
            shared.append(plots.learning(name, names, by_algorithm))
    return shared, single, constants


def _pairs(board: Leaderboard) -> Table | None:
    ranked = [row["algorithm"] for row in board.rows if row["rank"] is not None]
    if len(ranked) < 2:
        return None
    head = [Heading("row − column", kind="name"), *map(Heading, ranked)]
    rows = [[Cell(a, tag="th"), *(_pair(board, a, b) for b in ranked)] for a in ranked]
    return Table("Differences of all pairs", head, rows)


def _pair(board: Leaderboard, a: str, b: str) -> Cell:
    pair, known = board.between(a, b), metric(board.sort_by)
    if a == b or pair.difference is None:
        return Cell(MISSING if a != b else "·", kind="self")
    ahead = pair.difference.mean * (known.better or 1) > 0
    kind, mark = ("", "") if not pair.significant else ("win", " ▲") if ahead else ("loss", " ▼")
    number = ("+" if pair.difference.mean > 0 else "") + format_number(pair.difference.mean, known.decimals)
    p = format_p(pair.p_holm) or "not testable"
    tip = f"{a} minus {b}: {number} {format_interval(pair.difference, known.decimals)}, {p}"
    return Cell(number + mark, p, kind=kind, tip=tip)


def _pairs_note(board: Leaderboard) -> str:
    known = metric(board.sort_by)
    better, worse = ("better", "worse") if known.better else ("higher", "lower")
    return (
        f"Difference in {known.title}, row minus column, with its p-value after Holm's correction. ▲ the row is "
        f"{better}, ▼ {worse}, both at the 5 % level; without a sign these runs cannot tell the two apart."
    )


def _costs(board: Leaderboard) -> Table | None:
    costs = [name for name in board.columns if metric(name).cost and name != "kl"]
    head = [Heading("algorithm", "", "name", "ascending", is_text=True)]
    head += [_heading(board, name, per_run=True) for name in costs]
    largest = {name: max((row[name] for row in board.rows if row[name] is not None), default=0) for name in costs}
    rows = []
    for row in board.rows:
        shares = {n: 100 * (row[n] or 0) / largest[n] if largest[n] > 0 else 0 for n in costs}
        values = [_value(board, row, name, "share", shares[name]) for name in costs]
        rows.append([Cell(row["algorithm"], tag="th", value=row["algorithm"]), *values])
    return Table("What it cost", head, rows, sortable=True) if costs else None


def _shared(board: Leaderboard) -> Table | None:
    """What was made once, by `budget["shared"]`: part → cost → number."""
    shared = board.budget.get("shared")
    parts = {k: v for k, v in shared.items() if isinstance(v, Mapping)} if isinstance(shared, Mapping) else {}
    costs = list(dict.fromkeys(name for costs in parts.values() for name, value in costs.items() if value))
    head = [Heading("part", kind="name"), *(Heading(metric(name).title, metric(name).unit) for name in costs)]
    rows = []
    for part, values in parts.items():
        numbers = [Cell(format_number(values.get(name) or None, None)) for name in costs]
        rows.append([Cell(part.replace("_", " "), tag="th"), *numbers])
    return Table("What all runs share", head, rows) if rows and costs else None


def _samples(board: Leaderboard, samples: Sequence[Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
    order = {row["algorithm"]: i for i, row in enumerate(board.rows)}
    for index, sample in enumerate(samples):
        if not isinstance(sample.get("prompt"), str) or not isinstance(sample.get("answers"), Mapping):
            raise AlignlabError(f"samples[{index}]: must be {{'prompt': text, 'answers': {{algorithm: text}}}}")
        answers: Mapping[str, str] = sample["answers"]
        names = sorted(answers, key=lambda name: (order.get(name, len(order)), name))
        yield {"prompt": sample["prompt"], "answers": [(name, str(answers[name])) for name in names]}


def _runs(board: Leaderboard, provenance: Sequence[Mapping[str, Any]] | None) -> Table | None:
    keys = ("algorithm", "seed", *PROVENANCE)
    runs = provenance if provenance is not None else [{k: run[k] for k in keys if k in run} for run in board.runs]
    columns = list(dict.fromkeys(key for run in runs for key in run))
    head = [Heading(str(column).replace("_", " "), kind="name narrow") for column in columns]
    rows = [[Cell(_text(run.get(column)), kind="path") for column in columns] for run in runs]
    return Table("Runs", head, rows) if rows else None


def _text(value: object) -> str:
    if value is None:
        return MISSING
    return json.dumps(value, sort_keys=True, default=str) if isinstance(value, Mapping | list | tuple) else str(value)
