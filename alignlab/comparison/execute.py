"""Runs a graph of nodes on this machine, several at a time, each in a process of its own."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import IO

from alignlab.comparison.graph import LOG, Node, last_words
from alignlab.core import Interrupted
from alignlab.training.signals import StopRequest

POLL = 0.05
"""Seconds between looks at the running processes."""


@dataclass
class _Running:
    node: Node
    process: subprocess.Popen[bytes]
    log: IO[bytes]
    started: float


def execute(nodes: Sequence[Node], workers: int, threads: int | None) -> dict[str, str]:
    """Run what is not done, parents first, `workers` processes at a time.

    A node that fails takes those that wait for it with it, and no others.

    Returns:
        Why, for each node that has no result: name → reason. Empty when all is done.

    Raises:
        Interrupted: asked to stop; the running nodes were asked to save and have stopped.
    """
    from alignlab.core.progress import console

    say = partial(console().print, markup=False, highlight=False, soft_wrap=True)  # an error may hold brackets
    waiting = [n for n in nodes if not n.done]
    ready = {n.name for n in nodes if n.done}
    total, finished = len(waiting), 0
    if ready:
        say(f"{len(ready)} of {len(nodes)} parts are already done")
    failed: dict[str, str] = {}
    running: list[_Running] = []
    with StopRequest() as stop:
        try:
            while waiting or running:
                if stop:
                    _stop(running)
                    raise Interrupted(stop.signal or "SIGTERM", "the same command goes on with what is not done")
                for node in [n for n in waiting if any(p.name in failed for p in n.parents)]:
                    waiting.remove(node)
                    failed[node.name] = "waits for a part that failed"
                    total -= 1
                for node in [n for n in waiting if all(p.name in ready for p in n.parents)][: workers - len(running)]:
                    waiting.remove(node)
                    running.append(_start(node, threads))
                for item in [r for r in running if r.process.poll() is not None]:
                    running.remove(item)
                    item.log.close()
                    seconds = time.monotonic() - item.started
                    finished += 1
                    if item.process.returncode == 0:
                        ready.add(item.node.name)
                        say(f"[{finished}/{total}] {item.node.name}: {seconds:.1f} s")
                    else:
                        failed[item.node.name] = _last_words(item)
                        say(f"[{finished}/{total}] {item.node.name}: FAILED: {failed[item.node.name]}", style="red")
                time.sleep(POLL)
        finally:
            _stop(running)
    return failed


def _start(node: Node, threads: int | None) -> _Running:
    node.begin()
    log = (node.folder / LOG).open("ab")
    environment = dict(os.environ)
    if threads:
        environment["OMP_NUM_THREADS"] = str(threads)
    process = subprocess.Popen(
        [sys.executable, "-m", "alignlab", "node", str(node.folder)],
        stdout=log,
        stderr=subprocess.STDOUT,
        stdin=subprocess.DEVNULL,
        env=environment,
        start_new_session=True,  # Ctrl-C reaches the comparison, which then asks each node to save
    )
    return _Running(node, process, log, time.monotonic())


def _stop(running: list[_Running], patience: float = 60.0) -> None:
    """Ask the processes to save and stop; end those that do not."""
    for item in running:
        item.process.send_signal(signal.SIGTERM)
    end = time.monotonic() + patience
    for item in running:
        try:
            item.process.wait(max(end - time.monotonic(), 0.1))
        except subprocess.TimeoutExpired:
            item.process.kill()
            item.process.wait()
        item.log.close()
    running.clear()


def _last_words(item: _Running) -> str:
    """The error a failed node ended with, and where its log is."""
    path = item.node.folder / LOG
    code = item.process.returncode
    ending = f"ended by signal {-code}" if code < 0 else f"exit status {code}"
    return f"{last_words(path) or ending} (log: {path})"
