"""sweep.html: the table of a sweep's runs and a plot for each setting that varied."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape

from alignlab.comparison import plots
from alignlab.comparison.report import page, section, table
from alignlab.sweeps.results import Results, Run, cells, heading, headings, shortest, told_best

MARGIN = 0.06
"""Of a plot's width, left free on each side of the points."""


def render(results: Results) -> str:
    """The page, self-contained."""
    title = f"Sweep {escape(results.folder.resolve().name)}"
    best = results.best
    lead = f"<strong>{escape(told_best(results)[0])}</strong>" if best else "No run has finished."
    words = f"<p class='note'><code>{escape(results.reproduce(best))}</code></p>" if best else ""
    head = (
        f"<header>\n<h1>{title}</h1>\n<p class='lead'>{lead}</p>{words}<p>{escape(results.counts())}</p>\n</header>\n"
    )
    sections = [
        head,
        section("What each setting does", slices(results)),
        section("Runs", _runs(results)),
        section("What failed", _failed(results)),
    ]
    return page(title, sections)


def slices(results: Results) -> str:
    """A panel for each setting that varied: the metric of every run against it."""
    runs = [r for r in results.runs if r.value is not None and r.state in ("finished", "pruned")]
    panels = [panel(results, runs, key, name) for key, name in shortest(results.varied).items()] if runs else []
    note = "The best run is ringed"
    note += (
        "; those that were pruned are faint, at the last value that they had."
        if any(r.state == "pruned" for r in runs)
        else "."
    )
    figures = "\n".join(f"<figure>{svg}</figure>" for svg in panels if svg)
    return f'<div class="plots">\n{figures}\n</div><p class="note">{note}</p>' if figures else ""


def panel(results: Results, runs: Sequence[Run], key: str, name: str) -> str:
    """The metric against one setting: a number's place on its axis, or one place for each of several words."""
    texts = [run.values[key] for run in runs if key in run.values]
    numbers = [_number(text) for text in texts]
    drawn = [run for run in runs if key in run.values]
    if not drawn:
        return ""
    ticks: list[tuple[float, str]] | None
    if all(n is not None for n in numbers):
        log = key in results.log or _spans_decades([n for n in numbers if n is not None])
        xs = [math.log10(n) if log else n for n in numbers if n is not None]
        ticks = _log_ticks(min(xs), max(xs)) if log else None
    else:
        places = list(dict.fromkeys(sorted(texts)))
        xs = [float(places.index(text)) for text in texts]
        ticks = [(float(i), text if len(text) < 20 else f"…{text[-18:]}") for i, text in enumerate(places)]
    ys = [run.value for run in drawn if run.value is not None]
    (x_low, x_high), (y_low, y_high) = _spread(xs), _spread(ys)
    axes = plots.Axes(x_low, x_high, y_low, y_high, left=64, x_ticks=ticks)
    parts = [axes.frame(name, heading(results))]
    for run, x, y in zip(drawn, xs, ys, strict=True):
        told = f"<title>{escape(run.name)}: {escape(run.values[key])}, {results.metric} {y:.6g}</title>"
        place = f'cx="{axes.x(x):.1f}" cy="{axes.y(y):.1f}"'
        faint = ' opacity=".35"' if run.state == "pruned" else ""
        parts.append(f'<g class="s0"{faint}><circle {place} r="4.5"/>{told}</g>')
        if run is results.best:
            parts.append(
                f'<g class="s1"><circle {place} r="8" style="fill:none;stroke:currentColor;stroke-width:2"/></g>'
            )
    return plots.svg(axes, parts, f"{results.metric} of every run against {key}.")


def _number(text: str) -> float | None:
    try:
        value = float(text)
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def _spans_decades(values: Sequence[float]) -> bool:
    """Whether a logarithmic axis shows them better: positive, and over a factor of 50."""
    return min(values) > 0 and max(values) / min(values) >= 50


def _spread(values: Sequence[float]) -> tuple[float, float]:
    low, high = min(values), max(values)
    room = MARGIN * (high - low) or 0.5 * abs(high) or 0.5
    return low - room, high + room


def _log_ticks(low: float, high: float) -> list[tuple[float, str]]:
    """Places, in powers of ten, and texts: 1, 10, 100 …, or 1, 2, 5, 10 … where there are few decades."""
    wanted = (1,) if high - low > 2.5 else (1, 2, 5) if high - low > 0.5 else (1, 1.5, 2, 3, 4, 5, 6, 7, 8, 9)
    exponents = range(math.floor(low), math.ceil(high) + 1)
    found = [(math.log10(m * 10.0**e), f"{m * 10.0**e:.2g}") for e in exponents for m in wanted]
    room = MARGIN * (high - low)
    return [(x, text) for x, text in found if low - room <= x <= high + room]


def _runs(results: Results) -> str:
    head = "".join(
        f'<th scope="col" class="narrow{"" if index else " name"}">{escape(title)}</th>'
        for index, title in enumerate(headings(results))
    )
    rows = []
    for run in results.runs:
        name, *rest = cells(results, run)
        kind = ' class="best"' if run is results.best else ""
        rows.append(
            f'<th scope="row"{kind}>{escape(name)}</th>' + "".join(f"<td{kind}>{escape(text)}</td>" for text in rest)
        )
    return table(head, rows)


def _failed(results: Results) -> str:
    failed = [run for run in results.runs if run.state == "failed"]
    items = "".join(f"<li>{escape(run.name)}: {escape(run.reason)}</li>" for run in failed)
    return f"<ul>{items}</ul>" if failed else ""
