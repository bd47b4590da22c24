"""The bar changes nothing."""

from alignlab.data import progress as module
from alignlab.data.progress import progress


def test_items_come_through_with_a_bar_and_without(monkeypatch, capsys):
    assert list(progress(range(5), "counting", 5)) == [0, 1, 2, 3, 4]
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(module, "PATIENCE", -1.0)
    assert list(progress(iter(range(5)), "counting", 5)) == [0, 1, 2, 3, 4]
    monkeypatch.setenv("RANK", "1")
    assert list(progress(range(5), "counting")) == [0, 1, 2, 3, 4]
