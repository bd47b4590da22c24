"""What metrics are called, their units, which direction is better, and how they are printed."""

from __future__ import annotations

from dataclasses import dataclass
from math import inf

from alignlab.comparison.statistics import Estimate

MISSING = "–"
SCALES = ((1e9, "G"), (1e6, "M"), (1e3, "k"))


@dataclass(frozen=True)
class Metric:
    """How a metric is read.

    Attributes:
        title: the column's heading.
        short: the same where there is little room, unit included.
        unit: printed after the title in brackets; empty for a pure number.
        better: +1 where higher is better, -1 where lower is, 0 where neither is.
        cost: something paid (KL, time, tokens, memory). Its lowest value is no achievement, so it is not set in bold.
        low, high: bounds that it cannot leave; its interval is cut there.
        hidden: kept in the files but no column of a table: it is the same for all algorithms.
        decimals: places printed; None for three significant digits with k, M or G.
    """

    title: str
    short: str = ""
    unit: str = ""
    better: int = 1
    cost: bool = False
    low: float = -inf
    high: float = inf
    hidden: bool = False
    decimals: int | None = 3

    @property
    def heading(self) -> str:
        """Title, unit and the arrow of the better direction: `KL to reference (nats/response) ↓`."""
        unit = f" ({self.unit})" if self.unit else ""
        return self.title + unit + {1: " ↑", -1: " ↓", 0: ""}[self.better]


METRICS: dict[str, Metric] = {
    "objective_score": Metric("objective score", "obj. score", "1 = optimum", high=1),
    "frontier_efficiency": Metric("frontier efficiency", "frontier", "1 = optimum", high=1),
    "reward": Metric("reward", "reward"),
    "kl": Metric("KL to reference", "KL nats", "nats/response", better=-1, cost=True, low=0, decimals=2),
    "win_rate": Metric("win rate", "win rate", "vs SFT", low=0, high=1),
    "objective": Metric("objective", "objective J", "reward − β·KL"),
    "proxy_reward": Metric("proxy reward", "proxy", better=0),
    "accuracy": Metric("accuracy", "accuracy", low=0, high=1),
    "perplexity": Metric("perplexity", "perplexity", better=-1, low=1, decimals=2),
    "distinct_1": Metric("distinct-1", "distinct-1", low=0, high=1),
    "distinct_2": Metric("distinct-2", "distinct-2", low=0, high=1),
    "entropy": Metric("entropy", "entropy nats", "nats/response", better=0, low=0, decimals=2),
    "response_length": Metric("length", "length", "tokens/response", better=0, low=0, decimals=1),
    "finished": Metric("finished", "finished", "share that ended by itself", better=0, low=0, high=1),
    "samples_per_answer": Metric("samples", "samples", "per answer", better=-1, cost=True, low=1, decimals=0),
    "seconds": Metric("time", "time s", "s", better=-1, cost=True, low=0, decimals=None),
    "generated_tokens": Metric("generated", "gen. tokens", "tokens", better=-1, cost=True, low=0, decimals=None),
    "trained_tokens": Metric("trained on", "train tokens", "tokens", better=-1, cost=True, low=0, decimals=None),
    "peak_memory_mb": Metric("peak memory", "memory MB", "MB", better=-1, cost=True, low=0, decimals=0),
    "ratio": Metric("probability ratio to the sampling policy", better=0),
    "clip_fraction": Metric("clipped ratios", "clipped", "share", better=0, low=0, high=1),
    "explained_variance": Metric("explained variance of the value head", "expl. variance", better=0, high=1),
    "reference_reward": Metric("reference's reward", better=0, hidden=True),
    "reference_entropy": Metric("reference's entropy", unit="nats/response", better=0, hidden=True),
    "optimum_reward": Metric("optimum's reward", better=0, hidden=True),
    "optimum_kl": Metric("optimum's KL", unit="nats/response", better=0, hidden=True),
}
"""Known metrics, in the order of their columns."""


def metric(name: str) -> Metric:
    """The known metric, or one with a readable title of which nothing else is known."""
    title = name.replace("_", " ")
    return METRICS.get(name) or Metric(title, title, better=0, decimals=None)


def ordered(names: set[str]) -> list[str]:
    """Known quality metrics in their usual order, then unknown ones by name, then costs and constants."""
    known = [name for name in METRICS if name in names]
    quality = [name for name in known if name == "kl" or not (METRICS[name].cost or METRICS[name].hidden)]
    return quality + sorted(names - METRICS.keys()) + [name for name in known if name not in quality]


def format_number(value: float | None, decimals: int | None, like: float | None = None) -> str:
    """A number as in a table: fixed decimals, or three significant digits (`0.0123`, `83.1`, `12.3M`).

    `like` is another number whose scale and places are to be used: an interval's bounds are printed like its mean.
    """
    if value is None:
        return MISSING
    if decimals is not None:
        return f"{value:.{decimals}f}"
    size = abs(value if like is None else like)
    factor, suffix = next((pair for pair in SCALES if size >= 0.9995 * pair[0]), (1.0, ""))
    if size == 0:
        return f"{value:.3g}"
    return f"{value / factor:.{_places(size / factor)}f}{suffix}"


def format_interval(estimate: Estimate, decimals: int | None) -> str:
    """`±0.012`, or `[0.94,0.97]` where it is lopsided, or nothing where there is none or it has no width.

    No spaces inside, so that a narrow table breaks the line between the mean and the interval only.
    """
    mean, low, high = estimate.mean, estimate.low, estimate.high
    if low is None or high is None or low == high:
        return ""
    half = max(mean - low, high - mean)
    if min(mean - low, high - mean) >= 0.9 * half:
        return f"±{format_number(half, decimals, mean)}"
    return f"[{format_number(low, decimals, mean)},{format_number(high, decimals, mean)}]"


def _places(size: float) -> int:
    """Decimals that give a positive number below 1000 three significant digits; at most 6."""
    places = 0
    while size < 99.95 and places < 6:
        size *= 10
        places += 1
    return places
