"""how submitted comparisons go:  alignlab status [DIR ...] [--json]"""

from __future__ import annotations

from collections.abc import Sequence

from alignlab.commands import check_submitted, parse


def run(arguments: Sequence[str]) -> int:
    """Show the submitted comparisons in the folders named, else all in runs/; 1 where a part of one has failed."""
    from alignlab.comparison import status
    from alignlab.core.errors import AlignlabError

    given = parse(arguments, "--json")
    folders = given.folders or status.submitted()
    if not folders:
        raise AlignlabError("status: nothing was submitted from runs/: name the folder, alignlab status DIR")
    for folder in folders:
        check_submitted(folder)
    if "--json" in given.options:
        print(status.as_json(folders))
        return 0
    return max(status.show(folder) for folder in folders)
