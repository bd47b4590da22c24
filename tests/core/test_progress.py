"""The bar changes nothing."""

from functools import lru_cache

import pytest

from alignlab.core import progress as module
from alignlab.core.progress import progress


def test_items_come_through_with_a_bar_and_without(monkeypatch, capsys):
    assert list(progress(range(5), "counting", 5)) == [0, 1, 2, 3, 4]
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(module, "PATIENCE", -1.0)
    assert list(progress(iter(range(5)), "counting", 5)) == [0, 1, 2, 3, 4]
    monkeypatch.setenv("RANK", "1")
    assert list(progress(range(5), "counting")) == [0, 1, 2, 3, 4]


def test_a_bar_on_terminals_alone(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(module, "PATIENCE", -1.0)
    assert list(progress(range(5), "counting", 5)) == [0, 1, 2, 3, 4]
    assert capfd.readouterr() == ("", ""), "not even an empty line in what is kept of a job"
    monkeypatch.setenv("FORCE_COLOR", "1")  # rich's word for: take it for a terminal
    monkeypatch.setattr(module, "console", lru_cache(module.console.__wrapped__))  # one that has read it
    assert list(progress(range(5), "counting", 5)) == [0, 1, 2, 3, 4]
    assert "counting" in capfd.readouterr().err
    outer, inner = progress(range(2), "outer", 2), progress(range(2), "inner", 2)
    assert list(zip(outer, inner, strict=True)) == [(0, 0), (1, 1)], "one bar within another"
