"""Plots by matplotlib: SVG for the page, PDF and PNG files for papers.

An algorithm has the same colour and marker in every plot, by its place on the leaderboard; the marker says the same as
the colour to those who cannot tell colours apart. Every plot has a text of what it shows.

matplotlib is imported when the first plot is drawn, since that takes a second.
"""

from __future__ import annotations

import io
import re
from base64 import b64encode
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from alignlab.comparison.report.metrics import Metric, format_number, metric
from alignlab.comparison.statistics import Estimate

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Array = NDArray[np.float64]
Point = tuple[float, float]
Curves = Mapping[str, Mapping[int, Sequence[Point]]]
"""One metric over training: algorithm → seed → [(step, value), …]."""

COLOURS = ("#0072b2", "#d55e00", "#007f5f", "#b5478c", "#a87400", "#3f9ad0", "#555d66")
MARKERS = ("o", "s", "^", "D", "v", "X")  # one fewer than colours: 42 pairs differ
DASHES = ("-", "--", ":")  # the first 7 lines are solid, the next 7 dashed
INK, MUTED, LINE, PAPER = "#1c2127", "#59636e", "#d8dde2", "#ffffff"

STYLE: dict[str, Any] = {
    "svg.fonttype": "none",  # text, not outlines
    "savefig.facecolor": PAPER,
    "svg.hashsalt": "alignlab",  # the same plot is the same file
    "pdf.fonttype": 42,  # TrueType, as publishers ask
    "text.parse_math": False,  # a name may hold a dollar sign
    "font.size": 9,
    "axes.titlesize": 9,
    "axes.titlelocation": "left",
    "axes.labelcolor": INK,
    "axes.edgecolor": LINE,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.grid": True,
    "axes.formatter.useoffset": False,
    "grid.color": LINE,
    "grid.linewidth": 0.6,
    "legend.frameon": False,
    "legend.fontsize": 8.5,
    "lines.markersize": 5,
    "lines.markeredgecolor": PAPER,
    "lines.markeredgewidth": 0.6,
    "text.color": INK,
    "xtick.color": LINE,
    "ytick.color": LINE,
    "xtick.labelcolor": MUTED,
    "ytick.labelcolor": MUTED,
}
SIZE, SMALL = (4.4, 3.1), (2.7, 1.9)
"""Width and height in inches."""

LOGARITHMIC = ("grad_norm",)
"""Metrics of training on a logarithmic axis: they differ by orders of magnitude between algorithms."""
BINS = 80
"""Points of a curve: what a plot can show."""


@dataclass(frozen=True)
class Plot:
    """A drawn plot.

    Attributes:
        name: of its files, without ending.
        alt: what it shows, for those who do not see it.
        caption: a sentence below it; may be empty.
    """

    name: str
    figure: Figure
    alt: str
    caption: str = ""

    @property
    def svg(self) -> str:
        """The plot as an SVG document; the same plot gives the same text."""
        return self._saved("svg", metadata=dict.fromkeys(("Creator", "Date", "Format", "Type"))).decode()

    @property
    def source(self) -> str:
        """The plot as the `src` of an image, so that a page needs no other file."""
        return f"data:image/svg+xml;base64,{b64encode(self.svg.encode()).decode()}"

    def write(self, folder: Path) -> list[Path]:
        """Write `NAME.pdf` and `NAME.png` into a folder; their paths."""
        dates: dict[str, dict[str, Any]] = {"pdf": {"CreationDate": None}, "png": {"Software": None}}
        paths = [folder / f"{self.name}.{kind}" for kind in dates]
        for path, (kind, metadata) in zip(paths, dates.items(), strict=True):
            path.write_bytes(self._saved(kind, dpi=200, metadata=metadata))
        return paths

    def _saved(self, kind: str, **options: Any) -> bytes:
        file = io.BytesIO()
        with style():
            self.figure.savefig(file, format=kind, **options)
        return file.getvalue()


@contextmanager
def style() -> Iterator[None]:
    """Our settings of matplotlib, and none of the user's; afterwards all is as it was."""
    from matplotlib import style as styles

    with styles.context(STYLE, after_reset=True):
        yield


def axes(size: tuple[float, float] = SIZE) -> tuple[Figure, Axes]:
    """An empty plot. To be called, and drawn into, within `style()`."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained")
    return figure, figure.subplots()


def logarithmic(ax: Axes, axis: Literal["x", "y"]) -> None:
    """Make an axis logarithmic, with plain numbers beside it, in between too where there are few decades."""
    from matplotlib.ticker import FuncFormatter

    (ax.set_xscale if axis == "x" else ax.set_yscale)("log")
    one = ax.xaxis if axis == "x" else ax.yaxis

    def between(value: float, _: object) -> str:
        few = np.ptp(np.log10(one.get_view_interval())) < 3
        return f"{value:g}" if few and f"{value:.0e}"[0] in "25" else ""

    one.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    one.set_minor_formatter(FuncFormatter(between))


def write_plots(folder: Path, plots: Sequence[Plot]) -> None:
    """Write the files of plots into a folder, and remove those of plots that are no longer made."""
    folder.mkdir(parents=True, exist_ok=True)
    written = {path for plot in plots for path in plot.write(folder)}
    for path in folder.iterdir():
        if path.suffix in (".pdf", ".png") and path not in written:
            path.unlink()


def intervals(names: Sequence[str], estimates: Sequence[Estimate | None], known: Metric) -> Plot:
    """A row for each algorithm that has the metric: its mean and 95 % interval."""
    rows = [(i, name, found) for i, (name, found) in enumerate(zip(names, estimates, strict=True)) if found is not None]
    every = [found for _, _, found in rows]
    with style():
        figure, ax = axes((SIZE[0], 0.8 + 0.27 * len(rows)))
        for place, (i, _, found) in enumerate(rows):
            low, high = (found.mean if bound is None else bound for bound in (found.low, found.high))
            ax.hlines(place, low, high, colors=colour(i), linewidth=9, alpha=0.35)
            ax.plot(found.mean, place, "|", color=colour(i), ms=12, mew=2.2, mec=colour(i), gid=f"row{i}")
        ax.set_yticks(range(len(rows)), [clip(name) for _, name, _ in rows])
        ax.tick_params(axis="y", labelcolor=INK, length=0)
        ax.set(xlabel=known.title, ylim=(len(rows) - 0.4, -0.6), xlim=limits(every))
        ax.grid(visible=False, axis="y")
    texts = [told(name, known.title, found, known.decimals) for _, name, found in rows]
    alt = f"{known.title} with 95 % intervals. {'; '.join(texts)}"
    caption = f"{capital(known.title)}: mean and 95 % interval.{cut_note(every, ax.get_xlim())}"
    return Plot("ranking", figure, alt, caption)


def reward_kl(
    points: Sequence[tuple[str, Estimate | None, Estimate | None]], frontier: Sequence[Sequence[float]] | None = None
) -> Plot:
    """Reward against KL, with intervals in both, and the frontier R*(KL) where there is one.

    Args:
        points: (algorithm, KL, reward); one that lacks either is not drawn.
        frontier: `[[kl, reward], …]`, KL ascending: the highest reward that can be reached at that KL.
    """
    drawn = [(i, name, kl, reward) for i, (name, kl, reward) in enumerate(points) if kl and reward]
    kls, rewards = [kl for _, _, kl, _ in drawn], [reward for *_, reward in drawn]
    x_low, x_high = limits([Estimate(0.0), *kls])
    curve_C2 = np.array(frontier or np.empty((0, 2)), dtype=np.float64)
    kl_C = np.unique(np.clip(np.append(curve_C2[:, 0], x_high), None, x_high))  # cut where the plot ends
    with style():
        figure, ax = axes()
        handles = []
        for i, _, kl, reward in drawn:
            bars: dict[str, Any] = {"xerr": _errors(kl), "yerr": _errors(reward)}
            ax.errorbar(kl.mean, reward.mean, **bars, fmt="none", ecolor=colour(i), elinewidth=1, alpha=0.7)
            handles += ax.plot(kl.mean, reward.mean, MARKERS[i % len(MARKERS)], color=colour(i), gid=f"p{i}", zorder=3)
        labels = [name for _, name, _, _ in drawn]
        tops = []
        if len(curve_C2):
            kl_C = kl_C[kl_C <= curve_C2[-1, 0]]
            reward_C = np.interp(kl_C, *curve_C2.T)
            tops = [Estimate(float(reward)) for reward in reward_C]
            handles += ax.plot(kl_C, reward_C, "--", color=INK, linewidth=1.2, gid="frontier", zorder=1.5)
            labels.append("frontier R*(KL)")
        ax.set(xlabel="KL to reference (nats/response)", ylabel="reward", xlim=(x_low, x_high))
        ax.set_ylim(limits([*rewards, *tops]))
        legend(figure, handles, labels)
    alt = "Reward against KL to the reference with 95 % intervals."
    alt += " The dashed curve is the highest reward reachable at each KL. " if tops else " "
    alt += "; ".join(f"{name}: KL {kl.mean:.2f}, reward {reward.mean:.3f}" for _, name, kl, reward in drawn)
    caption = "Reward against the KL paid for it, both with 95 % intervals."
    caption += " Dashed: the highest reward that can be reached at each KL." if tops else ""
    caption += cut_note(kls, ax.get_xlim()) or cut_note(rewards, ax.get_ylim())
    return Plot("reward-kl", figure, alt, caption)


def learning(name: str, names: Sequence[str], curves: Curves, size: tuple[float, float] = SIZE) -> Plot:
    """A metric over training: a thin line for each seed, and their mean as a thick one.

    Args:
        name: of the metric.
        names: all algorithms, in the order of their colours; those without curves are left out.
        curves: algorithm → seed → points. Values that are not finite are left out; some must be.
        size: of the plot; one of a single algorithm bears its name, others have a legend.
    """
    title, every = metric(name).title, finite(curves)
    x_low, x_high = min(x for x, _ in every), max(x for x, _ in every)
    handles, labels = [], []
    with style():
        figure, ax = axes(size)
        for i, algorithm in enumerate(names):
            lines = [thin(points, x_low, x_high) for points in curves.get(algorithm, {}).values()]
            lines = [line for line in lines if np.isfinite(line[1]).any()]
            if not lines:
                continue
            for x_B, y_B in lines if len(lines) > 1 else ():
                ax.plot(*drawable(x_B, y_B), color=colour(i), linewidth=0.7, alpha=0.35, gid=f"seed{i}")
            x_B, y_B = drawable(lines[0][0], np.mean([y for _, y in lines], axis=0))  # where all seeds have a value
            look: dict[str, Any] = {"color": colour(i), "ls": DASHES[i // len(COLOURS) % len(DASHES)], "lw": 1.6}
            handles += ax.plot(x_B, y_B, marker=MARKERS[i % len(MARKERS)], markevery=[-1], gid=f"mean{i}", **look)
            labels.append(algorithm)
        if name in LOGARITHMIC:
            logarithmic(ax, "y")
        ax.set_xlabel("step")
        if size == SMALL:
            ax.set_title(", ".join(map(clip, labels)), color=INK)
        else:
            ax.set_title(title, color=INK)
            legend(figure, handles, labels)
    alt = f"{title} over training, {', '.join(labels)}, steps {x_low:g} to {x_high:g}"
    file = "-".join([name, *labels]) if size == SMALL else name
    return Plot(re.sub(r"[^\w.]+", "-", file), figure, alt)


def finite(curves: Curves) -> list[Point]:
    """The points of all curves whose value is finite."""
    return [point for seeds in curves.values() for points in seeds.values() for point in points if isfinite(point[1])]


def thin(points: Sequence[Point], low: float, high: float, bins: int = BINS) -> tuple[Array, Array]:
    """Points averaged within equal bins of [low, high], a mild smoothing of long runs: x and y, each of shape (bins,).

    A bin's x is its middle, so that curves thinned over the same range can be averaged with each other; its y is NaN
    where no value in it is finite.
    """
    from scipy.stats import binned_statistic

    found = np.array([point for point in points if isfinite(point[1])], dtype=np.float64).reshape(-1, 2)
    high = high if high > low else low + 1
    if not len(found):
        return np.full(bins, np.nan), np.full(bins, np.nan)
    y_B, edges, _ = binned_statistic(found[:, 0], found[:, 1], bins=bins, range=(low, high))
    return (edges[:-1] + edges[1:]) / 2, np.asarray(y_B, dtype=np.float64)


def drawable(x_B: Array, y_B: Array) -> tuple[Array, Array]:
    """The points that have a y: a line then joins those beside a gap."""
    known = np.isfinite(y_B)
    return x_B[known], y_B[known]


def limits(estimates: Sequence[Estimate]) -> tuple[float, float]:
    """An axis that holds all means, and of their intervals as much as leaves the means a fair share of the room.

    A single wide interval would else set the scale: none reaches further beyond the means than these are apart.
    """
    means = [found.mean for found in estimates]
    low, high = min(means), max(means)
    apart = (high - low) or 0.1 * abs(high) or 0.5
    low = max(low - apart, min([low, *(found.low for found in estimates if found.low is not None)]))
    high = min(high + apart, max([high, *(found.high for found in estimates if found.high is not None)]))
    air = 0.06 * (high - low) or apart
    return low - air, high + air


def cut_note(estimates: Sequence[Estimate], shown: tuple[float, float]) -> str:
    """What to say where an interval reaches beyond what is shown."""
    bounds = [bound for found in estimates for bound in (found.low, found.high) if bound is not None]
    beyond = any(not shown[0] <= bound <= shown[1] for bound in bounds)
    return " An interval that reaches beyond the plot is cut at its edge." if beyond else ""


def legend(figure: Figure, handles: Sequence[Any], labels: Sequence[str]) -> None:
    """A legend below the plot, which becomes higher by it."""
    texts = [clip(text) for text in labels]
    columns = 3 if max(map(len, texts), default=0) <= 20 else 2
    figure.set_figheight(figure.get_figheight() + 0.17 * -(-len(texts) // columns))
    figure.legend(handles, texts, loc="outside lower center", ncols=columns, columnspacing=1.2, handlelength=1.6)


def colour(index: int) -> str:
    return COLOURS[index % len(COLOURS)]


def _errors(found: Estimate) -> list[list[float]] | None:
    """The lengths of an interval's two parts, as matplotlib wants them."""
    if found.low is None or found.high is None:
        return None
    return [[found.mean - found.low], [found.high - found.mean]]


def clip(name: str) -> str:
    """The name, shortened where it would take more than a third of a plot; never one that matplotlib would hide."""
    text = name if len(name) <= 24 else name[:23] + "…"
    return f"\N{WORD JOINER}{text}" if text.startswith("_") else text


def told(name: str, title: str, found: Estimate, decimals: int | None) -> str:
    """`dpo: reward 0.745 (0.731 to 0.760)`."""
    mean, low, high = (format_number(value, decimals, found.mean) for value in (found.mean, found.low, found.high))
    interval = "" if found.low is None or found.low == found.high else f" ({low} to {high})"
    return f"{name}: {title} {mean}{interval}"


def capital(text: str) -> str:
    return text[:1].upper() + text[1:]
