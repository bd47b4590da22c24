"""The command line: `alignlab COMMAND …` runs `alignlab/commands/COMMAND.py`. A command is found by its file's name."""

from __future__ import annotations

import ast
import errno
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from alignlab.core.output import Output, safe_output

HELP = """alignlab: which alignment algorithm should I use, and how far is it from the best that is possible?

usage: alignlab COMMAND [KEY=VALUE ...]

{commands}

options:
  --config-dir DIR   a folder of your own configs, laid out as ours (algorithm/mine.yaml, experiment/mine.yaml, ...)
  --cfg              print the resolved config and stop
  -m, --multirun     run every combination of comma-separated values:  alignlab train -m algorithm=sft,dpo ...
  --debug            show where an error comes from (the traceback)
  --help             this text; after a command: its config groups and their options
  --version          the version
"""

HIDDEN = ("node",)
"""Commands that comparisons start and people do not: left out of the help."""

ONLY_PRINT = ("status", "plan", "help", "--help", "-h", "--version", "--cfg")
"""Commands and options that do nothing but print."""

LEAVING = 30.0
"""Seconds that one of a run's processes has to end once its work is done: parting from the others may take for ever."""


def commands() -> dict[str, str]:
    """The one-line help of each command, by name: the first line of its file, read without importing it."""
    found = {}
    for path in sorted((Path(__file__).parent / "commands").glob("[a-z]*.py")):
        found[path.stem] = (ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or "").partition("\n")[0]
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit status: 0, 1 where parts of it failed, 2 for what the user can put right, 74
    where it only prints and could not, and 128 + n when stopped by signal n with a checkpoint saved."""
    own_process = arguments is None
    given = list(sys.argv[1:] if arguments is None else arguments)
    with safe_output(own_process) as output:
        status = _main(given)
        output.end()
        if output.lost is not None:
            status = _not_printed(output, status, any(word in ONLY_PRINT for word in given))
    if own_process:  # it now ends, and must not look as if it had been stopped
        import signal

        signal.signal(signal.SIGUSR1, signal.SIG_IGN)
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            from alignlab.core.children import end_within

            end_within(LEAVING, status)
    return status


def _not_printed(output: Output, status: int, wanted: bool) -> int:
    """Say that something could not be printed; the exit status.

    Args:
        wanted: whether that was all that the command was to do.
    """
    if getattr(output.lost, "errno", None) == errno.EPIPE:  # the reader has seen enough, as in `… | head`
        return status or (128 + 13 if wanted else 0)
    print(f"{'alignlab' if wanted else 'note'}: not all could be printed: {output.lost}", file=sys.stderr)
    return status or (74 if wanted else 0)  # EX_IOERR of sysexits.h


def _main(arguments: list[str]) -> int:
    # DeepSpeed's launcher adds --local_rank=, and a variable of that name too.
    name, *rest = [a for a in arguments if not a.startswith("--local_rank=")] or ["--help"]
    if name in ("-h", "--help", "help"):
        shown = {name: summary for name, summary in commands().items() if name not in HIDDEN}
        width = max(map(len, shown))
        print(HELP.format(commands="\n".join(f"  {name:<{width}}  {text}" for name, text in shown.items())), end="")
        return 0
    if name == "--version":
        from alignlab import __version__

        print(__version__)
        return 0
    from alignlab.commands import run

    return run(name, rest, commands())
