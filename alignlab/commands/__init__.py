"""The commands, one file each: its first line is the command's help, its function `run` takes the arguments and returns
the exit status. Here is what they share. Heavy imports wait inside the functions, so that mistakes are told at once."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from alignlab.core.errors import Interrupted

COMPOSING = ("--cfg", "--config-dir")
"""Options of the commands that have a config."""

WITH_VALUE = {"--config-dir": "a folder", "--from": "a file"}
"""Options that a value follows, as `--config-dir DIR` or `--config-dir=DIR`, and what it names."""


def run(name: str, arguments: list[str], known: Mapping[str, str]) -> int:
    """Run a command; returns the exit status. What the user can put right is told in one line.

    Args:
        known: every command's one-line help.
    """
    from alignlab.core.errors import AlignlabError, Interrupted, did_you_mean
    from alignlab.launch import quiet

    quiet()
    try:
        if name not in known:
            raise AlignlabError(f"{name}: unknown command{did_you_mean(name, known)}")
        if "-h" in arguments or "--help" in arguments:
            show_help(name, known[name])
            return 0
        status: int = import_module(f"{__name__}.{name}").run(arguments)
        return status
    except Interrupted as stop:
        return _stopped(stop)
    except AlignlabError as error:
        print(f"alignlab: {error}", file=sys.stderr)
        return error.status
    except KeyboardInterrupt:
        print("alignlab: stopped", file=sys.stderr)
        return 130


def _stopped(stop: Interrupted) -> int:
    """Say so; the exit status."""
    import signal

    print(f"alignlab: {stop}", file=sys.stderr)
    return 128 + signal.Signals[stop.signal].value


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

    if not isinstance(config["out"], str) or not config["out"]:
        raise ConfigError("out: must name a folder, as in out=DIR")
    return Path(config["out"])


def show_help(name: str, summary: str) -> None:
    """Print a command's config groups with their options, and its own keys."""
    from alignlab.config import config_folder

    print(f"alignlab {name}: {summary}\n")
    folder = config_folder()
    if not (folder / f"{name}.yaml").exists():  # it has no settings
        return
    text = (folder / f"{name}.yaml").read_text()
    known = text + "".join((folder / f"{c}.yaml").read_text() for c in ("train", "compare") if f"- {c}\n" in text)
    print("groups (GROUP=OPTION; then GROUP.KEY=VALUE):")
    for group in sorted(p for p in folder.iterdir() if p.is_dir()):
        if f"- {group.name}:" in known or f"- override /{group.name}:" in known:
            print(f"  {group.name:<13}{', '.join(sorted(p.stem for p in group.glob('*.yaml')))}")
    print(f"\n{folder / f'{name}.yaml'}:\n\n{text}")
