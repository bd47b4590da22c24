"""Aggregation, ranking, marks, and the files a leaderboard is written to."""

from __future__ import annotations

import csv
import io
import json
import re

import numpy as np
import pytest
from rich.console import Console

from alignlab.comparison.report.leaderboard import REQUIRED, build
from alignlab.comparison.report.metrics import METRICS, format_interval, format_number, metric
from alignlab.comparison.report.tables import budget_text, limits_text, to_csv, to_markdown
from alignlab.comparison.report.verdict import format_p, verdict
from alignlab.comparison.statistics import Estimate
from alignlab.core import AlignlabError, ConfigError
from tests.comparison.report.board_rows import row, three_algorithms

BUDGET = {"seconds": 60.0, "steps": None, "generated_tokens": 1_000_000}


def board(rows=None, **settings):
    return build(rows or three_algorithms(), "stories", BUDGET, **settings)


def by_name(found):
    return {r["algorithm"]: r for r in found.rows}


class TestRows:
    def test_mean_and_interval_over_seeds(self):
        dpo = by_name(board())["dpo"]
        assert dpo["reward"] == pytest.approx(0.8)
        # 0.78 0.80 0.82: s = 0.02, half-width 4.302653 · 0.02 / sqrt(3) = 0.049683
        assert dpo["reward_low"] == pytest.approx(0.8 - 0.049683, abs=1e-6)
        assert dpo["reward_high"] == pytest.approx(0.8 + 0.049683, abs=1e-6)
        assert dpo["seeds"] == [0, 1, 2]

    def test_every_row_has_every_metric_with_its_bounds(self):
        found = board()
        for r in found.rows:
            for name in REQUIRED:
                assert {name, f"{name}_low", f"{name}_high"} <= r.keys()
        assert by_name(found)["ppo"]["distinct_2"] is None
        assert by_name(found)["ppo"]["distinct_2_low"] is None

    def test_nan_is_missing(self):
        found = board()
        assert by_name(found)["sft"]["frontier_efficiency"] is None
        assert found.runs[0]["frontier_efficiency"] is None

    @pytest.mark.parametrize("bad", [float("nan"), float("inf"), None])
    def test_a_metric_missing_in_some_seeds_says_so(self, bad):
        rows = [row("dpo", 0, reward=0.5), row("dpo", 1, reward=bad), row("dpo", 2, reward=0.7)]
        found = board(rows).rows[0]
        assert found["reward"] == pytest.approx(0.6)
        assert found["reward_seeds"] == 2
        assert "kl_seeds" not in found
        # 0.5 0.7: half-width 12.706205 · 0.141421 / sqrt(2) = 1.270620
        assert "| **0.600** ±1.271 (2 of 3 seeds) |" in to_markdown(board(rows))

    def test_intervals_stay_within_the_bounds_of_the_metric(self):
        rows = [row("dpo", seed, win_rate=value, kl=kl) for seed, (value, kl) in enumerate([(0.9, 0.1), (0.99, 0.01)])]
        found = board(rows).rows[0]
        assert found["win_rate_high"] == 1 and found["kl_low"] == 0
        assert found["win_rate_low"] < 0.9

    def test_an_estimate_below_the_bound_stays_within_its_interval(self):
        found = board([row("dpo", 0, kl=-0.02), row("dpo", 1, kl=-0.01)]).rows[0]
        assert found["kl_low"] <= found["kl"] <= found["kl_high"]


class TestPerPrompt:
    def test_one_seed_gets_its_interval_from_the_prompts(self):
        values = [0.0, 1.0] * 20  # s = 0.50637, error 0.50637 / sqrt(40) = 0.080064, t(0.975, 39) = 2.022691
        found = board([row("dpo", 0, reward=0.5, reward_per_prompt=values)])
        assert found.rows[0]["reward_high"] - 0.5 == pytest.approx(2.022691 * 0.080064, rel=0.05)
        assert found.prompts == {"reward": 40}
        assert found.rows[0]["kl_low"] is None

    def test_algorithms_are_compared_prompt_by_prompt(self):
        prompts = np.random.default_rng(0).normal(size=30)
        rows = [
            row(name, 0, reward=(values := prompts + shift + noise).mean(), reward_per_prompt=values.tolist())
            for name, shift, noise in (("a", 0.1, np.tile([0.01, -0.01], 15)), ("b", 0.0, 0.0))
        ]
        found = board(rows)
        assert found.between("a", "b").significant
        assert found.rows[0]["reward_low"] < 0 < found.rows[0]["reward_high"]

    def test_prompts_missing_in_one_run_are_left_out_of_all(self):
        rows = [
            row("a", 0, reward=2.0, reward_per_prompt=[1.0, 2.0, None, 3.0]),
            row("b", 0, reward=4.0, reward_per_prompt=[4.0, float("nan"), 4.0, 4.0]),
        ]
        found = board(rows)
        assert found.prompts == {"reward": 2}  # the first and the last
        assert by_name(found)["a"]["reward_low"] is not None

    def test_lists_of_different_lengths(self):
        rows = [row("a", 0, reward_per_prompt=[0.5] * 3), row("b", 0, reward_per_prompt=[0.5] * 4)]
        with pytest.raises(AlignlabError, match="'reward_per_prompt' has 3 values in one run and 4 in another"):
            board(rows)

    def test_a_list_whose_mean_is_another_value(self):
        with pytest.raises(AlignlabError, match=r"'dpo', seed 3: the mean .* is 0.7 .* run's value is 0.5"):
            board([row("dpo", 3, reward=0.5, reward_per_prompt=[0.7, 0.7])])

    def test_a_list_for_some_seeds_only(self):
        with pytest.raises(AlignlabError, match="'dpo' has 'reward_per_prompt' for some seeds but not for 1"):
            board([row("dpo", 0, reward_per_prompt=[0.5, 0.5]), row("dpo", 1)])

    def test_a_single_prompt_tells_nothing(self):
        found = board([row("dpo", 0, reward_per_prompt=[0.5])])
        assert found.rows[0]["reward_low"] is None and found.prompts == {}


class TestOrder:
    def test_objective_score_goes_before_reward(self):
        rows = [row("a", 0, reward=0.9, objective_score=0.1), row("b", 0, reward=0.1, objective_score=0.9)]
        assert [r["algorithm"] for r in board(rows).rows] == ["b", "a"]
        assert [r["algorithm"] for r in board([{**r, "objective_score": None} for r in rows]).rows] == ["a", "b"]

    def test_ranks(self):
        assert [(r["rank"], r["algorithm"]) for r in board().rows] == [(1, "dpo"), (2, "ppo"), (3, "sft")]

    def test_lower_is_better_where_it_is(self):
        assert [r["algorithm"] for r in board(sort_by="kl").rows] == ["sft", "dpo", "ppo"]
        rows = [row("a", 0, perplexity=9.0), row("b", 0, perplexity=4.0)]
        assert [r["algorithm"] for r in board(rows, sort_by="perplexity").rows] == ["b", "a"]

    def test_what_cannot_be_ranked_comes_last(self):
        found = board(sort_by="distinct_2")
        assert [(r["rank"], r["algorithm"]) for r in found.rows] == [(1, "dpo"), (2, "sft"), (None, "ppo")]
        assert found.rows[-1]["indistinguishable_from_best"] is None

    def test_ties_go_by_name(self):
        assert [r["algorithm"] for r in board([row("b", 0), row("a", 0)]).rows] == ["a", "b"]

    def test_unknown_metric(self):
        with pytest.raises(ConfigError, match=r"sort_by=rewrad: .*did you mean 'reward'"):
            board(sort_by="rewrad")


class TestMarks:
    def test_indistinguishable_from_the_best(self):
        found = by_name(board())
        assert found["dpo"]["indistinguishable_from_best"] is True
        assert found["ppo"]["indistinguishable_from_best"] is True  # 0.01 apart, noise of 0.04
        assert found["sft"]["indistinguishable_from_best"] is False  # 0.5 apart

    def test_untestable_is_null(self):
        found = board([row("a", 0, reward=0.9), row("b", 0, reward=0.1)])
        assert found.rows[1]["indistinguishable_from_best"] is None
        assert "| 2 ? | b |" in to_markdown(found)

    def test_comparisons_read_either_way(self):
        found = board()
        there, back = found.between("dpo", "sft"), found.between("sft", "dpo")
        assert there.difference is not None and back.difference is not None
        assert there.difference.mean == pytest.approx(0.5) and back.difference.mean == pytest.approx(-0.5)
        assert there.p_holm == back.p_holm

    def test_best_is_of_achievements_not_of_costs(self):
        found = board()
        assert found.best("reward") == {"dpo"}
        assert found.best("win_rate") == {"dpo", "ppo", "sft"}
        assert found.best("kl") == found.best("seconds") == set()


class TestVerdict:
    def test_says_who_is_best_and_whether_it_is_chance(self):
        best, alike, beaten = verdict(board())
        assert best.startswith("dpo has the highest reward on stories: 0.800, 95 % interval 0.750 to 0.850 (3 seeds)")
        assert "difference from ppo is not significant" in alike and "+0.010" in alike
        assert "significantly better than sft" in beaten and "after correction for 3 comparisons" in beaten

    def test_one_seed_cannot_be_tested(self):
        text = " ".join(verdict(board([row("a", 0, reward=0.9), row("b", 0, reward=0.1)])))
        assert "(no interval)" not in text.split("(1 seed)")[1]
        assert "Whether it differs from b cannot be tested" in text
        assert "significant" not in text

    def test_one_seed_with_prompts_says_what_it_does_not_cover(self):
        values = np.linspace(0, 1, 20)
        rows = [
            row(n, 0, reward=values.mean() + s, reward_per_prompt=(values + s).tolist())
            for n, s in (("a", 1.0), ("b", 0))
        ]
        text = " ".join(verdict(board(rows)))
        assert "significantly better than b" in text and "nothing of how another seed" in text

    def test_better_on_average_but_worse_on_the_common_seeds(self):
        rows = [row("a", s, reward=0.5 + 0.001 * s) for s in range(3)] + [row("a", 9, reward=3.0)]
        rows += [row("b", s, reward=0.6 + 0.0011 * s) for s in range(3)]
        text = " ".join(verdict(board(rows)))
        assert text.startswith("a has the highest reward") and "significantly better" not in text
        assert "On the seeds in common, though, it is significantly behind b" in text

    def test_alone_and_nobody(self):
        assert "nothing to compare it with" in verdict(board([row("a", 0)]))[1]
        assert "none can be called the best" in verdict(board([row("a", 0, reward=None)]))[0]


class TestBadRows:
    def test_what_is_lacking_was_not_measured(self):
        found = board([{"algorithm": "dpo", "seed": 4, "reward": 0.5}, row("ppo", 4, reward=0.4)])
        assert found.runs[0]["kl"] is None and found.rows[0]["kl"] is None

    @pytest.mark.parametrize("value", ["0.5", True, [1.0], {"a": 1}])
    def test_not_a_number(self, value):
        with pytest.raises(AlignlabError, match=r"algorithm 'dpo', seed 2: 'reward' must be a number, got"):
            board([row("dpo", 2, reward=value)])

    def test_not_a_number_among_the_prompts(self):
        with pytest.raises(AlignlabError, match=r"seed 2: 'reward_per_prompt' at prompt 1 must be a number, got 'x'"):
            board([row("dpo", 2, reward_per_prompt=[0.5, "x"])])
        with pytest.raises(AlignlabError, match="must be a list"):
            board([row("dpo", 2, reward_per_prompt=0.5)])

    def test_twice(self):
        with pytest.raises(AlignlabError, match="two rows for algorithm 'dpo' and seed 0"):
            board([row("dpo", 0), row("dpo", 0)])

    def test_none(self):
        with pytest.raises(AlignlabError, match="at least one run"):
            build([], "stories", {})


class TestFiles:
    def test_dict_is_the_documented_one(self):
        assert list(board().to_dict()) == ["benchmark", "budget", "rows"]

    def test_json_comes_back(self, tmp_path):
        found = board()
        found.write(tmp_path / "new" / "folder")
        path = tmp_path / "new" / "folder" / "leaderboard.json"

        def no_constants(name):
            raise AssertionError(f"{name} is not JSON")

        data = json.loads(path.read_text(), parse_constant=no_constants)
        assert {key: data[key] for key in ("benchmark", "budget", "rows")} == found.to_dict()
        assert data["runs"] == found.runs and len(data["runs"]) == 9
        assert build(data["runs"], data["benchmark"], data["budget"], data["sort_by"]) == found
        names = sorted(p.name for p in path.parent.iterdir())  # and no temporary files
        assert names == [
            "leaderboard.csv",
            "leaderboard.json",
            "leaderboard.md",
        ]

    def test_per_prompt_values_come_back(self, tmp_path):
        found = board([row("dpo", 0, reward=0.5, reward_per_prompt=[0.4, 0.6, None])])
        found.write(tmp_path)
        assert build(json.loads((tmp_path / "leaderboard.json").read_text())["runs"], "stories", BUDGET) == found
        assert found.runs[0]["reward_per_prompt"] == [0.4, 0.6, None]

    def test_csv_comes_back(self):
        found = board()
        lines = list(csv.DictReader(io.StringIO(to_csv(found))))
        assert [line["algorithm"] for line in lines] == ["dpo", "ppo", "sft"]
        assert lines[0]["seeds"] == "0 1 2"
        assert lines[1]["distinct_2"] == ""
        for line, r in zip(lines, found.rows, strict=True):
            for key, value in r.items():
                if isinstance(value, float):
                    assert float(line[key]) == value

    def test_markdown_is_a_table(self):
        rows = [{**r, "algorithm": "d|po" if r["algorithm"] == "dpo" else r["algorithm"]} for r in three_algorithms()]
        text = to_markdown(board(rows))
        lines = [line for line in text.splitlines() if line.startswith("|")]
        cells = [[c.strip() for c in line.replace("\\|", "\0").strip("|").split("|")] for line in lines]
        assert len({len(c) for c in cells}) == 1 and len(lines) == 5
        head, _, first, second, _ = cells
        column = head.index("KL to reference (nats/response) ↓")
        assert first[:3] == ["1", "d\0po", "3"] and first[column].startswith("1.50 ±")
        assert first[head.index("reward ↑")] == "**0.800** ±0.050"
        assert second[0] == "2 ≈" and second[head.index("distinct-2 ↑")] == "–"
        assert "Budget of each run: 60.0 seconds, 1,000,000 generated tokens.\n" in text

    def test_budget_is_said_in_sentences(self):
        """What is null or 0 is left out; what was made once stands apart from what each run was allowed."""
        shared = {"sft": {"trained_tokens": 51_588, "generated_tokens": 0, "seconds": 2.25}, "reward_model": {}}
        found = build([row("a", 0)], "exact", {"steps": 300, "trained_tokens": None, "shared": shared})
        assert limits_text(found) == "300 steps"
        assert budget_text(found) == (
            "Budget of each run: 300 steps. Made once, before these runs, and used by all of them: "
            "sft (51,588 trained tokens, 2.25 seconds), reward model."
        )
        assert "Budget" not in to_markdown(build([row("a", 0)], "exact", {}))

    def test_notes(self):
        rows = [{**r, **({"note": "a bound"} if r["algorithm"] == "dpo" else {})} for r in three_algorithms()]
        found = board(rows)
        assert by_name(found)["dpo"]["note"] == "a bound"  # once for three seeds
        assert "note" not in by_name(found)["sft"]
        assert to_markdown(found).rstrip().endswith("cannot be tested. dpo: a bound.")
        assert "note" not in found.metrics

    def test_constants_are_no_columns(self):
        found = board([row("a", 0, reference_reward=0.3)])
        assert found.rows[0]["reference_reward"] == 0.3
        assert "reference_reward" not in found.columns and "reference's" not in to_markdown(found)

    @pytest.mark.parametrize("width", [200, 80, 50])
    def test_printed_table_fits_the_terminal(self, width):
        out = io.StringIO()
        board().print(Console(file=out, width=width))
        text = out.getvalue()
        assert max(map(len, text.splitlines())) <= width
        assert "0.800" in text and "±0.050" in text and "…" not in text
        assert ("0.800 ±0.050" in text) == (width == 200)
        assert ("Left out" in text) == (width < 200)

    def test_many_algorithms_on_a_narrow_terminal(self):
        """Each on a line of its own with its interval below, its name whole, and the KL still there."""
        names, noise = [f"a_rather_long_name_{i}" for i in range(17)], np.random.default_rng(0)
        rows = [
            row(name, seed, reward=0.3 + i / 40, kl=0.1 * seed, objective_score=0.9 - i / 20 + noise.normal() / 30)
            for i, name in enumerate(names)
            for seed in range(3)
        ]
        out = io.StringIO()
        board(rows).print(Console(file=out, width=80))
        lines = out.getvalue().splitlines()
        assert max(map(len, lines)) <= 80
        table = [line.rstrip() for line in lines if re.match(r" *\d+( ≈)? +a_rather_long_name_\d+ ", line)]
        assert len(table) == 17
        heading = next(line for line in lines if "algorithm" in line)
        assert "reward" in heading and "KL" in lines[lines.index(heading) - 1] + heading
        assert "[0.00," in out.getvalue()  # a lopsided interval's bounds stand below each other

    def test_metrics_that_no_seed_changes(self):
        text = " ".join(verdict(board([row(n, s, reward=r) for n, r in (("a", 0.5), ("b", 0.25)) for s in (0, 1)])))
        assert "0.500 with every seed (2 seeds)" in text and "+0.250 with every seed" in text


class TestNumbers:
    @pytest.mark.parametrize(
        ("value", "text"),
        [(0, "0"), (12.34, "12.3"), (123.4, "123"), (999.7, "1.00k"), (12_345, "12.3k"), (1e6, "1.00M"),
         (3.21e9, "3.21G"),
         (0.0123, "0.0123"), (-1234, "-1.23k"), (None, "–")],
    )  # fmt: skip
    def test_three_significant_digits(self, value, text):
        assert format_number(value, None) == text

    def test_fixed_decimals(self):
        assert format_number(0.12345, 3) == "0.123"

    @pytest.mark.parametrize(
        ("estimate", "decimals", "text"),
        [
            (Estimate(0.5, 0.4, 0.6), 2, "±0.10"),
            (Estimate(0.9, 0.7, 1.0), 2, "[0.70,1.00]"),
            (Estimate(471, 429, 513), None, "±42"),
            (Estimate(3.1e6, 3.08e6, 3.12e6), None, "±0.02M"),
            (Estimate(5, 5, 5), 2, ""),
            (Estimate(5), 2, ""),
        ],
    )
    def test_intervals(self, estimate, decimals, text):
        assert format_interval(estimate, decimals) == text

    def test_p_values(self):
        assert [format_p(p) for p in (None, 0.0004, 0.0123, 0.5)] == ["", "p < 0.001", "p = 0.012", "p = 0.50"]

    def test_headings(self):
        assert metric("reward").heading == "reward ↑"
        assert metric("peak_memory_mb").heading == "peak memory (MB) ↓"
        assert metric("my_own_metric").heading == "my own metric"
        assert all(known.cost == (known.better < 0) for name, known in METRICS.items() if name != "perplexity")
