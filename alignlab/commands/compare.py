"""many algorithms under one budget:  alignlab compare experiment=demo"""

from __future__ import annotations

from collections.abc import Sequence

from alignlab.commands import COMPOSING, out_folder, parse


def run(arguments: Sequence[str]) -> int:
    """Run a comparison, or with --multirun every combination; the exit status is 1 where a part of it failed."""
    given = parse(arguments, *COMPOSING, "--multirun")
    if "--multirun" in given.options:
        return given.sweep("compare")
    from alignlab.sweeps.settings import refuse

    refuse(given.overrides)
    config = given.config("compare")
    if config is None:
        return 0
    from alignlab.comparison.compare import compare

    return compare(config, out_folder(config), given.config_dir)
