"""The report: well-formed, self-contained, safe with any text, the same for the same input; and its plots' geometry."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from itertools import pairwise

import pytest

from alignlab.comparison import plots
from alignlab.comparison.leaderboard import build
from alignlab.comparison.report import render, write_report
from alignlab.comparison.statistics import Estimate
from alignlab.core import AlignlabError
from tests.comparison.board_rows import row, three_algorithms

VOID = {"meta"}
FRONTIER = [[0.0, 0.3], [1.0, 0.7], [2.0, 0.85], [8.0, 0.9]]
CURVES = {
    "reward": {
        "dpo": {0: [(0, 0.3), (50, 0.6), (100, 0.8)], 1: [(0, 0.3), (50, float("nan")), (100, 0.7)]},
        "ppo": {0: [(0, 0.3), (100, 0.75)]},
    }
}
SAMPLES = [{"prompt": "<script>alert('p')</script>", "answers": {"sft": "a & b", "dpo": '</p><script src="x.js">"'}}]
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


def shape(svg: str) -> str:
    """What marker there is, wherever it stands."""
    circle, polygon = re.search(r"<circle", svg), re.search(r'<polygon points="([^"]*)"', svg)
    if circle or not polygon:
        return "circle"
    points = [tuple(map(float, p.split(","))) for p in polygon[1].split(" ")]
    return str([(round(x - points[0][0]), round(y - points[0][1])) for x, y in points])


def board(rows=None, **settings):
    return build(rows or three_algorithms(), "exact", {"seconds": 60}, **settings)


def full(found=None) -> str:
    return render(found or board(), FRONTIER, CURVES, SAMPLES, [{"algorithm": "dpo", "seed": 0, "folder": "runs/a"}])


class TestPage:
    def test_is_well_formed_and_has_every_section(self):
        html = full()
        page = Page(html)
        assert len(page.all("svg")) == 3  # intervals, reward against KL, one learning curve
        assert len(re.findall("<h2>", html)) == 7
        assert "dpo has the highest reward on exact" in html
        assert "not significant" in html

    def test_loads_nothing(self):
        html = full()
        assert not re.search(r"(?i)(https?:)?//[a-z0-9.-]+\.[a-z]", html)
        page = Page(html)
        for tag, attributes in page.tags:
            assert tag not in {"link", "img", "iframe", "object", "embed", "base", "image", "use"}
            assert not {"src", "href", "xlink:href", "srcset", "background"} & attributes.keys(), tag
        assert "url(" not in html and "@import" not in html
        policy = next(a["content"] for a in page.all("meta") if a.get("http-equiv") == "Content-Security-Policy")
        assert policy is not None and policy.startswith("default-src 'none'")

    def test_text_of_users_is_escaped(self):
        html = full()
        assert len(Page(html).all("script")) == 1  # its own
        assert "&lt;script&gt;alert(&#x27;p&#x27;)&lt;/script&gt;" in html
        assert "a &amp; b" in html

    def test_names_are_escaped_everywhere(self):
        rows = [row(NASTY, seed, reward=0.5 + seed / 10, **{NASTY: 1.0}) for seed in (0, 1)]
        rows += [row("b", seed, reward=seed / 10) for seed in (0, 1)]
        found = build(rows, NASTY, {NASTY: NASTY})
        curves = {NASTY: {NASTY: {0: [(0, 1.0), (1, 2.0)]}}}
        samples = [{"prompt": NASTY, "answers": {NASTY: NASTY}}]
        html = render(found, FRONTIER, curves, samples, [{NASTY: NASTY, "more": {NASTY: [NASTY]}}])
        html += render(build(rows, NASTY, {}, sort_by=NASTY))
        page = Page(html)
        assert not page.all("img") and "<img" not in html
        assert not any("onerror" in attributes for _, attributes in page.tags)

    def test_same_input_same_bytes(self, tmp_path):
        write_report(tmp_path / "a" / "report.html", board(), FRONTIER, CURVES, SAMPLES)
        write_report(tmp_path / "b.html", board(), FRONTIER, CURVES, SAMPLES)
        assert (tmp_path / "a" / "report.html").read_bytes() == (tmp_path / "b.html").read_bytes()

    def test_what_is_not_given_is_not_there(self):
        html = render(board())
        Page(html)
        for heading in ("Learning curves", "Answers side by side"):
            assert heading not in html
        assert 'class="frontier"' not in html

    def test_one_algorithm_one_seed_and_nothing_measured(self):
        empty = row("a", 0, reward=None, kl=None, win_rate=None, seconds=None)
        html = render(board([empty]))
        assert Page(html).all("svg") == []
        assert "–" in html
        Page(render(board([row("a", 0)])))

    def test_runs_carry_their_own_provenance(self):
        html = render(board([row("a", 3, folder="runs/<a>", config_hash="0f3c")]))
        assert "runs/&lt;a&gt;" in html and "0f3c" in html

    @pytest.mark.parametrize(
        ("given", "message"),
        [
            ({"samples": [{"prompt": "x"}]}, r"samples\[0\]"),
            ({"samples": [{"prompt": 3, "answers": {}}]}, r"samples\[0\]"),
            ({"curves": {"dpo": {0: [(0, 1.0)]}}}, r"curves\['dpo'\].*outermost key is the metric"),
            ({"frontier": [[0.0, 1.0, 2.0]]}, "frontier"),
        ],
    )
    def test_wrong_forms(self, given, message):
        with pytest.raises(AlignlabError, match=message):
            render(board(), **given)

    def test_accessible(self):
        page = Page(full())
        for svg in page.all("svg"):
            assert svg["role"] == "img" and len(svg["aria-label"] or "") > 20
        assert ("html", {"lang": "en"}) in page.tags
        assert any(a.get("name") == "viewport" for a in page.all("meta"))
        assert all(a.get("scope") in ("col", "row") for a in page.all("th"))


class TestTables:
    def test_samples_per_answer_are_a_cost_of_the_answer(self):
        html = render(
            board([{**r, "samples_per_answer": 1 + 3 * (r["algorithm"] == "dpo")} for r in three_algorithms()])
        )
        costs = html[html.index("What it cost") :]
        assert ">samples<" in costs and '"unit">per answer<' in costs
        assert '"unit">s per run<' in costs

    def test_notes_stand_below_the_table(self):
        rows = [
            {**r, **({"note": "its KL is <a bound>"} if r["algorithm"] == "dpo" else {})} for r in three_algorithms()
        ]
        assert "dpo: its KL is &lt;a bound&gt;." in render(board(rows))

    def test_cells_sort_by_their_numbers(self):
        found = re.search(r'<table class="sortable"><thead>(.*?)</thead><tbody>(.*?)</tbody>', full(), re.S)
        assert found is not None
        head, body = found.groups()
        titles = re.findall(r'<button type="button">(.*?)[\xa0<]', head)
        assert head.count("aria-sort") == 1
        assert 'aria-sort="descending"><button type="button">reward' in head
        values = [re.findall(r'data-value="(.*?)"', line) for line in body.split("</tr>") if line.strip()]
        assert [len(line) for line in values] == [len(titles)] * 3
        assert [line[titles.index("algorithm")] for line in values] == ["dpo", "ppo", "sft"]
        assert [float(line[titles.index("reward")]) for line in values] == pytest.approx([0.8, 0.79, 0.3])
        assert values[2][titles.index("frontier efficiency")] == ""

    def test_significance_matrix(self):
        html = render(board())
        matrix = html[html.index("row − column") : html.index("What it cost")]
        # dpo and ppo against sft, and back; dpo against ppo is neither
        assert matrix.count('class="win"') == 2 and matrix.count('class="loss"') == 2
        assert "+0.500 ▲" in matrix and "-0.500 ▼" in matrix
        assert re.search(r"\+0\.010<small>", matrix)

    def test_a_lower_difference_wins_where_lower_is_better(self):
        rows = [row(n, s, perplexity=p + s / 100) for n, p in (("a", 4.0), ("b", 9.0)) for s in range(3)]
        html = render(board(rows, sort_by="perplexity"))
        assert "-5.00 ▲" in html and "+5.00 ▼" in html
        assert "a has the lowest perplexity" in html


class TestPlots:
    def test_ticks(self):
        assert plots.ticks(0, 1) == [(pytest.approx(0.2 * i), f"{0.2 * i:.1f}") for i in range(6)]
        assert [text for _, text in plots.ticks(0, 30_000)] == ["0k", "10k", "20k", "30k"]
        assert [text for _, text in plots.ticks(-0.013, 0.012)] == ["-0.010", "-0.005", "0.000", "0.005", "0.010"]

    def test_axes_map_data_to_the_frame(self):
        axes = plots.Axes(0, 10, -1, 1, right=10, left=50, width=460, height=320, top=10, bottom=40)
        assert (axes.x(0), axes.x(5), axes.x(10)) == (50, 250, 450)
        assert (axes.y(1), axes.y(0), axes.y(-1)) == (10, 145, 280)

    def test_the_frontier_is_cut_where_the_plot_ends(self):
        assert plots._cut([(0, 0), (1, 2), (3, 4)], 2) == [(0, 0), (1, 2), (2, 3)]
        assert plots._cut([(0, 0), (1, 2)], 5) == [(0, 0), (1, 2)]

    def test_points_lie_where_they_should(self):
        svg = plots.reward_kl(
            [("a", Estimate(0.0), Estimate(0.0)), ("b", Estimate(2.0), Estimate(1.0))], [[0, 0], [2, 1]]
        )
        marks = re.findall(r'<circle cx="([\d.]+)" cy="([\d.]+)"', svg)
        square = re.search(r'<polygon points="([\d.]+),([\d.]+)', svg)
        curve = re.search(r'class="frontier" d="M([\d.]+) ([\d.]+)L([\d.]+) ([\d.]+)"', svg)
        assert square is not None and curve is not None
        assert marks == [curve.groups()[:2]]  # the first algorithm is the frontier's first point
        assert float(square[1]) + 4 == pytest.approx(float(curve[3]), abs=0.1)
        assert float(square[2]) + 4 == pytest.approx(float(curve[4]), abs=0.1)

    def test_names_do_not_cover_each_other(self):
        points = [(f"algorithm{i}", Estimate(1 + i / 1000), Estimate(0.5)) for i in range(8)]
        svg = plots.reward_kl([*points, ("far", Estimate(2.0), Estimate(1.0))])
        boxes = [(float(x), float(y), len(t) * plots.LETTER) for x, y, t in re.findall(
            r'class="halo" x="([\d.]+)" y="([\d.]+)">([^<]+)<', svg)]  # fmt: skip
        assert len(boxes) == 9
        for i, (x, y, width) in enumerate(boxes):
            for other_x, other_y, other_width in boxes[:i]:
                apart = abs(y - other_y) >= 11.9 or x >= other_x + other_width or other_x >= x + width
                assert apart

    def test_spread_keeps_names_apart_and_within(self):
        found = plots._spread([10, 11, 12, 95, 99], 13, 0, 100)
        assert all(b - a >= 13 for a, b in pairwise(found))
        assert found[0] >= 10 and found[-1] <= 100

    def test_thin_averages_within_bins(self):
        points = [(float(x), float(x % 2)) for x in range(1000)] + [(1000.0, float("nan"))]
        found = plots.thin(points, 0, 1000, bins=10)
        assert [x for x, _ in found] == [50.0 + 100 * i for i in range(10)]
        assert [y for _, y in found] == [0.5] * 10

    def test_mean_curve_only_where_all_seeds_are(self):
        assert plots.mean_curve([[(0, 1.0), (1, 2.0)], [(0, 3.0)]]) == [(0, 2.0)]

    def test_learning_draws_each_seed_and_the_mean(self):
        svg = plots.learning(["sft", "dpo", "ppo"], CURVES["reward"], "reward")
        assert svg.count('class="seed"') == 2  # dpo's; ppo has one seed, which is its mean
        assert svg.count('class="mean"') == 2
        assert '<g class="s1">' in svg and '<g class="s2">' in svg  # the colours of their places on the leaderboard

    def test_twenty_algorithms_are_told_apart(self):
        """By colour and shape together; their curves by colour and dash; and each is named once, beside its marker."""
        names = [f"algorithm_{i}" for i in range(20)]
        svg = plots.learning(names, {n: {0: [(0, 0.1 * i), (9, 0.5)]} for i, n in enumerate(names)}, "reward")
        series = re.findall(r'<g class="(s\d)"><title>(\w+): .*?</title>(.*?)</g>', svg)
        assert [name for _, name, _ in series] == names
        lines = {(colour, re.findall(r'class="mean( \w+)?"', body)[0]) for colour, _, body in series}
        marks = {(colour, shape(body)) for colour, _, body in series}
        assert len(lines) == len(marks) == 20
        keys = re.findall(r'<g class="(s\d)">(<(?:circle|polygon)[^>]*>)</g><text class="halo"[^>]*>(\w+)<', svg)
        assert {name: (colour, shape(body)) for colour, body, name in keys} == {
            name: (colour, shape(body)) for colour, name, body in series
        }
        heights = sorted(float(y) for y in re.findall(r'class="halo" x="[\d.]+" y="([\d.]+)"', svg))
        assert all(b - a >= 12.9 for a, b in pairwise(heights))

    def test_nothing_finite_no_plot(self):
        assert plots.learning(["a"], {"a": {0: [(0, float("nan"))]}}, "reward") == ""
        assert "Learning curves" not in render(board(), curves={"reward": {"dpo": {0: []}}})
