"""`report.html`: one file that says which algorithm is best and shows why. It loads nothing from anywhere."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from alignlab.comparison import plots
from alignlab.comparison.leaderboard import PROVENANCE, Leaderboard
from alignlab.comparison.metrics import MISSING, format_interval, format_number, metric
from alignlab.comparison.tables import budget_text, cell, place
from alignlab.comparison.verdict import format_p, method, verdict
from alignlab.core import AlignlabError
from alignlab.core.files import write_text

POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data:"
"""The browser's own guarantee that nothing is loaded."""


def write_report(
    path: str | os.PathLike[str],
    leaderboard: Leaderboard,
    frontier: Sequence[Sequence[float]] | None = None,
    curves: Mapping[str, Mapping[str, Mapping[int, Sequence[plots.Point]]]] | None = None,
    samples: Sequence[Mapping[str, Any]] | None = None,
    provenance: Sequence[Mapping[str, Any]] | None = None,
) -> None:
    """Write the report, whole or not at all. The same input gives the same file, byte for byte.

    Args:
        path: the file to write, `report.html`.
        leaderboard: from `leaderboard.build` or `leaderboard.load`.
        frontier: `[[kl, reward], …]`, KL ascending in nats per response: the exact benchmark's R*(KL).
        curves: metric → algorithm → seed → `[(step, value), …]`; a plot per metric. Values that are not
            finite are left out.
        samples: `{"prompt": text, "answers": {algorithm: text}}`, shown side by side.
        provenance: a row per run, e.g. algorithm, seed, folder, config_hash; the runs' own where not given.

    Raises:
        AlignlabError: `frontier`, `curves` or `samples` does not have that form.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, render(leaderboard, frontier, curves, samples, provenance))


def render(
    leaderboard: Leaderboard,
    frontier: Sequence[Sequence[float]] | None = None,
    curves: Mapping[str, Mapping[str, Mapping[int, Sequence[plots.Point]]]] | None = None,
    samples: Sequence[Mapping[str, Any]] | None = None,
    provenance: Sequence[Mapping[str, Any]] | None = None,
) -> str:
    """The report's HTML; see `write_report`."""
    title = f"{escape(leaderboard.benchmark)}: comparison of alignment algorithms"
    sections = [
        _headline(leaderboard),
        section("Leaderboard", _board(leaderboard), f'<p class="note">{escape(method(leaderboard))}</p>'),
        section("How they compare", _figures(leaderboard, frontier)),
        section("Learning curves", _curves(leaderboard, curves)),
        section("Which differences are more than chance", _pairs(leaderboard)),
        section("What it cost", _costs(leaderboard)),
        section("Answers side by side", _samples(leaderboard, samples)),
        section("Runs", _provenance(leaderboard, provenance)),
    ]
    return page(title, sections)


def page(title: str, sections: Sequence[str]) -> str:
    """A self-contained page: nothing is loaded, and nothing can be. `title` is escaped already."""
    here = Path(__file__).parent
    css, js = ((here / f"report.{kind}").read_text(encoding="utf-8") for kind in ("css", "js"))
    return (
        f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">\n'
        f"<title>{title}</title>\n<style>\n{css}</style>\n</head>\n<body>\n<main>\n"
        f"{''.join(sections)}</main>\n<script>\n{js}</script>\n</body>\n</html>\n"
    )


def section(heading: str, *parts: str) -> str:
    """A section, or nothing where there is nothing to show."""
    return f"<section>\n<h2>{heading}</h2>\n{''.join(parts)}\n</section>\n" if parts[0] else ""


def table(head: str, rows: Sequence[str], kind: str = "") -> str:
    """A table that scrolls by itself where it is wider than the page."""
    body = "\n".join(f"<tr>{row}</tr>" for row in rows)
    attribute = f' class="{kind}"' if kind else ""
    return (
        f'<div class="scroll"><table{attribute}><thead><tr>{head}</tr></thead><tbody>\n{body}\n</tbody></table></div>'
    )


def _headline(board: Leaderboard) -> str:
    first, *rest = (escape(sentence) for sentence in verdict(board))
    seeds = sorted({seed for row in board.rows for seed in row["seeds"]})
    facts = {
        "Benchmark": board.benchmark,
        "Algorithms": ", ".join(row["algorithm"] for row in board.rows),
        "Runs": f"{len(board.runs)} (seed{'s' if len(seeds) > 1 else ''} {', '.join(map(str, seeds))})",
        "Ranked by": metric(board.sort_by).title,
        "Budget of each": budget_text(board) or "none given",
    }
    items = "".join(f"<div><dt>{name}</dt><dd>{escape(text)}</dd></div>" for name, text in facts.items())
    return (
        f"<header>\n<h1>Alignment algorithms on {escape(board.benchmark)}</h1>\n"
        f'<p class="lead"><strong>{first}</strong></p>\n<p class="lead">{" ".join(rest)}</p>\n'
        f'<dl class="facts">{items}</dl>\n</header>\n'
    )


def _heading(text: str, unit: str, first: str, kind: str, sort: str = "", is_text: bool = False) -> str:
    """A sortable column's heading; `first` is the order of its first click, `sort` the order it is in now."""
    attributes = f' class="{kind}" data-first="{first}"'
    attributes += (f' aria-sort="{sort}"' if sort else "") + (' data-text="1"' if is_text else "")
    small = f'<span class="unit">{escape(unit)}</span>' if unit else ""
    return f'<th scope="col"{attributes}><button type="button">{escape(text)}{small}</button></th>'


def _value(board: Leaderboard, row: Mapping[str, Any], figure: str, kind: str = "", style: str = "") -> str:
    """A figure's cell: the mean, and below it the interval."""
    mean, interval = cell(board, row, figure)
    small = f"<small>{escape(interval)}</small>" if interval else ""
    value = "" if row[figure] is None else repr(float(row[figure]))
    attributes = (f' class="{kind}"' if kind else "") + (f' style="{style}"' if style else "")
    return f'<td{attributes} data-value="{value}">{mean}{small}</td>'


def _board(board: Leaderboard) -> str:
    head = _heading("#", "", "ascending", "narrow") + _heading("algorithm", "", "ascending", "name", is_text=True)
    head += _heading("seeds", "", "descending", "narrow")
    for figure in board.columns:
        known = metric(figure)
        first = "ascending" if known.better < 0 else "descending"
        arrow = {1: "\N{NO-BREAK SPACE}↑", -1: "\N{NO-BREAK SPACE}↓", 0: ""}[known.better]
        title = known.title.replace("-", "\N{NON-BREAKING HYPHEN}")
        head += _heading(title + arrow, known.unit, first, "", first if figure == board.sort_by else "")
    best = {figure: board.best(figure) for figure in board.columns}
    rows = []
    for row in board.rows:
        name = escape(row["algorithm"])
        cells = f'<td data-value="{row["rank"] or ""}">{place(row)}</td>'
        cells += f'<th scope="row" data-value="{name}">{name}</th>'
        cells += f'<td data-value="{len(row["seeds"])}">{len(row["seeds"])}</td>'
        for figure in board.columns:
            cells += _value(board, row, figure, "best" if row["algorithm"] in best[figure] else "")
        rows.append(cells)
    return table(head, rows, "sortable")


def _figures(board: Leaderboard, frontier: Sequence[Sequence[float]] | None) -> str:
    names = [row["algorithm"] for row in board.rows]
    known = metric(board.sort_by)
    figures = []
    if any(row["rank"] for row in board.rows):
        estimates = [board.estimate(row, board.sort_by) for row in board.rows]
        svg = plots.intervals(names, estimates, known.title, known.decimals)
        figures.append((svg, f"{_capital(known.title)}: mean and 95 % interval."))
    points = [(row["algorithm"], board.estimate(row, "kl"), board.estimate(row, "reward")) for row in board.rows]
    if any(kl and reward for _, kl, reward in points):
        if frontier and any(len(point) != 2 for point in frontier):
            raise AlignlabError("frontier: each point must be [kl, reward]")
        caption = "Reward against the KL paid for it, both with 95 % intervals."
        caption += " Dashed: the highest reward that can be reached at each KL." if frontier else ""
        figures.append((plots.reward_kl(points, frontier), caption))
    return _plots(figures)


def _plots(figures: Sequence[tuple[str, str]]) -> str:
    if not figures:
        return ""
    drawn = "\n".join(f"<figure>{svg}<figcaption>{escape(caption)}</figcaption></figure>" for svg, caption in figures)
    return f'<div class="plots">\n{drawn}\n</div>'


def _curves(board: Leaderboard, curves: Mapping[str, Mapping[str, Mapping[int, Sequence[plots.Point]]]] | None) -> str:
    names = [row["algorithm"] for row in board.rows]
    figures = []
    for name, by_algorithm in (curves or {}).items():
        if not all(isinstance(seeds, Mapping) for seeds in by_algorithm.values()):
            raise AlignlabError(f"curves['{name}']: must be algorithm → seed → points; the outermost key is the metric")
        # an algorithm with curves but no row (its evaluation failed) is drawn too, after those on the leaderboard
        every = names + sorted(by_algorithm.keys() - set(names))
        if svg := plots.learning(every, by_algorithm, metric(name).title):
            figures.append((svg, f"{_capital(metric(name).title)} over training. Thin: each seed; thick: their mean."))
    return _plots(figures)


def _pairs(board: Leaderboard) -> str:
    ranked = [row["algorithm"] for row in board.rows if row["rank"] is not None]
    if len(ranked) < 2:
        return ""
    known = metric(board.sort_by)
    head = '<th scope="col" class="name">row − column</th>' + "".join(
        f'<th scope="col">{escape(b)}</th>' for b in ranked
    )
    rows = []
    for a in ranked:
        cells = f'<th scope="row">{escape(a)}</th>'
        for b in ranked:
            pair = board.between(a, b)
            if a == b or pair.difference is None:
                cells += f'<td class="self">{MISSING if a != b else "·"}</td>'
                continue
            ahead = pair.difference.mean * (known.better or 1) > 0
            kind, mark = ("", "") if not pair.significant else ("win", " ▲") if ahead else ("loss", " ▼")
            sign = "+" if pair.difference.mean > 0 else ""
            number = sign + format_number(pair.difference.mean, known.decimals)
            small = format_p(pair.p_holm) or "not testable"
            told = f"{a} minus {b}: {number} {format_interval(pair.difference, known.decimals)}, {small}"
            cells += f'<td class="{kind}" title="{escape(told, quote=True)}">{number}{mark}<small>{small}</small></td>'
        rows.append(cells)
    better, worse = ("better", "worse") if known.better else ("higher", "lower")
    note = (
        f"Difference in {known.title}, row minus column, with its p-value after Holm's correction. ▲ the row is "
        f"{better}, ▼ {worse}, both at the 5 % level; without a sign these runs cannot tell the two apart."
    )
    return table(head, rows) + f'<p class="note">{escape(note)}</p>'


def _costs(board: Leaderboard) -> str:
    costs = [figure for figure in board.columns if metric(figure).cost and figure != "kl"]
    if not costs:
        return ""
    head = '<th scope="col" class="name">algorithm</th>'
    head += "".join(
        f'<th scope="col">{escape(metric(c).title)}<span class="unit">{escape(_per_run(metric(c).unit))}</span></th>'
        for c in costs
    )
    largest = {c: max((row[c] for row in board.rows if row[c] is not None), default=0) for c in costs}
    rows = []
    for row in board.rows:
        cells = f'<th scope="row">{escape(row["algorithm"])}</th>'
        for c in costs:
            share = 100 * (row[c] or 0) / largest[c] if largest[c] > 0 else 0
            cells += _value(board, row, c, "share", f"--share:{share:.1f}%")
        rows.append(cells)
    return (
        table(head, rows) + '<p class="note">Mean per run with 95 % interval; the bar is the share of the largest.</p>'
    )


def _per_run(unit: str) -> str:
    """`s per run`, but `per answer` as it is."""
    return unit if unit.startswith("per ") else f"{unit} per run"


def _samples(board: Leaderboard, samples: Sequence[Mapping[str, Any]] | None) -> str:
    order = {row["algorithm"]: i for i, row in enumerate(board.rows)}
    blocks = []
    for index, sample in enumerate(samples or ()):
        if not isinstance(sample.get("prompt"), str) or not isinstance(sample.get("answers"), Mapping):
            raise AlignlabError(f"samples[{index}]: must be {{'prompt': text, 'answers': {{algorithm: text}}}}")
        answers: Mapping[str, str] = sample["answers"]
        names = sorted(answers, key=lambda name: (order.get(name, len(order)), name))
        cards = "".join(f"<div><b>{escape(name)}</b><p>{escape(str(answers[name]))}</p></div>" for name in names)
        prompt = f"<summary>{escape(sample['prompt'])}</summary>"
        blocks.append(f'<details{" open" if index == 0 else ""}>{prompt}<div class="answers">{cards}</div></details>')
    return "\n".join(blocks)


def _provenance(board: Leaderboard, provenance: Sequence[Mapping[str, Any]] | None) -> str:
    keys = ("algorithm", "seed", *PROVENANCE)
    runs = provenance if provenance is not None else [{k: run[k] for k in keys if k in run} for run in board.runs]
    columns = list(dict.fromkeys(key for run in runs for key in run))
    head = "".join(f'<th scope="col" class="name narrow">{escape(str(c).replace("_", " "))}</th>' for c in columns)
    rows = ["".join(f'<td class="path">{escape(_text(run.get(c)))}</td>' for c in columns) for run in runs]
    return table(head, rows) if rows else ""


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def _text(value: object) -> str:
    if value is None:
        return MISSING
    return json.dumps(value, sort_keys=True, default=str) if isinstance(value, Mapping | list | tuple) else str(value)
