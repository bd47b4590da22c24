"""Seeing jobs of a cluster to their end: what each has left in its folder is looked at, and what Slurm says of it."""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path

from alignlab.comparison.graph.ledger import Ledger
from alignlab.comparison.graph.local import Count, Describe, say
from alignlab.comparison.graph.node import Node, fail, last_words, outcome
from alignlab.core import AlignlabError, Interrupted
from alignlab.launch.slurm.commands import State
from alignlab.training.signals import StopRequest

POLL, ASK = 0.5, 5.0
"""Seconds between looks at the folders, and at the queue."""

LOST = 3
"""Questions to Slurm after which a job that is over, and has left no word, counts as lost: files of another node, and
the accounting, may lag."""


def wait(out: Path, nodes: Sequence[Node], describe: Describe, count: Count) -> None:
    """Until all have come to an end, whose end is told. A node whose job is over without a word has failed: that is
    noted in its folder.

    Raises:
        Interrupted: asked to stop; the jobs go on.
    """
    ledger = Ledger.read(out)
    left = {node.name: node for node in nodes}
    numbers = sorted({ledger.entries[name].job for name in left})
    logs = ", ".join(f"{Path(ledger.entries[next(iter(left))].log).parent}/{number}_*.out" for number in numbers)
    say(f"Slurm job {' '.join(numbers)}: {len(left)} runs; logs: {logs}")
    told, asked, gone = "", -math.inf, Counter[str]()
    with StopRequest() as stop:
        while left:
            for name, node in list(left.items()):
                found = outcome(node.folder, node.key)
                if found.state == "unfinished":
                    continue
                del left[name]
                failed = found.state == "failed"
                count.say(name, str(found) if failed else describe(node), failed)
            if stop:
                which = " ".join(numbers)
                raise Interrupted(
                    stop.signal or "SIGTERM",
                    f"Slurm job {which} goes on: scancel {which} stops it; the same command waits for it again",
                )
            time.sleep(POLL if left else 0)
            if time.monotonic() - asked < ASK:
                continue
            asked = time.monotonic()
            try:
                states = ledger.states(left)
            except AlignlabError as error:  # it may come back
                told = _say_once(str(error), told)
                continue
            for name in lost(left, states, gone):
                _note_lost(left[name], ledger, states.get(name, State("UNKNOWN")))
            told = _say_once(_summary(states.values()), told)


def lost(names: Collection[str], states: dict[str, State], gone: Counter[str]) -> list[str]:
    """Those whose jobs have been over, or unknown, so many times that they were asked about.

    Args:
        gone: how often each has been so in succession; counted on.
    """
    for name in names:
        gone[name] = 0 if name in states and states[name].active else gone[name] + 1
    return [name for name in names if gone[name] == LOST]


def _note_lost(node: Node, ledger: Ledger, state: State) -> None:
    if outcome(node.folder, node.key).state != "unfinished":
        return
    entry = ledger.entries[node.name]
    words = "" if state.state == "CANCELLED" else last_words(Path(entry.log))
    reason = f"Slurm job {entry.id} ended as {state.state}{f': {words}' if words else ''}"
    fail(node.folder, node.key, reason, entry.log)


def _say_once(text: str, before: str) -> str:
    if text and text != before:
        say(text)
    return text or before


def _summary(found: Iterable[State]) -> str:
    """`Slurm: 2 running, 1 pending (Resources)`."""
    found = list(found)
    waiting = {s.reason for s in found if s.state == "PENDING" and s.reason}
    counts = Counter(s.state for s in found if s.active)
    why = f" ({', '.join(sorted(waiting))})" if waiting else ""
    parts = [f"{n} {state.lower()}{why if state == 'PENDING' else ''}" for state, n in sorted(counts.items())]
    return f"Slurm: {', '.join(parts)}" if parts else ""
