"""wandb as a fresh user has it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.components import need


@pytest.fixture
def wandb_here(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """wandb is installed, and neither the user's login nor settings of theirs are used."""
    need("wandb")
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    (tmp_path / "home").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.delenv("NETRC", raising=False)
    monkeypatch.setenv("WANDB_SILENT", "true")
