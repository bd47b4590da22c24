"""sweep.html: the table of a sweep's runs, and a plot for each setting that varied."""

from __future__ import annotations

import math
from collections.abc import Sequence

from alignlab.comparison.report import plots
from alignlab.comparison.report.page import render_page
from alignlab.sweeps.results import Results, Run, heading, shortest, table, told_best


def render(results: Results) -> str:
    """The page, self-contained."""
    best = results.best
    panels = slices(results)
    return render_page(
        "sweep.html",
        title=f"Sweep {results.folder.resolve().name}",
        best=told_best(results)[0] if best else None,
        command=results.reproduce(best) if best else None,
        counts=results.counts(),
        panels=panels,
        note=_note(results),
        runs=table(results),
        failed=[run for run in results.runs if run.state == "failed"],
    )


def slices(results: Results) -> list[plots.Plot]:
    """A plot for each setting that varied: the metric of every run against it."""
    runs = [r for r in results.runs if r.value is not None and r.state in ("finished", "pruned")]
    there = {key: [run for run in runs if key in run.values] for key in results.varied}
    return [panel(results, there[key], key, name) for key, name in shortest(results.varied).items() if there[key]]


def panel(results: Results, runs: Sequence[Run], key: str, name: str) -> plots.Plot:
    """The metric against one setting: along an axis where all values are numbers, else a place for each value."""
    texts = [run.values[key] for run in runs]
    numbers = [number for text in texts if (number := _number(text)) is not None]
    names = [] if len(numbers) == len(texts) else sorted(set(texts))
    xs = [float(names.index(text)) for text in texts] if names else numbers
    ys = [run.value for run in runs if run.value is not None]
    with plots.style():
        figure, ax = plots.axes()
        for i, (run, x, y) in enumerate(zip(runs, xs, ys, strict=True)):
            ax.plot(x, y, "o", color=plots.colour(0), alpha=0.35 if run.state == "pruned" else 1, gid=f"run{i}")
            if run is results.best:
                ax.plot(x, y, "o", ms=10, mfc="none", mec=plots.colour(1), mew=1.8, gid="best")
        if names:
            ax.set_xticks(range(len(names)), [text if len(text) < 20 else f"…{text[-18:]}" for text in names])
        elif _spans_decades(xs):
            plots.logarithmic(ax, "x")
        ax.margins(0.06)
        ax.set(xlabel=name, ylabel=heading(results))
    return plots.Plot(name, figure, f"{results.metric} of every run against {key}.")


def _note(results: Results) -> str:
    pruned = any(run.state == "pruned" for run in results.runs)
    faint = "; those that were pruned are faint, at the last value that they had" if pruned else ""
    return f"The best run is ringed{faint}."


def _number(text: str) -> float | None:
    try:
        value = float(text)
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def _spans_decades(values: Sequence[float]) -> bool:
    """Whether a logarithmic axis shows them better: positive, and over a factor of 50."""
    return min(values) > 0 and max(values) / min(values) >= 50
