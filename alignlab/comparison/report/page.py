"""`report.html`: one file that says which algorithm is best and shows why. It loads nothing from anywhere."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from alignlab.comparison.report import plots
from alignlab.comparison.report.leaderboard import Leaderboard
from alignlab.comparison.report.metrics import MISSING, format_number, metric
from alignlab.comparison.report.tables import Cell, Table, leaderboard_table, limits_text, shared_text
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


def write_report(
    path: str | os.PathLike[str],
    board: Leaderboard,
    frontier: Sequence[Sequence[float]] | None = None,
    curves: Mapping[str, plots.Curves] | None = None,
    samples: Mapping[str, Mapping[str, str]] | None = None,
    provenance: Sequence[Mapping[str, Any]] = (),
) -> None:
    """Write the report, whole or not at all, and its plots as PDF and PNG to `plots/` beside it.

    The same input gives the same page, byte for byte.

    Args:
        path: the file to write, `report.html`.
        frontier: `[[kl, reward], …]`, KL ascending in nats per response: the exact benchmark's R*(KL).
        curves: metric → algorithm → seed → `[(step, value), …]`. Values that are not finite are left out.
        samples: prompt → algorithm → answer, shown side by side.
        provenance: a row per run, with the same keys.

    Raises:
        AlignlabError: `frontier` does not have that form.
    """
    path, order = Path(path), [row["algorithm"] for row in board.rows]
    seeds = sorted({seed for row in board.rows for seed in row["seeds"]})
    facts = {
        "Benchmark": board.benchmark,
        "Algorithms": ", ".join(order),
        "Runs": f"{len(board.runs)} (seed{'s' if len(seeds) > 1 else ''} {', '.join(map(str, seeds))})",
        "Ranked by": metric(board.sort_by).title,
        "Budget of each run": limits_text(board) or "none given",
    }
    overview = _overview(board, frontier)
    shared, single, constants = _curves(board, curves or {})
    html = render_page(
        "report.html",
        title=f"{board.benchmark}: comparison of alignment algorithms",
        board=board,
        verdict=verdict(board),
        method=method(board),
        facts=facts,
        leaderboard=leaderboard_table(board, board.columns),
        shared=shared_text(board),
        overview=overview,
        curves=shared,
        losses=single,
        constants=constants,
        pairs=_pairs(board),
        pairs_note=_pairs_note(board),
        samples={
            prompt: sorted(answers.items(), key=lambda a: (order.index(a[0]) if a[0] in order else len(order), a[0]))
            for prompt, answers in (samples or {}).items()
        },
        runs=_runs(provenance),
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, html)
    plots.write_plots(path.parent / PLOTS, [*overview, *shared, *single])


def render_page(template: str, **content: Any) -> str:
    """A page from one of the templates. Whatever is put in is escaped."""
    return _environment().get_template(template).render(content)


@cache
def _environment() -> Environment:
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    folder = Path(__file__).parent / "templates"
    options: dict[str, Any] = {"trim_blocks": True, "lstrip_blocks": True, "undefined": StrictUndefined}
    return Environment(loader=FileSystemLoader(folder), autoescape=True, **options)


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
    rows = [[Cell(a), *(_pair(board, a, b) for b in ranked)] for a in ranked]
    return Table("Differences of all pairs", ["row − column", *ranked], rows)


def _pair(board: Leaderboard, a: str, b: str) -> Cell:
    pair, known = board.between(a, b), metric(board.sort_by)
    if a == b or pair.difference is None:
        return Cell(MISSING if a != b else "·", kind="self")
    ahead = pair.difference.mean * (known.better or 1) > 0
    kind, mark = ("", "") if not pair.significant else ("win", " ▲") if ahead else ("loss", " ▼")
    number = ("+" if pair.difference.mean > 0 else "") + format_number(pair.difference.mean, known.decimals)
    return Cell(number + mark, format_p(pair.p_holm) or "not testable", kind)


def _pairs_note(board: Leaderboard) -> str:
    known = metric(board.sort_by)
    better, worse = ("better", "worse") if known.better else ("higher", "lower")
    return (
        f"Difference in {known.title}, row minus column, with its p-value after Holm's correction. ▲ the row is "
        f"{better}, ▼ {worse}, both at the 5 % level; without a sign these runs cannot tell the two apart."
    )


def _runs(provenance: Sequence[Mapping[str, Any]]) -> Table | None:
    rows = [[Cell(str(value), kind="path") for value in run.values()] for run in provenance]
    return Table("Runs", [str(key) for key in provenance[0]], rows) if rows else None
