"""Comparisons whose nodes are forked, not spawned."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from alignlab.comparison import execute
from tests.comparison.small import EXPERIMENT, write
from tests.training import forks


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with the user's experiment; the base model made for it is kept there too."""
    folder = tmp_path_factory.mktemp("comparisons")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ALIGNLAB_CACHE", str(folder / "cache"))
        there = {name: getattr(subprocess, name) for name in ("STDOUT", "DEVNULL", "TimeoutExpired")}
        patch.setattr(execute, "subprocess", SimpleNamespace(Popen=forks.Process, **there))
        patch.chdir(folder)
        write(folder, "tiny", EXPERIMENT)
        yield folder
