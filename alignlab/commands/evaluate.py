"""measure a saved model:  alignlab evaluate run=DIR benchmark=exact"""

from __future__ import annotations

from collections.abc import Sequence

from alignlab.commands import COMPOSING, parse


def run(arguments: Sequence[str]) -> int:
    """Print what a benchmark measures of a run or a model."""
    config = parse(arguments, *COMPOSING).config("evaluate")
    if config is None:
        return 0
    from alignlab.benchmarks.evaluate import evaluate

    for name, value in evaluate(config).items():
        if isinstance(value, float):
            print(f"{name:<24}{value:12.4f}")
    return 0
