"""a model that any tool loads, adapters merged:  alignlab export run=DIR out=DIR"""

from __future__ import annotations

from collections.abc import Sequence

from alignlab.commands import COMPOSING, parse


def run(arguments: Sequence[str]) -> int:
    """Write a run's model for other tools, and say what was written."""
    config = parse(arguments, *COMPOSING).config("export")
    if config is None:
        return 0
    from alignlab.build import section
    from alignlab.training.checkpoints.export import ExportSettings, export

    for line in export(section(ExportSettings, config, "")):
        print(line)
    return 0
