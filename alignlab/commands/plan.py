"""what a run needs and where it fits, nothing loaded:  alignlab plan model=llama-65b adapter=lora gpu=48"""

from __future__ import annotations

from collections.abc import Sequence

from alignlab.commands import COMPOSING, parse


def run(arguments: Sequence[str]) -> int:
    """Print the plan of a run: as tables, or with --json as JSON."""
    given = parse(arguments, *COMPOSING, "--json")
    config = given.config("plan")
    if config is None:
        return 0
    from alignlab.planning import plan

    found = plan(config, given.overrides)
    if "--json" in given.options:
        import json

        print(json.dumps(found, indent=2))
        return 0
    from alignlab.planning.show import show

    show(found)
    return 0
