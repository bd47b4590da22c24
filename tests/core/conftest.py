"""Every call into `alignlab.algorithms` and `alignlab.core` has its axes checked."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.axes import ALIGNLAB, checked_axes


@pytest.fixture(autouse=True)
def axes() -> Iterator[None]:
    with checked_axes(ALIGNLAB / "algorithms", ALIGNLAB / "core"):
        yield
