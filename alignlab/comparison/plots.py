"""The report's plots as inline SVG: nothing to load, text stays text, colours follow the light or dark theme.

Colours are classes (`s0` … `s6`, defined in report.css); a marker's shape and the name beside it say the same thing to
those who cannot tell the colours apart. Every plot carries a text of what it shows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from itertools import pairwise
from math import floor, isfinite, log10

from alignlab.comparison.metrics import format_number
from alignlab.comparison.statistics import Estimate

Point = tuple[float, float]

COLOURS = 7
SHAPES = 6  # prime to COLOURS: 42 combinations
DASHES = ("", " dashed", " dotted")  # of lines, whose first COLOURS are solid
SHAPE_OUTLINES: Sequence[Sequence[tuple[float, float]]] = (
    ((-4, -4), (4, -4), (4, 4), (-4, 4)),
    ((0, -5.5), (5, 4), (-5, 4)),
    ((0, -6), (5, 0), (0, 6), (-5, 0)),
    ((0, 5.5), (5, -4), (-5, -4)),
    ((-4, -5.5), (0, -1.5), (4, -5.5), (5.5, -4), (1.5, 0), (5.5, 4),
     (4, 5.5), (0, 1.5), (-4, 5.5), (-5.5, 4), (-1.5, 0), (-5.5, -4)),
)  # fmt: skip
LETTER = 6.2
"""Width of a letter at the plots' font size, roughly, in SVG units."""


@dataclass(frozen=True)
class Axes:
    """A rectangle of data in a rectangle of SVG units."""

    x_low: float
    x_high: float
    y_low: float
    y_high: float
    right: float = 12  # margin, which holds the names of curves
    left: float = 52
    width: float = 460
    height: float = 320
    top: float = 10
    bottom: float = 42
    x_ticks: Sequence[tuple[float, str]] | None = None  # values and texts; round numbers by default

    def x(self, value: float) -> float:
        return self.left + (value - self.x_low) / (self.x_high - self.x_low) * (self.width - self.left - self.right)

    def y(self, value: float) -> float:
        return self.top + (self.y_high - value) / (self.y_high - self.y_low) * (self.height - self.top - self.bottom)

    def frame(self, x_label: str, y_label: str, horizontal: bool = True) -> str:
        """Grid, tick labels and axis labels."""
        parts, base = [], self.height - self.bottom
        for value, text in ticks(self.x_low, self.x_high) if self.x_ticks is None else self.x_ticks:
            x = self.x(value)
            parts.append(f'<line class="grid" x1="{x:.1f}" x2="{x:.1f}" y1="{self.top}" y2="{base}"/>')
            parts.append(f'<text class="tick" x="{x:.1f}" y="{base + 15}" text-anchor="middle">{escape(text)}</text>')
        for value, text in ticks(self.y_low, self.y_high) if horizontal else ():
            y = self.y(value)
            parts.append(
                f'<line class="grid" x1="{self.left}" x2="{self.width - self.right}" y1="{y:.1f}" y2="{y:.1f}"/>'
            )
            parts.append(f'<text class="tick" x="{self.left - 6}" y="{y + 4:.1f}" text-anchor="end">{text}</text>')
        middle = (self.left + self.width - self.right) / 2
        parts.append(f'<text x="{middle:.1f}" y="{self.height - 8}" text-anchor="middle">{escape(x_label)}</text>')
        if y_label:
            y = (self.top + base) / 2
            parts.append(
                f'<text transform="translate(13 {y:.1f}) rotate(-90)" text-anchor="middle">{escape(y_label)}</text>'
            )
        return "".join(parts)


def ticks(low: float, high: float, count: int = 5) -> list[tuple[float, str]]:
    """Round values within [low, high], about `count` of them, and their texts."""
    rough = (high - low) / count
    power = 10.0 ** floor(log10(rough))
    step = next(power * m for m in (1, 2, 5, 10) if power * m >= rough * 0.999)
    first = -floor(-low / step + 1e-9)
    values = [i * step for i in range(first, floor(high / step + 1e-9) + 1)]
    factor, suffix = (
        (1e6, "M") if step >= 1e5 and high >= 1e6 else (1e3, "k") if step >= 1e2 and high >= 1e4 else (1.0, "")
    )
    decimals = max(0, -floor(log10(step / factor) + 1e-9))
    return [(value, f"{value / factor:.{decimals}f}{suffix}") for value in values]


def intervals(names: Sequence[str], estimates: Sequence[Estimate | None], title: str, decimals: int | None) -> str:
    """A row per algorithm: its mean and 95 % interval."""
    rows = [(i, name, found) for i, (name, found) in enumerate(zip(names, estimates, strict=True)) if found is not None]
    low, high = _range(bound for _, _, e in rows for bound in (e.mean, e.low, e.high))
    left = 18 + LETTER * max(len(_clip(name)) for _, name, _ in rows)
    axes = Axes(low, high, 0, len(rows), left=left, height=54 + 26 * len(rows), right=16)
    parts = [axes.frame(title, "", horizontal=False)]
    for position, (index, name, found) in enumerate(rows):
        y = axes.y(len(rows) - position - 0.5)
        parts.append(f'<text x="{axes.left - 10:.1f}" y="{y + 4:.1f}" text-anchor="end">{escape(_clip(name))}</text>')
        x = axes.x(found.mean)
        mark = f'<line class="mark" x1="{x:.1f}" x2="{x:.1f}" y1="{y - 8:.1f}" y2="{y + 8:.1f}"/>'
        bar = _bar(axes.x, found, y, across=True, kind="band")
        parts.append(_series(index, bar + mark, _told(name, title, found, decimals)))
    told = "; ".join(_told(name, title, found, decimals) for _, name, found in rows)
    return svg(axes, parts, f"{title} with 95 % intervals. {told}")


def reward_kl(
    points: Sequence[tuple[str, Estimate | None, Estimate | None]], frontier: Sequence[Sequence[float]] | None = None
) -> str:
    """Reward against KL, with intervals in both, and the frontier R*(KL) where there is one.

    Args:
        points: (algorithm, KL, reward); one that lacks either is not drawn.
        frontier: `[[kl, reward], …]`, KL ascending: the highest reward that can be reached at that KL.
    """
    drawn = [(i, name, kl, reward) for i, (name, kl, reward) in enumerate(points) if kl and reward]
    curve = [(float(kl), float(reward)) for kl, reward in frontier or ()]
    _, x_high = _range([0.0, *(bound for _, _, kl, _ in drawn for bound in (kl.mean, kl.high))])
    x_low = min([0.0, *(kl.mean for _, _, kl, _ in drawn)])
    curve = _cut(curve, x_high)
    y_low, y_high = _range([*(b for _, _, _, r in drawn for b in (r.mean, r.low, r.high)), *(y for _, y in curve)])
    axes = Axes(x_low - 0.02 * (x_high - x_low), x_high, y_low, y_high)
    parts = [axes.frame("KL to reference (nats/response)", "reward")]
    if curve:
        path = _path(axes, curve)
        parts.append(f'<path class="frontier" d="{path}"><title>R*(KL), the highest reward at each KL</title></path>')
    taken = [(axes.x(kl.mean) - 6, axes.y(r.mean) - 6, 12.0, 12.0) for _, _, kl, r in drawn]
    labels = []
    for index, name, kl, reward in drawn:
        x, y = axes.x(kl.mean), axes.y(reward.mean)
        bars = _bar(axes.x, kl, y, across=True) + _bar(axes.y, reward, x, across=False)
        told = f"{_told(name, 'reward', reward, 3)}; {_told(name, 'KL', kl, 2)}"
        parts.append(_series(index, bars + _marker(index, x, y), told))
        labels.append(_label(axes, _clip(name), x, y, taken))
    if curve:
        labels.append(_label(axes, "frontier R*(KL)", axes.x(curve[-1][0]), axes.y(curve[-1][1]), taken, leader=False))
    told = "; ".join(f"{n}: KL {kl.mean:.2f}, reward {r.mean:.3f}" for _, n, kl, r in drawn)
    with_curve = " The dashed curve is the highest reward reachable at each KL." if curve else ""
    return svg(axes, parts + labels, f"Reward against KL to the reference with 95 % intervals.{with_curve} {told}")


def learning(names: Sequence[str], curves: Mapping[str, Mapping[int, Sequence[Point]]], title: str) -> str:
    """One metric over training: a thin line per seed, and their mean as a thick one with the algorithm's name.

    `names` fixes the order of colours; nothing is drawn, and the text is empty, where no value is finite.
    """
    every = [point for seeds in curves.values() for points in seeds.values() for point in points if isfinite(point[1])]
    if not every:
        return ""
    x_low, x_high = min(x for x, _ in every), max(x for x, _ in every)
    thinned = {
        name: [thin(points, x_low, x_high) for points in curves[name].values()] for name in names if name in curves
    }
    y_low, y_high = _range(y for lines in thinned.values() for line in lines for _, y in line)
    right = 32 + LETTER * max(len(_clip(name)) for name in thinned)
    axes = Axes(x_low, x_high if x_high > x_low else x_low + 1, y_low, y_high, right=right)
    parts, ends = [axes.frame("step", title)], []
    for index, name in enumerate(names):
        if not any(thinned.get(name, ())):
            continue
        lines = [line for line in thinned[name] if line]
        mean = mean_curve(lines)
        seeds = "".join(f'<path class="seed" d="{_path(axes, line)}"/>' for line in lines) if len(lines) > 1 else ""
        dash = DASHES[index // COLOURS % len(DASHES)]
        body = seeds + (f'<path class="mean{dash}" d="{_path(axes, mean)}"/>' if mean else "")
        x, y = (mean or max(lines, key=len))[-1]
        parts.append(
            _series(index, body + _marker(index, axes.x(x), axes.y(y)), f"{name}: {title} {y:.4g} at step {x:g}")
        )
        ends.append((axes.y(y), axes.x(x), name, index))
    ends.sort()
    for (y, x, name, index), at in zip(
        ends, _spread([e[0] for e in ends], 13, axes.top, axes.height - axes.bottom), strict=True
    ):
        start = axes.width - axes.right + 9
        if abs(at - y) > 3 or x < start - 12:
            parts.append(f'<line class="leader" x1="{x + 4:.1f}" y1="{y:.1f}" x2="{start - 1:.1f}" y2="{at:.1f}"/>')
        parts.append(f'<g class="s{index % COLOURS}">{_marker(index, start + 6, at)}</g>')  # where curves meet
        parts.append(f'<text class="halo" x="{start + 14:.1f}" y="{at + 4:.1f}">{escape(_clip(name))}</text>')
    told = f"over training, {len(thinned)} algorithms, steps {x_low:g} to {x_high:g}"
    return svg(axes, parts, f"{title} {told}")


def thin(points: Sequence[Point], low: float, high: float, bins: int = 80) -> list[Point]:
    """Average points within equal bins of [low, high]: what a plot can show, and a mild smoothing of long runs.

    A point's x becomes its bin's middle, so that curves thinned over the same range can be averaged with each other.
    Values that are not finite are left out.
    """
    sums: dict[int, tuple[float, int]] = {}
    for x, y in points:
        if isfinite(y):
            index = min(bins - 1, int((x - low) / (high - low) * bins)) if high > low else 0
            total, count = sums.get(index, (0.0, 0))
            sums[index] = (total + y, count + 1)
    width = (high - low) / bins
    return [(low + (index + 0.5) * width, total / count) for index, (total, count) in sorted(sums.items())]


def mean_curve(curves: Sequence[Sequence[Point]]) -> list[Point]:
    """The mean over curves at each x that all of them have."""
    at: dict[float, list[float]] = {}
    for curve in curves:
        for x, y in curve:
            at.setdefault(x, []).append(y)
    return [(x, sum(ys) / len(ys)) for x, ys in sorted(at.items()) if len(ys) == len(curves)]


def _clip(name: str) -> str:
    """The name, shortened where it would take more than a third of a plot."""
    return name if len(name) <= 24 else name[:23] + "…"


def _range(values: Iterable[float | None]) -> tuple[float, float]:
    """The values' range with some air, never empty."""
    known = [value for value in values if value is not None and isfinite(value)] or [0.0, 1.0]
    low, high = min(known), max(known)
    air = 0.06 * (high - low) or 0.1 * abs(high) or 0.5
    return low - air, high + air


def _cut(curve: list[Point], x_high: float) -> list[Point]:
    """The curve up to x_high, where it is interpolated."""
    for i, ((x0, y0), (x1, y1)) in enumerate(pairwise(curve)):
        if x1 > x_high:
            return [*curve[: i + 1], (x_high, y0 + (y1 - y0) * (x_high - x0) / (x1 - x0))] if x0 < x_high else curve[:1]
    return curve


def _path(axes: Axes, points: Sequence[Point]) -> str:
    return "M" + "L".join(f"{axes.x(x):.1f} {axes.y(y):.1f}" for x, y in points)


def _series(index: int, body: str, told: str) -> str:
    return f'<g class="s{index % COLOURS}"><title>{escape(told)}</title>{body}</g>'


def _bar(scale: Callable[[float], float], found: Estimate, at: float, across: bool, kind: str = "bar") -> str:
    """The interval as a line, along x (`across`) or along y."""
    if found.low is None or found.high is None:
        return ""
    a, b = scale(found.low), scale(found.high)
    ends = (a, b, at, at) if across else (at, at, a, b)
    return '<line class="{}" x1="{:.1f}" x2="{:.1f}" y1="{:.1f}" y2="{:.1f}"/>'.format(kind, *ends)


def _marker(index: int, x: float, y: float) -> str:
    """Circle, square, triangle up, diamond, triangle down or cross, of about the same area."""
    shape = index % SHAPES
    if shape == 0:
        return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4.5"/>'
    outline = SHAPE_OUTLINES[shape - 1]
    return f'<polygon points="{" ".join(f"{x + dx:.1f},{y + dy:.1f}" for dx, dy in outline)}"/>'


def _label(
    axes: Axes, text: str, x: float, y: float, taken: list[tuple[float, float, float, float]], leader: bool = True
) -> str:
    """A name near its point, where it covers neither another name nor a marker; adds its box to `taken`."""
    width, height = LETTER * len(text), 12.0

    def free(box: tuple[float, float, float, float]) -> bool:
        inside = (
            box[0] >= axes.left
            and box[0] + box[2] <= axes.width
            and axes.top - 4 <= box[1] <= axes.height - axes.bottom - 12
        )
        return inside and not any(
            box[0] < b[0] + b[2] and b[0] < box[0] + box[2] and box[1] < b[1] + b[3] and b[1] < box[1] + box[3]
            for b in taken
        )

    shifts = sorted(range(-90, 91, 6), key=lambda s: (abs(s), s))
    boxes = [(bx, y - 6 + dy, width, height) for dy in shifts for bx in (x + 9, x - 9 - width)]
    box = next(filter(free, boxes), boxes[0])
    taken.append(box)
    near = box[0] - 2 if box[0] > x else box[0] + width + 2
    line = f'<line class="leader" x1="{x:.1f}" y1="{y:.1f}" x2="{near:.1f}" y2="{box[1] + 6:.1f}"/>'
    moved = leader and abs(box[1] + 6 - y) > 7
    return (line if moved else "") + f'<text class="halo" x="{box[0]:.1f}" y="{box[1] + 10:.1f}">{escape(text)}</text>'


def _spread(positions: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """Ascending positions moved apart to at least `gap`, within [low, high] as far as there is room."""
    placed: list[float] = []
    for position in positions:
        placed.append(max(position, placed[-1] + gap) if placed else max(position, low))
    limit = high
    for i in range(len(placed) - 1, -1, -1):
        placed[i] = min(placed[i], limit)
        limit = placed[i] - gap
    return placed


def _told(name: str, title: str, found: Estimate, decimals: int | None) -> str:
    """`dpo: reward 0.745 (0.731 to 0.760)`."""
    mean, low, high = (format_number(value, decimals, found.mean) for value in (found.mean, found.low, found.high))
    interval = "" if found.low is None or found.low == found.high else f" ({low} to {high})"
    return f"{name}: {title} {mean}{interval}"


def svg(axes: Axes, parts: Sequence[str], told: str) -> str:
    """The plot; `told` is its text for those who do not see it."""
    box = f"0 0 {axes.width:g} {axes.height:g}"
    return f'<svg viewBox="{box}" role="img" aria-label="{escape(told, quote=True)}">{"".join(parts)}</svg>'
