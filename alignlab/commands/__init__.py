"""The commands, one file each: its first line is the command's help, its function `run` takes the arguments and returns
the exit status. Here is what they share. Heavy imports wait inside the functions, so that mistakes are told at once."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from alignlab.core.errors import Interrupted

DEBUG = "--debug"
"""The option of every command that shows where an error comes from."""

DEBUGGING = "ALIGNLAB_DEBUG"
"""The variable that says so to the processes which a command starts."""

UNEXPECTED = 70
"""The exit status after an error that is none of ours: EX_SOFTWARE of sysexits.h."""

COMPOSING = ("--cfg", "--config-dir")
"""Options of the commands that have a config."""

OPTIONS = {
    "--from FILE": "take a run's saved config, as it is, instead of overrides",
    "--json": "print it for programs",
    "--dry-run": "say what would be submitted, and stop",
    "--config-dir DIR": "a folder of your own configs, laid out as ours",
    "--cfg": "print the resolved config and stop",
    "--multirun": "or -m: run every combination of comma-separated values",
    DEBUG: "show where an error comes from",
}
"""Every option of a command, as its help shows it."""

WHOLE = ("experiment", "recipe")
"""Groups whose options are no section with keys, but settings of all sections."""

WITH_VALUE = {"--config-dir": "a folder", "--from": "a file"}
"""Options that a value follows, as `--config-dir DIR` or `--config-dir=DIR`, and what it names."""


def run(name: str, arguments: list[str], known: Mapping[str, str]) -> int:
    """Run a command; returns the exit status. What the user can put right is told in one line.

    Args:
        known: every command's one-line help.
    """
    from alignlab.core import secrets
    from alignlab.core.errors import STARTER, AlignlabError, Interrupted, PeerLost, did_you_mean, failure
    from alignlab.launch import quiet

    quiet()
    secrets.notice(arguments)
    secrets.hide_in_logs()
    debug = DEBUG in arguments and DEBUGGING not in os.environ
    if debug:
        os.environ[DEBUGGING] = "1"  # for the processes of a run and the parts of a comparison, too
    arguments = [a for a in arguments if a != DEBUG]
    try:
        if name not in known:
            raise AlignlabError(f"{name}: unknown command{did_you_mean(name, known)}")
        if "-h" in arguments or "--help" in arguments:
            show_help(name, known[name], arguments)
            return 0
        status: int = import_module(f"{__name__}.{name}").run(arguments)
        return status
    except Interrupted as stop:
        return _stopped(stop)
    except AlignlabError as error:
        if not (isinstance(error, PeerLost) and STARTER in os.environ):
            _say_error(str(error), error)
        return error.status
    except KeyboardInterrupt:
        _say("stopped")
        return 130
    except BaseException as error:
        hint = "" if os.environ.get(DEBUGGING) else f"; {DEBUG} shows where it comes from"
        _say_error(f"an error that alignlab did not expect: {failure(error)}{hint}", error)
        return UNEXPECTED
    finally:
        if debug:
            del os.environ[DEBUGGING]


def _stopped(stop: Interrupted) -> int:
    """Say so; the exit status."""
    import signal

    _say(str(stop))
    return 128 + signal.Signals[stop.signal].value


def _say(text: str) -> None:
    """Print a message for people as one line."""
    from alignlab.core.errors import one_line
    from alignlab.core.secrets import hide

    print(f"alignlab: {one_line(hide(text))}", file=sys.stderr, flush=True)


def _say_error(text: str, error: BaseException) -> None:
    """Print what was wrong; with --debug after the traceback."""
    from alignlab.core.secrets import hide

    if os.environ.get(DEBUGGING):
        print(hide("".join(traceback.format_exception(error))), end="", file=sys.stderr)
    _say(text)


@dataclass(frozen=True)
class Arguments:
    """What follows a command.

    Attributes:
        overrides: everything but options: overrides (KEY=VALUE) of a config, or folders that a command looks at.
        options: those given, with their values; "" where none is wanted.
    """

    overrides: list[str]
    options: dict[str, str]

    @property
    def folders(self) -> list[Path]:
        return [Path(folder) for folder in self.overrides]

    @property
    def config_dir(self) -> Path | None:
        """The folder of the user's own configs."""
        return Path(self.options["--config-dir"]) if "--config-dir" in self.options else None

    def config(self, command: str) -> dict[str, Any] | None:
        """The resolved config; None where it was to be shown (--cfg), which is then done.

        Raises:
            ConfigError: an override is unknown or impossible.
        """
        from alignlab.config import as_yaml, compose, resolve

        config = compose(command, self.overrides, self.config_dir)
        if "--cfg" in self.options:
            print(as_yaml(config), end="")
            return None
        return resolve(config)

    def sweep(self, command: str) -> int:
        """Run every combination of comma-separated values, or a search; the exit status."""
        from alignlab.core.errors import ConfigError
        from alignlab.sweeps.command import sweep

        for option in self.options.keys() - {"--multirun", "--config-dir"}:
            raise ConfigError(f"{option}: not with --multirun")
        return sweep(command, self.overrides, self.config_dir)


def parse(arguments: Sequence[str], *known: str) -> Arguments:
    """Tell options from the rest.

    Args:
        known: the command's options.

    Raises:
        ConfigError: an option is unknown, or its value is missing.
    """
    from alignlab.core.errors import ConfigError, did_you_mean

    overrides: list[str] = []
    options: dict[str, str] = {}
    waiting = list(arguments)
    while waiting:
        argument = waiting.pop(0)
        if not argument.startswith("-"):
            overrides.append(argument)
            continue
        option, equals, value = argument.partition("=")
        option = "--multirun" if option == "-m" else option
        if option not in known or (equals and option not in WITH_VALUE):
            raise ConfigError(f"{argument}: unknown option{did_you_mean(argument, {*known, '--help'} - {'--from'})}")
        if option in WITH_VALUE and not value:
            if not waiting:
                raise ConfigError(f"{option}: name {WITH_VALUE[option]}")
            value = waiting.pop(0)
        options[option] = value
    return Arguments(overrides, options)


def out_folder(config: Mapping[str, Any]) -> Path:
    """The folder that a command fills.

    Raises:
        ConfigError: `out` names none.
    """
    from alignlab.core.errors import ConfigError

    out = config["out"]
    if isinstance(out, int) and not isinstance(out, bool):
        out = str(out)  # a folder called 17
    if not isinstance(out, str) or not out:
        raise ConfigError("out: must name a folder, as in out=DIR")
    if not out.isprintable():
        raise ConfigError(f"out={out!r}: holds a line end or another sign that cannot be printed: choose another name")
    return Path(out)


def show_help(name: str, summary: str, arguments: Sequence[str] = ()) -> None:
    """Print what a command does, its options, its config groups with their options and keys, and its own keys.

    Args:
        arguments: may choose the option of a group whose keys are wanted, as in `algorithm=dpo`.
    """
    import ast
    import re

    from alignlab.config import config_folder

    source = (Path(__file__).parent / f"{name}.py").read_text(encoding="utf-8")
    does = next(
        ast.get_docstring(n) for n in ast.parse(source).body if isinstance(n, ast.FunctionDef) and n.name == "run"
    )
    print(f"alignlab {name}: {summary}\n\n{does}\n\noptions:")
    for option, text in OPTIONS.items():
        known = option.split()[0]
        if known == DEBUG or f'"{known}"' in source or (known in COMPOSING and "COMPOSING" in source):
            print(f"  {option:<17}{text}")
    folder = config_folder()
    if not (folder / f"{name}.yaml").exists():  # it has no settings
        return
    text = (folder / f"{name}.yaml").read_text(encoding="utf-8")
    bases = [folder / f"{c}.yaml" for c in ("train", "compare") if f"- {c}\n" in text]
    every = text + "".join(base.read_text(encoding="utf-8") for base in bases)
    print("\ngroups (GROUP=OPTION; then GROUP.KEY=VALUE), each with the keys of one of its options:")
    for group in sorted(p for p in folder.iterdir() if p.is_dir()):
        default = re.search(rf"- (?:override /)?{group.name}: ([\w.-]+)", every)
        if default is None:
            continue
        print(f"\n  {group.name:<13}{', '.join(sorted(p.stem for p in group.glob('*.yaml')))}")
        chosen = next((a.partition("=")[2] for a in reversed(arguments) if a.startswith(f"{group.name}=")), default[1])
        option_file = group / f"{chosen}.yaml"
        if group.name in WHOLE or not option_file.is_file():
            continue
        print(f"    {group.name}={chosen}:")
        for line in _option_lines(option_file):
            print(f"      {line}")
    print(f"\n{folder / f'{name}.yaml'}:\n\n{text}")
    print(f"The keys of other options: alignlab {name} GROUP=OPTION --help; what a command comes to: --cfg")


def _option_lines(path: Path) -> list[str]:
    """The keys of a group's option, those of the options that it builds on first."""
    import re

    text = path.read_text(encoding="utf-8")
    found: list[str] = []
    if block := re.search(r"^defaults:\n((?:  - .+\n)+)", text, re.MULTILINE):
        text = text.replace(block[0], "")
        bases = (path.with_name(f"{name}.yaml") for name in re.findall(r"- ([\w-]+)$", block[1], re.MULTILINE))
        found = [line for base in bases if base.is_file() for line in _option_lines(base)]
    return found + [line for line in text.splitlines() if line.strip() and not line.startswith("# @package")]


def kind_of(folder: Path) -> str:
    """What a folder holds, by what lies in it: "sweep", "comparison", "training run", or "" for none of them."""
    for file, kind in (("sweep.json", "sweep"), ("nodes.json", "comparison"), ("metrics.jsonl", "training run")):
        if (folder / file).exists():
            return kind
    return "training run" if (folder / "result.json").exists() or (folder / "checkpoints").is_dir() else ""


def check_submitted(folder: Path) -> None:
    """
    Raises:
        AlignlabError: nothing was handed to a cluster from this folder: what it is, and what can be done with it.
    """
    from alignlab.core.errors import AlignlabError

    kind = kind_of(folder)
    if (folder / "submitted.json").exists() or not kind:
        return
    what = f"alignlab has handed nothing of this {kind} to a cluster"
    if kind == "training run":
        raise AlignlabError(f"{folder}: {what}; how far it is stands in {folder / 'metrics.jsonl'}")
    raise AlignlabError(
        f"{folder}: {what}: where it runs on this machine, Ctrl-C stops it and the same command goes on with it; "
        f"alignlab report {folder} shows what is done"
    )
