"""The report: well-formed, self-contained, safe with any text, the same for the same input."""

from __future__ import annotations

import re
from functools import cache
from html.parser import HTMLParser
from pathlib import Path
from tempfile import TemporaryDirectory
from unittest.mock import patch

import pytest

from alignlab.comparison.report.leaderboard import build
from alignlab.comparison.report.page import write_report
from alignlab.core import AlignlabError
from tests.comparison.report.board_rows import row, three_algorithms

VOID = {"meta", "wbr", "img"}
FRONTIER = [[0.0, 0.3], [1.0, 0.7], [2.0, 0.85], [8.0, 0.9]]
CURVES = {
    "reward": {
        "dpo": {0: [(0, 0.3), (50, 0.6), (100, 0.8)], 1: [(0, 0.3), (50, float("nan")), (100, 0.7)]},
        "ppo": {0: [(0, 0.3), (100, 0.75)]},
    }
}
SAMPLES = {"<script>alert('p')</script>": {"sft": "a & b", "dpo": '</p><script src="x.js">"'}}
NASTY = '<img src=x onerror="alert(1)">'


class Page(HTMLParser):
    """Checks that tags nest, and collects them."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open and self.open[-1] == tag, f"</{tag}> closes <{self.open[-1:]}>"
        self.open.pop()

    def handle_data(self, data):
        self.text.append(data)

    def all(self, tag):
        return [attrs for name, attrs in self.tags if name == tag]


def board(rows=None, **settings):
    return build(rows or three_algorithms(), "exact", {"seconds": 60}, **settings)


def render(*given, **named) -> str:
    with TemporaryDirectory() as folder, patch("alignlab.comparison.report.plots.write_plots"):
        write_report(Path(folder) / "report.html", *given, **named)
        return (Path(folder) / "report.html").read_text()


@cache
def full() -> str:
    return render(board(), FRONTIER, CURVES, SAMPLES, [{"algorithm": "dpo", "seed": 0, "folder": "runs/a"}])


class TestPage:
    def test_is_well_formed_and_has_every_section(self):
        html = full()
        page = Page(html)
        assert len(page.all("img")) == 3  # intervals, reward against KL, one learning curve
        assert len(re.findall("<h2>", html)) == 6
        assert "dpo has the highest reward on exact" in html
        assert "not significant" in html

    def test_loads_nothing(self):
        html = full()
        assert not re.search(r"(?i)(https?:)?//[a-z0-9.-]+\.[a-z]", html)
        page = Page(html)
        for tag, attributes in page.tags:
            assert tag not in {"link", "iframe", "object", "embed", "base", "image"}
            assert not {"href", "xlink:href", "srcset", "background"} & attributes.keys(), tag
            assert (attributes.get("src") or "data:").startswith("data:"), tag
        assert "@import" not in html
        policy = next(a["content"] for a in page.all("meta") if a.get("http-equiv") == "Content-Security-Policy")
        assert policy is not None and policy.startswith("default-src 'none'")

    def test_text_of_users_is_escaped(self):
        html = full()
        assert len(Page(html).all("script")) == 1  # its own
        assert "&lt;script&gt;alert(&#39;p&#39;)&lt;/script&gt;" in html
        assert "a &amp; b" in html

    def test_names_are_escaped_everywhere(self):
        rows = [row(NASTY, seed, reward=0.5 + seed / 10, **{NASTY: 1.0}) for seed in (0, 1)]
        rows += [row("b", seed, reward=seed / 10) for seed in (0, 1)]
        found = build(rows, NASTY, {NASTY: 3})
        curves = {NASTY: {NASTY: {0: [(0, 1.0), (1, 2.0)]}}}
        samples = {NASTY: {NASTY: NASTY}}
        html = render(found, FRONTIER, curves, samples, [{NASTY: NASTY, "more": {NASTY: [NASTY]}}])
        html += render(build(rows, NASTY, {}, sort_by=NASTY))
        page = Page(html)
        assert all((image["src"] or "").startswith("data:") for image in page.all("img")) and "<img src=x" not in html
        assert not any("onerror" in attributes for _, attributes in page.tags)

    def test_same_input_same_bytes(self, tmp_path):
        for name in ("a", "b"):
            write_report(tmp_path / name / "report.html", board(), FRONTIER, CURVES, SAMPLES)
        files = sorted(p.relative_to(tmp_path / "a") for p in (tmp_path / "a").rglob("*.*"))
        assert [str(p) for p in files if p.suffix == ".pdf"] == [
            f"plots/{name}.pdf" for name in ("ranking", "reward-kl", "reward")
        ]
        for path in files:
            assert (tmp_path / "a" / path).read_bytes() == (tmp_path / "b" / path).read_bytes(), path

    def test_plots_are_written_for_papers_and_those_of_before_are_removed(self, tmp_path):
        (tmp_path / "plots").mkdir()
        for name in ("kl.pdf", "kl.png", "mine.txt"):
            (tmp_path / "plots" / name).touch()
        write_report(tmp_path / "report.html", board(), FRONTIER, CURVES)
        written = {path.name: path.read_bytes()[:8] for path in (tmp_path / "plots").iterdir()}
        assert written.pop("mine.txt") == b""  # the user's
        assert {name.rpartition(".")[0] for name in written} == {"ranking", "reward", "reward-kl"}
        for name, start in written.items():
            assert start == b"\x89PNG\r\n\x1a\n" if name.endswith("png") else start.startswith(b"%PDF-"), name

    def test_what_is_not_given_is_not_there(self):
        html = render(board())
        Page(html)
        for heading in ("Learning curves", "Answers side by side"):
            assert heading not in html
        assert "R*(KL)" not in html

    def test_one_algorithm_one_seed_and_nothing_measured(self):
        empty = row("a", 0, reward=None, kl=None, win_rate=None, seconds=None)
        html = render(board([empty]))
        assert Page(html).all("img") == []
        assert "–" in html
        Page(render(board([row("a", 0)])))

    def test_a_frontier_of_another_form(self):
        with pytest.raises(AlignlabError, match="frontier"):
            render(board(), [[0.0, 1.0, 2.0]])

    def test_accessible(self):
        page = Page(full())
        for svg in page.all("img"):
            assert len(svg["alt"] or "") > 20
        assert ("html", {"lang": "en"}) in page.tags
        assert any(a.get("name") == "viewport" for a in page.all("meta"))
        assert all(a.get("scope") in ("col", "row") for a in page.all("th"))
        scrolled = [a for tag, a in page.tags if a.get("class") == "scroll"]
        assert len(scrolled) == len(page.all("table"))
        for region in scrolled:  # a table that is cut can be reached and scrolled by the keyboard
            assert region["tabindex"] == "0" and region["role"] == "region" and region["aria-label"]


class TestTables:
    def test_costs_stand_in_the_same_table(self):
        html = render(
            board([{**r, "samples_per_answer": 1 + 3 * (r["algorithm"] == "dpo")} for r in three_algorithms()])
        )
        assert ">samples (per answer) ↓<" in html and ">time (s) ↓<" in html

    def test_notes_stand_below_the_table(self):
        rows = [
            {**r, **({"note": "its KL is <a bound>"} if r["algorithm"] == "dpo" else {})} for r in three_algorithms()
        ]
        assert "dpo: its KL is &lt;a bound&gt;." in render(board(rows))

    def test_the_best_values_are_marked(self):
        assert re.findall(r'class="best">(.*?)<', full()) == ["0.950", "0.800", "0.500", "0.600", "0.500", "0.500"]

    def test_significance_matrix(self):
        html = render(board())
        matrix = html[html.index("row − column") :]
        # dpo and ppo against sft, and back; dpo against ppo is neither
        assert matrix.count('class="win"') == 2 and matrix.count('class="loss"') == 2
        assert "+0.500 ▲" in matrix and "-0.500 ▼" in matrix
        assert re.search(r"\+0\.010<small>", matrix)

    def test_a_lower_difference_wins_where_lower_is_better(self):
        rows = [row(n, s, perplexity=p + s / 100) for n, p in (("a", 4.0), ("b", 9.0)) for s in range(3)]
        html = render(board(rows, sort_by="perplexity"))
        assert "-5.00 ▲" in html and "+5.00 ▼" in html
        assert "a has the lowest perplexity" in html


class TestBudget:
    def test_what_is_shared_is_said(self):
        shared = {"sft": {"trained_tokens": 51_588, "generated_tokens": 0, "seconds": 2.25}, "pairs": {"seconds": 4.03}}
        html = render(build(three_algorithms(), "exact", {"steps": 300, "seconds": None, "shared": shared}))
        assert "<dt>Budget of each run</dt><dd>300 steps</dd>" in html
        assert "used by all of them: sft (51,588 trained tokens, 2.25 seconds), pairs (4.03 seconds)." in html

    @pytest.mark.parametrize("budget", [{}, {"shared": {}}, {"shared": {"sft": {}}}])
    def test_whatever_a_budget_holds(self, budget):
        Page(render(build(three_algorithms(), "exact", budget)))


class TestCurves:
    def test_losses_of_different_algorithms_share_no_axis(self):
        curves = {"loss": {"rrhf": {0: [(0, 30.0), (9, 20.0)]}, "dpo": {0: [(0, 0.7), (9, 0.6)]}}}
        html = render(board(), curves=curves)
        page = Page(html)
        labels = [svg["alt"] for svg in page.all("img")][2:]
        assert labels == [f"loss over training, {name}, steps 0 to 9" for name in ("dpo", "rrhf")]
        assert "losses of different algorithms cannot be compared" in html
        alone = render(board(), curves={"loss": {"dpo": curves["loss"]["dpo"]}})
        assert "cannot be compared" not in alone and len(Page(alone).all("img")) == 3

    def test_a_constant_is_a_sentence_not_a_plot(self):
        ratio = {"rloo": {0: [(0, 1.0), (9, 1.00000005)]}, "ppo": {0: [(0, 0.99999998)]}}
        zero = {"rloo": {0: [(0, 0.0), (9, 0.0)]}}
        html = render(board(), curves={"ratio": ratio, "clip_fraction": zero})
        assert (
            "Not drawn, as they stay the same: probability ratio to the sampling policy (1), clipped ratios (0)."
            in html
        )
        assert len(Page(html).all("img")) == 2
        changing = render(board(), curves={"ratio": {"ppo": {0: [(0, 1.0), (9, 1.01)]}}})
        assert "Not drawn" not in changing and len(Page(changing).all("img")) == 3

    def test_nothing_finite_no_plot(self):
        for points in ([], [(0, float("nan"))]):
            assert "Learning curves" not in render(board(), curves={"reward": {"dpo": {0: points}}})

    def test_an_algorithm_without_a_row_is_drawn(self):
        html = render(board(), curves={"reward": {"broken": {0: [(0, 0.1), (5, 0.2)]}}})
        assert 'alt="reward over training, broken, steps 0 to 5"' in html
