"""The command line itself: help and version, which load nothing."""

from __future__ import annotations

import sys

import pytest

from alignlab import __version__
from alignlab.cli import HIDDEN, commands, main
from tests.commands.helpers import spawn


def test_help_names_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    for words in ([], ["--help"], ["-h"], ["help"]):
        assert main(words) == 0
        said = capsys.readouterr().out
        assert all((f"\n  {name} " in said) == (name not in HIDDEN) for name in commands())
        assert "--config-dir DIR" in said


def test_a_command_is_a_file_with_a_line_of_help() -> None:
    found = commands()
    assert {"train", "compare", "plan", "node"} <= found.keys()
    for name, summary in found.items():
        assert name in HIDDEN or f"alignlab {name}" in summary


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"{__version__}\n"


def test_help_loads_nothing_heavy() -> None:
    code = "import sys; from alignlab.cli import main; main(['--help']); print(*sys.modules, file=sys.stderr)"
    done = spawn(sys.executable, "-c", code)
    loaded = {name.split(".")[0] for name in done.stderr.split()}
    assert "alignlab" in loaded
    assert not loaded & {"torch", "hydra", "omegaconf", "transformers", "numpy", "pydantic", "yaml", "rich"}
