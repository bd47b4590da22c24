"""One process of two is killed, stopped, or meets an error, at each phase of a run: all end soon, one line says which
and why, nothing half-written is left, and the same command goes on to the very weights of an undisturbed run."""

from __future__ import annotations

import errno
import math
import os
import re
import signal
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from alignlab.launch import start as starter
from alignlab.models import save
from alignlab.training import run as training
from alignlab.training import step, trainer
from alignlab.training.distributed import processes
from alignlab.training.distributed.engine import Engine
from tests.launch import forked
from tests.training import forks, many, runs

MORE = [
    "distributed=ddp",
    "optimizer=adamw",
    "optimizer.lr=1e-3",
    "training.batch_size=6",
    "training.steps=3",
    "training.checkpoint_every=1",
    "training.progress=off",
]

TIMEOUT = 8
"""`distributed.timeout` where a process does not end by itself."""

PHASES: dict[str, tuple[Any, str, int]] = {
    "joining": (processes, "_check_launch", 1),
    "loading": (training, "load", 1),
    "sampling": (runs, "count_of_a", 12),  # 3 responses to each of 6 prompts, of which a process samples half
    "forward": (step, "aggregate", 2),
    "loss": (step, "_micro_batch", 2),
    "step": (Engine, "step", 2),
    "checkpoint": (trainer, "save_state", 2),
    "final save": (training, "peak_memory_mb", 1),
    "writing": (save, "save_value_head", 1),  # the first process alone
}
"""The function, and its call, in which it happens. Where it is not the first call, a checkpoint has been written."""

BEGUN = {"sampling": 1, "forward": 1, "loss": 1, "step": 1, "checkpoint": 1, "final save": 3, "writing": 3}
"""The step from which the same command goes on."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("processes")
    runs.prepare(made)
    many.together(made, [{"algorithm": "rejection_sampling", "out": "whole", "words": MORE}])
    return made


def happens(monkeypatch: pytest.MonkeyPatch, phase: str, rank: int, marker: Path, fault: Callable[[], Any]) -> None:
    """A fault in a phase, in one process. What it returns, unless None, is a factor of what the function returns."""
    where, name, number = PHASES[phase]
    function, calls = getattr(where, name), 0

    def wrapped(*arguments: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        factor: list[Any] = []
        if calls == number:
            forked.once(rank, marker, lambda: factor.append(fault()))
        found = function(*arguments, **options)
        if factor in ([], [None]):
            return found
        return (found[0] * factor[0], *found[1:]) if isinstance(found, tuple) else found * factor[0]

    monkeypatch.setattr(where, name, wrapped)


def disturbed(
    folder: Path, fault: str, act: Callable[[], Any], phases: Mapping[str, int], *more: str
) -> dict[str, str]:
    """Runs with a fault, all at a time: what each said, by phase. Whatever happens to one, it ends as it must.

    Args:
        phases: in which it happens → in which process.
    """
    outs = {phase: f"{fault} {phase}".replace(" ", "-") for phase in phases}

    def start(phase: str) -> Callable[[], None]:
        def begin() -> None:
            starter.PATIENCE = 2.0
            with pytest.MonkeyPatch.context() as patch:
                happens(patch, phase, phases[phase], folder / f"{outs[phase]}.marker", act)
                raise SystemExit(forked.start(folder, "rejection_sampling", outs[phase], *MORE, *more))

        return begin

    pids = {phase: forks.fork(start(phase), folder / f"{outs[phase]}.log") for phase in phases}
    statuses = {phase: forks.wait_at_most(pid, 60) for phase, pid in pids.items()}
    said = {phase: (folder / f"{outs[phase]}.log").read_text() for phase in phases}
    for phase, status in statuses.items():
        assert status > 0, (phase, status, said[phase])
        assert (folder / f"{outs[phase]}.marker").exists(), f"{phase}: it never happened"
        assert "Traceback" not in said[phase], said[phase]
        left = [
            p.name for p in (folder / outs[phase]).rglob("*") if re.match(r"model|result\.json|\.tmp|\.trash", p.name)
        ]
        assert not left, (phase, left)
    return said


def the_line(said: str) -> str:
    """The one line that the run had to say of it."""
    lines = [line for line in said.splitlines() if line.startswith("alignlab: ")]
    assert len(lines) == 1, said
    return lines[0]


def go_on(folder: Path, fault: str, phases: Mapping[str, int], *more: str) -> None:
    """The same commands again."""
    outs = [f"{fault} {phase}".replace(" ", "-") for phase in phases]
    many.together(folder, [{"algorithm": "rejection_sampling", "out": o, "words": [*MORE, *more]} for o in outs])
    whole = runs.weights(folder, "whole")
    for out in outs:
        assert runs.identical(whole, runs.weights(folder, out)), out
        assert [line["step"] for line in runs.metrics(folder, out)] == [1, 2, 3]


def where_it_goes_on(phase: str) -> str:
    if phase in BEGUN:
        return f"; the same command goes on from step-{BEGUN[phase]:08}"
    return "; no checkpoint had been written"


ALL = {"joining": 1, "loading": 0, "sampling": 1, "forward": 0, "step": 1, "checkpoint": 1, "final save": 1}


def test_killed(folder: Path) -> None:
    for phase, said in disturbed(folder, "killed", forked.kill, ALL).items():
        line = the_line(said)
        assert line.startswith(f"alignlab: process {ALL[phase]} of 2 was ended by SIGKILL; the others were stopped"), (
            phase
        )
        assert line.endswith(where_it_goes_on(phase)), (phase, line)
    go_on(folder, "killed", ALL)


def test_suspended(folder: Path) -> None:
    """As by Ctrl-Z, or a debugger: it neither ends nor answers."""
    more = f"distributed.timeout={TIMEOUT}"
    found = disturbed(folder, "suspended", lambda: os.kill(os.getpid(), signal.SIGSTOP), ALL, more)
    for phase, said in found.items():
        line = the_line(said)
        assert line.startswith(f"alignlab: process {ALL[phase]} of 2 did not answer: it was suspended by SIGSTOP"), (
            phase
        )
        assert line.endswith(where_it_goes_on(phase)), (phase, line)
    go_on(folder, "suspended", ALL, more)


def bug() -> None:
    raise ZeroDivisionError("a bug")


def test_an_exception(folder: Path) -> None:
    phases = dict.fromkeys(ALL, 1)
    for phase, said in disturbed(folder, "raised", bug, phases).items():
        line = the_line(said)
        assert re.search(r"alignlab: process 1 of 2 ended with status \d+: .*ZeroDivisionError: a bug", line), phase
        assert line.endswith(where_it_goes_on(phase)), (phase, line)
    go_on(folder, "raised", phases)


def test_a_loss_or_a_gradient_that_is_no_number(folder: Path) -> None:
    """All know of it, and the first one says which records it was."""
    phases = {"loss": 1, "forward": 1}
    for phase, said in disturbed(folder, "nan", lambda: math.nan, phases).items():
        line = the_line(said)
        assert "not finite" in line and "prompts.jsonl:" in line, (phase, line)
    go_on(folder, "nan", phases)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO])
def test_an_error_of_the_disk(folder: Path, number: int) -> None:
    def fails() -> None:
        raise OSError(number, os.strerror(number))

    name = errno.errorcode[number]
    phases = {"checkpoint": 1, "writing": 0}
    for phase, said in disturbed(folder, name, fails, phases).items():
        assert os.strerror(number) in the_line(said), phase
    go_on(folder, name, phases)
