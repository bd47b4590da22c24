"""The true reward of a benchmark, as a config names it."""

from __future__ import annotations

from alignlab.core import HasReward, Scorer


def gold(benchmark: HasReward) -> Scorer:
    """The benchmark's own reward: `{_target_: alignlab.comparison.pairs.gold, benchmark: {_target_: …}}`."""
    return benchmark.gold()
