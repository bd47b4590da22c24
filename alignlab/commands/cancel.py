"""cancel the jobs of a submitted comparison:  alignlab cancel DIR"""

from __future__ import annotations

from collections.abc import Sequence

from alignlab.commands import check_submitted, parse


def run(arguments: Sequence[str]) -> int:
    """Cancel what still runs or waits of the submitted comparisons in the folders named."""
    from alignlab.comparison import status
    from alignlab.core.errors import ConfigError

    given = parse(arguments)
    if not given.folders:
        raise ConfigError("cancel: name the folder of a submitted comparison: alignlab cancel DIR")
    for folder in given.folders:
        check_submitted(folder)
        status.cancel(folder)
    return 0
