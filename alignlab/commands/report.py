"""leaderboard and report from runs on disk:  alignlab report DIR"""

from __future__ import annotations

from collections.abc import Sequence

from alignlab.commands import kind_of, parse


def run(arguments: Sequence[str]) -> int:
    """Build the pages of each folder anew: of a comparison, or of a sweep."""
    from alignlab.core.errors import ConfigError

    given = parse(arguments)
    if not given.folders:
        raise ConfigError("report: name the folder of a comparison, or several: alignlab report DIR...")
    from alignlab.comparison import collect
    from alignlab.sweeps import results

    for folder in given.folders:
        if kind_of(folder) == "training run":
            raise ConfigError(
                f"{folder}: a training run, which has no leaderboard: see its metrics.jsonl and result.json, measure "
                f"it with alignlab evaluate run={folder} benchmark=NAME, or compare several with alignlab compare"
            )
        (results if (folder / results.FILE).exists() else collect).rebuild(folder)
    return 0
