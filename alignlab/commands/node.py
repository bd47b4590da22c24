"""a node of a graph of runs, as a comparison or a sweep starts it; not for people"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path


def run(arguments: Sequence[str]) -> int:
    """Run the node that the first argument, a folder, describes; the others are passed on to it."""
    from alignlab.comparison.graph import work
    from alignlab.core.errors import ConfigError

    if not arguments:
        raise ConfigError("node: name the folder of a part of a comparison")
    return work.run(Path(arguments[0]), list(arguments[1:]))
