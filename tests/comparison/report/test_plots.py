"""The plots: what stands where, what is told apart, what is told to those who do not see them."""

from __future__ import annotations

import base64
import re

import matplotlib as mpl
import numpy as np
import pytest

from alignlab.comparison.report import plots
from alignlab.comparison.report.metrics import metric
from alignlab.comparison.statistics import Estimate

CURVES = {
    "dpo": {0: [(0, 0.3), (50, 0.6), (100, 0.8)], 1: [(0, 0.3), (50, float("nan")), (100, 0.7)]},
    "ppo": {0: [(0, 0.3), (100, 0.75)]},
}


def lines(plot: plots.Plot) -> dict[str, mpl.lines.Line2D]:
    """The named lines of a plot's axes."""
    return {str(line.get_gid()): line for line in plot.figure.axes[0].lines if line.get_gid()}


def legend(plot: plots.Plot) -> list[str]:
    return [text.get_text() for text in plot.figure.legends[0].get_texts()]


class TestRewardAgainstKl:
    def test_points_and_frontier_lie_where_they_should(self):
        points = [("a", Estimate(0.0), Estimate(0.0)), ("b", Estimate(2.0), Estimate(1.0))]
        found = lines(plots.reward_kl(points, [[0, 0], [1, 0.8], [2, 1], [8, 4]]))
        assert found["p0"].get_xydata().tolist() == [[0, 0]] and found["p1"].get_xydata().tolist() == [[2, 1]]
        edge = 2 + 0.06 * 2  # where the plot ends; the frontier rises by 0.5 a nat from 2 to 8
        expected = [[0, 0], [1, 0.8], [2, 1], [edge, 1 + 0.5 * (edge - 2)]]
        assert found["frontier"].get_xydata() == pytest.approx(np.array(expected))

    def test_a_frontier_that_ends_within_the_plot_is_not_drawn_on(self):
        found = lines(plots.reward_kl([("a", Estimate(5.0), Estimate(1.0))], [[0, 0], [1, 2]]))
        assert found["frontier"].get_xydata().tolist() == [[0, 0], [1, 2]]

    def test_a_wide_interval_does_not_set_the_scale(self):
        """It takes at most as much room on each side as all means take together, and what is cut is said."""
        points = [("a", Estimate(1.0, -50.0, 52.0), Estimate(0.5)), ("b", Estimate(2.0, 1.9, 2.1), Estimate(0.6))]
        plot = plots.reward_kl(points)
        low, high = plot.figure.axes[0].get_xlim()
        assert (low, high) == pytest.approx((-2 - 0.06 * 6, 4 + 0.06 * 6))  # the means, and the origin, are 2 apart
        assert "is cut at its edge" in plot.caption
        assert "cut" not in plots.reward_kl([("b", Estimate(2.0, 1.9, 2.1), Estimate(0.6))]).caption

    def test_what_lacks_one_of_the_two_is_left_out(self):
        plot = plots.reward_kl([("a", None, Estimate(1.0)), ("b", Estimate(1.0), Estimate(1.0))])
        assert legend(plot) == ["b"] and "a:" not in plot.alt


class TestIntervals:
    def test_a_row_for_each_that_has_the_metric_best_first(self):
        estimates = [Estimate(0.9, 0.8, 1.0), None, Estimate(0.5)]
        plot = plots.intervals(["a", "b", "c"], estimates, metric("win_rate"))
        axes = plot.figure.axes[0]
        assert [text.get_text() for text in axes.get_yticklabels()] == ["a", "c"]
        assert axes.get_ylim()[0] > axes.get_ylim()[1]  # the first is on top
        assert [line.get_xdata()[0] for line in lines(plot).values()] == [0.9, 0.5]
        assert plot.alt == "win rate with 95 % intervals. a: win rate 0.900 (0.800 to 1.000); c: win rate 0.500"

    def test_limits_of_equal_or_single_values(self):
        assert plots.limits([Estimate(2.0), Estimate(2.0)]) == pytest.approx((1.8, 2.2))
        assert plots.limits([Estimate(0.0)]) == (-0.5, 0.5)


class TestLearning:
    def test_thin_averages_within_bins(self):
        points = [(float(x), float(x % 2)) for x in range(1000)] + [(1000.0, float("nan"))]
        x_B, y_B = plots.thin(points, 0, 1000, bins=10)
        assert x_B.tolist() == [50.0 + 100 * i for i in range(10)]
        assert y_B.tolist() == [0.5] * 10

    def test_thin_of_a_single_step_and_of_nothing(self):
        assert plots.drawable(*plots.thin([(3.0, 7.0)], 3, 3))[1].tolist() == [7.0]
        assert len(plots.drawable(*plots.thin([(3.0, float("inf"))], 0, 9))[0]) == 0

    def test_draws_each_seed_and_the_mean_where_all_seeds_are(self):
        plot = plots.learning("reward", ["sft", "dpo", "ppo"], CURVES)
        seeds = [line for line in plot.figure.axes[0].lines if line.get_gid() == "seed1"]
        assert [len(line.get_xdata()) for line in seeds] == [3, 2]  # dpo's; ppo has one seed, which is its mean
        found = lines(plot)
        assert found["mean1"].get_ydata() == pytest.approx([0.3, 0.75])  # at step 50 one seed has no value
        assert found["mean2"].get_ydata() == pytest.approx([0.3, 0.75])
        assert [found[name].get_color() for name in ("mean1", "mean2")] == [plots.COLOURS[1], plots.COLOURS[2]]
        assert legend(plot) == ["dpo", "ppo"]

    def test_twenty_algorithms_are_told_apart(self):
        """By colour and marker together; their curves by colour and dash; and each is named once."""
        names = [f"algorithm_{i}" for i in range(20)]
        plot = plots.learning("reward", names, {n: {0: [(0, 0.1 * i), (9, 0.5)]} for i, n in enumerate(names)})
        drawn = [line for name, line in lines(plot).items() if name.startswith("mean")]
        assert len({(line.get_color(), line.get_linestyle()) for line in drawn}) == 20
        assert len({(line.get_color(), line.get_marker()) for line in drawn}) == 20
        assert legend(plot) == names
        handles = plot.figure.legends[0].legend_handles
        assert [(h.get_color(), h.get_marker()) for h in handles] == [(d.get_color(), d.get_marker()) for d in drawn]

    def test_orders_of_magnitude_have_a_logarithmic_axis_with_plain_numbers(self):
        plot = plots.learning("grad_norm", ["a", "b"], {"a": {0: [(0, 0.1), (9, 0.2)]}, "b": {0: [(0, 8), (9, 30)]}})
        texts = re.findall(r"<text[^>]*>([^<]*)</text>", plot.svg)
        assert {"0.1", "1", "10", "2", "5"} <= set(texts) and "$" not in "".join(texts)


class TestSvg:
    def test_an_image_that_needs_no_file_with_text_as_text(self):
        plot = plots.learning("reward", ["dpo"], CURVES)
        assert base64.b64decode(plot.source.removeprefix("data:image/svg+xml;base64,")).decode() == plot.svg
        assert ">reward</text>" in plot.svg and ">step</text>" in plot.svg

    def test_names_are_never_markup_nor_formulas(self):
        for name in ("<b>&", "$x^2$", "_hidden", 'a"b'):
            svg = plots.learning("reward", [name], {name: {0: [(0, 0.0), (9, 1.0)]}}).svg
            text = "".join(re.findall(r"<text[^>]*>([^<]*)</text>", svg))
            assert name.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;") in text
            assert "<b>" not in svg

    def test_the_users_own_settings_of_matplotlib_change_nothing_and_are_kept(self):
        expected = plots.learning("reward", ["dpo"], CURVES).svg
        with mpl.rc_context({"font.size": 30, "axes.grid": False}):
            assert plots.learning("reward", ["dpo"], CURVES).svg == expected
            assert mpl.rcParams["font.size"] == 30
