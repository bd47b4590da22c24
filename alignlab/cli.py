"""The command line: `alignlab COMMAND …` runs `alignlab/commands/COMMAND.py`. A command is found by its file's name."""

from __future__ import annotations

import ast
import sys
from collections.abc import Sequence
from pathlib import Path

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


def commands() -> dict[str, str]:
    """The one-line help of each command, by name: the first line of its file, read without importing it."""
    found = {}
    for path in sorted((Path(__file__).parent / "commands").glob("[a-z]*.py")):
        found[path.stem] = (ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or "").partition("\n")[0]
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit status: 0, 1 where parts of it failed, 2 for what the user can put right, and
    128 + n when stopped by signal n with a checkpoint saved."""
    status = _main(list(sys.argv[1:] if arguments is None else arguments))
    if arguments is None:  # in a process of its own, which now ends: it must not look as if it had been stopped
        import signal

        signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    return status


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
