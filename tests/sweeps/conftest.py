"""Sweeps over runs and comparisons use what comparisons are tested with; their runs are forked, not spawned."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from alignlab.comparison.graph import local
from tests.comparison.conftest import cluster
from tests.training import forks

__all__ = ["cluster"]


@pytest.fixture(scope="module", autouse=True)
def forked() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(local, "NodeProcess", forks.Process)
        yield
