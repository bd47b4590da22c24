"""Executor: a graph of nodes on this machine, several at a time, each in a process of its own.

What kills a node kills nothing else. When the executor is asked to stop, its processes are asked to save; when it is
killed, they are told so by the kernel, save too, and are waited for by whoever begins with their nodes again.
"""

from __future__ import annotations

import fcntl
import os
import signal
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from alignlab.comparison.graph.node import LOG, Node, fail, last_words, outcome
from alignlab.comparison.graph.process import NodeProcess
from alignlab.core import AlignlabError, Interrupted
from alignlab.core.progress import console
from alignlab.training.signals import SIGNALS, StopRequest

LOCK = "lock"
"""In a node's folder: locked by the process that is at work there until it ends, however that is."""

POLL = 0.05
"""Seconds between looks at the running processes."""

PATIENCE = 300.0
"""Seconds that processes have to save and end, once asked to; and those that a killed executor has left behind."""

STOPPED = {128 + getattr(signal, name) for name in SIGNALS}
"""Exit statuses of a node that was asked to stop, and has saved."""

GOES_ON = "the same command goes on with what is not done"

Describe = Callable[[Node], str]
"""What is said of a node that is done, as in "finished: loss 1.23"."""


def say(text: str, style: str = "") -> None:
    console().print(text, style=style, markup=False, highlight=False, soft_wrap=True)  # an error may hold brackets


@dataclass
class _Running:
    node: Node
    process: NodeProcess
    log: IO[bytes]
    started: float


class Count:
    """`[3/8]`: how many nodes have ended, of how many.

    Args:
        before: of a search, how many there have been already.
    """

    def __init__(self, total: int, before: int = 0) -> None:
        self.total, self.ended = total, before

    def say(self, name: str, text: str, failed: bool = False) -> None:
        self.ended += 1
        say(f"[{self.ended}/{self.total}] {name}: {'FAILED: ' if failed else ''}{text}", "red" if failed else "")


def execute(
    nodes: Sequence[Node],
    workers: int,
    threads: int | None = None,
    describe: Describe | None = None,
    count: Count | None = None,
) -> dict[str, str]:
    """Run what is not done, parents first, `workers` processes at a time.

    A node that fails takes those that wait for it with it, and no others.

    Args:
        threads: CPU threads of each; None: torch's choice.
        describe: by default, how long it took is said of a node that is done.

    Returns:
        Why, for each node that has no result: name → reason. Empty when all is done.

    Raises:
        Interrupted: asked to stop; the running nodes were asked to save and have stopped.
        KeyboardInterrupt: Ctrl-C again, before they had: they were ended at once.
        AlignlabError: another process is at work on a node.
    """
    ready = {n.name for n in nodes if n.done}
    waiting = [n for n in nodes if n.name not in ready]
    count = count or Count(len(waiting))
    if ready:
        say(f"{len(ready)} of {len(nodes)} parts are already done")
    failed: dict[str, str] = {}
    running: list[_Running] = []
    with StopRequest() as stop:
        try:
            while waiting or running:
                if stop:
                    _stop(running, PATIENCE)
                    raise Interrupted(stop.signal or "SIGTERM", GOES_ON)
                for node in [n for n in waiting if any(p.name in failed for p in n.parents)]:
                    waiting.remove(node)
                    failed[node.name] = "waits for a part that failed"
                    count.total -= 1
                able = [n for n in waiting if all(p.name in ready for p in n.parents)]
                for node in able[: workers - len(running)]:
                    if not _wait_until_free(node, stop):
                        break
                    waiting.remove(node)
                    running.append(_start(node, threads))
                for item in [r for r in running if r.process.poll() is not None]:
                    running.remove(item)
                    reason = _ended(item)
                    name, seconds = item.node.name, time.monotonic() - item.started
                    if reason:
                        failed[name] = reason
                        count.say(name, reason, failed=True)
                    else:
                        ready.add(name)
                        count.say(name, describe(item.node) if describe else f"{seconds:.1f} s")
                time.sleep(POLL)
        finally:
            _stop(running, 0.0)
    return failed


def _start(node: Node, threads: int | None) -> _Running:
    node.begin()
    log = (node.folder / LOG).open("ab")
    environment = dict(os.environ)
    if threads:
        environment["OMP_NUM_THREADS"] = str(threads)
    with (node.folder / LOCK).open("wb") as lock:
        with suppress(OSError):  # a file system without locks
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        process = NodeProcess(node.folder, log, lock, environment, threads)
    return _Running(node, process, log, time.monotonic())


def _ended(item: _Running) -> str:
    """Why a node has no result, though its process has ended; "" where it has one."""
    item.log.close()
    folder, code = item.node.folder, item.process.poll() or 0
    if code == 0:
        return ""
    found, log = outcome(folder, item.node.key), folder / LOG
    if found.state != "failed":  # it could not say so itself
        ending = f"ended by {signal.Signals(-code).name}" if code < 0 else f"ended with status {code}"
        reason = ending if code < 0 else last_words(log) or ending
        if code not in STOPPED:
            fail(folder, item.node.key, reason, log)
        return f"{reason} (log: {log})"
    return str(found)


def _stop(running: list[_Running], patience: float) -> None:
    """Ask the processes to save and stop, and end those that do not within so many seconds.

    Raises:
        KeyboardInterrupt: Ctrl-C came again.
    """
    for item in running if patience else ():
        item.process.send_signal(signal.SIGTERM)
    end = time.monotonic() + patience
    while any(item.process.poll() is None for item in running) and time.monotonic() < end:
        time.sleep(POLL)
    for item in running:
        if item.process.poll() is None:
            item.process.kill()
            item.process.wait()
        item.log.close()
    running.clear()


def _wait_until_free(node: Node, stop: StopRequest) -> bool:
    """Wait for a process that a killed executor has left behind on this node; False where a stop is asked for first.

    Raises:
        AlignlabError: it does not end.
    """
    if not is_free(node.folder):
        say(f"{node.name}: a process is still at work on it; waiting for it to end …")
    end = time.monotonic() + PATIENCE
    while not is_free(node.folder):
        if stop:
            return False
        if time.monotonic() > end:
            raise AlignlabError(f"{node.folder}: another process is at work in it: of another command?")
        time.sleep(POLL)
    return True


def is_free(folder: Path) -> bool:
    """Whether no process of an executor is at work in a folder."""
    try:
        with (folder / LOCK).open("rb") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # nobody has been, or the file system has no locks
        pass
    return True
