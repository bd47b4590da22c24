"""The executor of this machine, with processes that are forked and do as they are told."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from alignlab.comparison.graph import local, work
from alignlab.comparison.graph.local import Count, execute, is_free
from alignlab.comparison.graph.node import Command, Node, outcome
from alignlab.core import AlignlabError, Interrupted
from tests.training import forks


@pytest.fixture(autouse=True)
def forked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(local, "NodeProcess", forks.Process)


@pytest.fixture
def acts(monkeypatch: pytest.MonkeyPatch) -> dict[str, Callable[[Path], None]]:
    """What nodes do, by their folder's name."""
    found: dict[str, Callable[[Path], None]] = {}
    monkeypatch.setattr(work, "run_command", lambda _, __, folder: found.get(folder.name, lambda _: None)(folder))
    return found


def nodes(out: Path, **parents: str) -> list[Node]:
    """Nodes by name, each with names of those that it waits for: a="", b="a"."""
    found: dict[str, Node] = {}
    for name, before in parents.items():
        found[name] = Node(name, out / name, [Command("data", {}, [found[p] for p in before])])
    return list(found.values())


def until(met: Callable[[], Any]) -> None:
    end = time.monotonic() + 60
    while not met():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_parents_come_first_and_a_failure_ends_what_needs_it(tmp_path: Path, acts: dict[str, Any]) -> None:
    def fails(folder: Path) -> None:
        raise AlignlabError("no disk")

    def fault(folder: Path) -> None:
        raise ValueError("a fault\nof ours")

    acts |= {"b": fails, "d": fault}
    graph = nodes(tmp_path, a="", b="a", c="b", d="a", e="a")
    forks.Process.started.clear()
    failed = execute(graph, workers=2)
    assert failed == {
        "b": f"no disk (log: {tmp_path}/b/log.txt)",
        "c": "waits for a part that failed",
        "d": f"ValueError: a fault (log: {tmp_path}/d/log.txt)",
    }
    assert [Path(f).name for f in forks.Process.started] == ["a", "b", "d", "e"]
    assert "in fault" in (tmp_path / "d/log.txt").read_text()
    assert [outcome(n.folder, n.key).state for n in graph] == ["done", "failed", "unfinished", "failed", "done"]
    acts.clear()
    forks.Process.started.clear()
    assert execute(graph, workers=2) == {}
    assert [Path(f).name for f in forks.Process.started] == ["b", "d", "c"]  # what is not done
    assert all(is_free(node.folder) for node in graph)


def test_what_is_said(tmp_path: Path, acts: dict[str, Any], capfd: pytest.CaptureFixture[str]) -> None:
    count = Count(total=9, before=6)
    execute(nodes(tmp_path, a="", b=""), 1, describe=lambda node: f"well, {node.name}", count=count)
    assert capfd.readouterr().err.splitlines() == ["[7/9] a: well, a", "[8/9] b: well, b"]


def test_asked_to_stop_it_asks_its_processes(tmp_path: Path, acts: dict[str, Any]) -> None:
    def saves(folder: Path) -> None:
        signal.signal(signal.SIGTERM, lambda *_: (folder / "saved").touch() or os._exit(143))
        os.kill(os.getppid(), signal.SIGTERM)
        time.sleep(60)

    acts |= {"a": saves}
    with pytest.raises(Interrupted, match=r"stopped by SIGTERM; the same command goes on with what is not done"):
        execute(nodes(tmp_path, a="", b=""), workers=1)
    assert (tmp_path / "a/saved").exists() and not (tmp_path / "b").exists()
    assert not (tmp_path / "a/failed.json").exists()


def test_a_second_ctrl_c_ends_all_at_once(tmp_path: Path, acts: dict[str, Any]) -> None:
    def deaf(folder: Path) -> None:
        signal.signal(signal.SIGTERM, lambda *_: os.kill(os.getppid(), signal.SIGINT))
        os.kill(os.getppid(), signal.SIGINT)
        end = time.monotonic() + 60
        while time.monotonic() < end:
            time.sleep(0.1)

    acts |= {"a": deaf}
    begun = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        execute(nodes(tmp_path, a=""), workers=1)
    assert time.monotonic() - begun < 30
    assert is_free(tmp_path / "a")


def test_what_a_killed_one_has_left_behind_is_waited_for(
    tmp_path: Path, acts: dict[str, Any], capfd: pytest.CaptureFixture[str]
) -> None:
    """The executor dies by kill -9: the kernel tells its process, which saves; meanwhile the command is repeated."""
    (node,) = nodes(tmp_path, a="")

    def slow(folder: Path) -> None:
        def save(*_: object) -> None:
            time.sleep(1)
            (folder / "saved").write_text(str(time.monotonic()))
            os._exit(143)

        signal.signal(signal.SIGTERM, save)
        (folder / "listens").touch()
        time.sleep(60)

    acts |= {"a": slow}
    child = forks.fork(lambda: execute([node], workers=1), tmp_path / "log")
    until(lambda: (tmp_path / "a/listens").exists() and not is_free(tmp_path / "a"))
    os.kill(child, signal.SIGKILL)
    assert forks.wait(child) == -signal.SIGKILL
    acts["a"] = lambda folder: (folder / "again").write_text(str(time.monotonic()))
    assert execute([node], workers=1) == {}
    assert "a: a process is still at work on it; waiting" in capfd.readouterr().err
    assert float((tmp_path / "a/saved").read_text()) < float((tmp_path / "a/again").read_text())
