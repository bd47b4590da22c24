"""the same as jobs of a Slurm cluster:  alignlab submit experiment=demo launcher.partition=gpu"""

from __future__ import annotations

from collections.abc import Sequence

from alignlab.commands import COMPOSING, out_folder, parse


def run(arguments: Sequence[str]) -> int:
    """Submit a comparison; with --dry-run say what would be submitted."""
    given = parse(arguments, *COMPOSING, "--dry-run")
    config = given.config("submit")
    if config is None:
        return 0
    from alignlab.comparison.compare import submit

    submit(config, out_folder(config), given.config_dir, "--dry-run" in given.options)
    return 0
