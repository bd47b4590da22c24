"""A node's key, and what its folder says of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from alignlab.comparison.graph.node import Command, Node, fail, finish, is_result, last_words, outcome, write_plan


def node(folder: Path, config: dict[str, Any] | None = None, *parents: Node, **more: Any) -> Node:
    return Node("a", folder / "a", [Command("sample", config or {"n": 1}, parents)], **more)


def test_the_key_follows_the_content(tmp_path: Path) -> None:
    parent = Node("p", tmp_path / "p", [Command("data", {"x": 1})])
    changed = Node("p", tmp_path / "p", [Command("data", {"x": 2})])
    keys = [
        node(tmp_path).key,
        node(tmp_path, {"n": 2}).key,
        node(tmp_path, None, parent).key,
        node(tmp_path, None, changed).key,
        Node("b", tmp_path / "a", [Command("sample", {"n": 1})]).key,
    ]
    assert len(set(keys)) == len(keys)
    assert node(tmp_path, {"n": 1, "tracker": {"mode": "online"}}).key == keys[0]  # where metrics go
    assert node(tmp_path / "moved").key == keys[0]


def test_of_a_training_run_what_it_computes_counts(tmp_path: Path) -> None:
    """As where a run is gone on with: not where it is, nor what it shows, nor on how many processes."""

    def key(**changes: Any) -> str:
        config = {"out": "a", "name": "a", "algorithm": {"beta": 0.1}, "training": {"seed": 0, "log_every": 1}}
        return Node("a", tmp_path, [Command("train", config | changes)]).key

    training = {"seed": 0, "log_every": 5}
    assert key(out="b", name="b", distributed={"mode": "ddp"}, training=training) == key()
    assert key(training={"seed": 1, "log_every": 1}) != key()
    assert key(algorithm={"beta": 0.2}) != key()


def test_what_becomes_of_a_node(tmp_path: Path) -> None:
    one = node(tmp_path)
    assert outcome(one.folder, one.key).state == "unfinished"
    one.begin()
    plan = json.loads((one.folder / "node.json").read_text())
    assert (plan["key"], plan["commands"]) == (one.key, [["sample", {"n": 1}]])
    assert plan["content"]["parents"] == {}
    fail(one.folder, one.key, "no disk", "log.txt")
    assert str(outcome(one.folder, one.key)) == "no disk (log: log.txt)"
    one.begin()
    assert outcome(one.folder, one.key).state == "unfinished"
    finish(one.folder, 1.0)
    assert one.done and outcome(one.folder, one.key).state == "done"
    write_plan(tmp_path, [one])
    assert is_result(tmp_path, "a") and not is_result(tmp_path, "b")
    assert not node(tmp_path, {"n": 2}).done
    assert not node(tmp_path, still_valid=lambda: False).done


@pytest.mark.parametrize("keeps", [False, True])
def test_what_another_plan_left_goes_or_stays(tmp_path: Path, keeps: bool) -> None:
    """A comparison does it anew; in a sweep the run refuses, and what was there is as it was."""
    one, other = node(tmp_path), node(tmp_path, {"n": 2}, keeps_folder=keeps)
    one.begin()
    (one.folder / "half").touch()
    one.begin()
    assert (one.folder / "half").exists()  # its own is gone on with
    finish(one.folder, 1.0)
    other.begin()
    assert (one.folder / "half").exists() == keeps
    fail(other.folder, other.key, "holds another run")
    assert one.done == keeps and not other.done


def test_last_words(tmp_path: Path) -> None:
    log = tmp_path / "log.txt"
    assert last_words(log) == ""
    log.write_text("working\nalignlab: no data\nsrun: error: exited\n")
    assert last_words(log) == "no data"
    log.write_text("working\nTraceback\nValueError: x\n\n")
    assert last_words(log) == "ValueError: x"
