"""The plots of a sweep: a point for each run, on an axis that suits the setting, and the best run ringed."""

from __future__ import annotations

from pathlib import Path

import pytest

from alignlab.comparison.report import Plot
from alignlab.sweeps.page import panel, render, slices
from alignlab.sweeps.results import Results, Run


def results(runs: list[Run]) -> Results:
    return Results(Path("sweep"), "train", None, "loss", "minimize", runs)


def run(value: float | None, state: str = "finished", **values: str) -> Run:
    return Run(",".join(f"{k}={v}" for k, v in values.items()), values, [], state, value, {}, "out of <memory>")


def points(plot: Plot) -> dict[str, tuple[float, float]]:
    return {line.get_gid(): (line.get_xdata()[0], line.get_ydata()[0]) for line in plot.figure.axes[0].lines}


def ticks(plot: Plot) -> list[str]:
    return [text.get_text() for text in plot.figure.axes[0].get_xticklabels()]


def test_numbers_stand_where_they_are_and_the_best_is_ringed() -> None:
    found = results([run(0.1, lr="0.5"), run(0.2, lr="0.1")])
    (plot,) = slices(found)
    assert points(plot) == {"run0": (0.5, 0.1), "run1": (0.1, 0.2), "best": (0.5, 0.1)}
    assert plot.figure.axes[0].get_xscale() == "linear"
    assert plot.alt == "loss of every run against lr."


@pytest.mark.parametrize(("values", "scale"), [
    (["0.001", "0.01", "0.1"], "log"),
    (["0.01", "0.4"], "linear"),
    (["0", "100"], "linear"),
])  # fmt: skip
def test_decades_have_a_logarithmic_scale(values: list[str], scale: str) -> None:
    (plot,) = slices(results([run(0.1 * i, lr=v) for i, v in enumerate(values)]))
    assert plot.figure.axes[0].get_xscale() == scale


def test_texts_have_a_place_each() -> None:
    long = "a/very/long/path/to/some/data"
    found = results([run(0.1, data="b"), run(0.2, data=long), run(0.3, data="b")])
    plot = panel(found, found.runs, "data", "data")
    assert points(plot) == {"run0": (1, 0.1), "run1": (0, 0.2), "run2": (1, 0.3), "best": (1, 0.1)}
    assert ticks(plot) == ["…/path/to/some/data", "b"]


def test_a_setting_that_some_runs_lack_and_runs_without_a_value() -> None:
    runs = [run(0.1, lr="1", x="2"), run(0.2, lr="3"), run(None, "failed", lr="4", x="5")]
    assert [sum(name != "best" for name in points(plot)) for plot in slices(results(runs))] == [2, 1]


def test_pruned_runs_are_faint_and_this_is_said() -> None:
    found = results([run(0.1, lr="1"), run(0.2, "pruned", lr="2")])
    (plot,) = slices(found)
    assert [line.get_alpha() for line in plot.figure.axes[0].lines if line.get_gid() != "best"] == [1, 0.35]
    assert "those that were pruned are faint" in render(found)


def test_the_page_says_what_failed_and_why() -> None:
    html = render(results([run(None, "failed", lr="4")]))
    assert "No run has finished." in html and "<img" not in html
    assert "<li>lr=4: out of &lt;memory&gt;</li>" in html
