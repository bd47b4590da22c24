"""Comparisons whose nodes are forked, not spawned; and those that are submitted to a stand-in for Slurm."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from alignlab.cli import main
from alignlab.comparison.graph import local, slurm
from alignlab.launch.slurm import commands
from tests.comparison import small
from tests.comparison.cluster import SMALL, Cluster
from tests.comparison.small import EXPERIMENT, write
from tests.training import forks


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with the user's experiment; the base model made for it is kept there too."""
    folder = tmp_path_factory.mktemp("comparisons")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ALIGNLAB_CACHE", str(folder / "cache"))
        patch.setattr(local, "NodeProcess", forks.Process)
        patch.chdir(folder)
        write(folder, "tiny", EXPERIMENT)
        yield folder


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Cluster:
    found = Cluster()
    monkeypatch.setattr(commands, "probe", found.probe)
    monkeypatch.setattr(commands, "require", lambda: None)
    monkeypatch.setattr(slurm, "submit", found.submit)
    monkeypatch.setattr(commands, "cancel", found.cancel)
    monkeypatch.setattr(commands, "states", found.answer)
    return found


@pytest.fixture
def submit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ALIGNLAB_CACHE", str(tmp_path / "cache"))

    def act(*words: str, experiment: dict[str, Any] = small.EXPERIMENT) -> int:
        small.write(tmp_path, "tiny", experiment)
        return main(["submit", "--config-dir", "configs", "experiment=tiny", "out=out", *SMALL, *words])

    return act
