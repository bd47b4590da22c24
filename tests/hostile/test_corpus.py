"""Every bad input of the corpus is answered by one line, quickly, and leaves nothing half-written behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

import pytest

from alignlab.cli import main
from tests.hostile.corpus import Case, cases, short
from tests.training import runs

CASES = cases()
PATIENCE = 20
"""Seconds that an answer may take."""


class TooLong(BaseException):
    """The command took longer; nothing that catches errors catches this."""


@contextmanager
def patience() -> Iterator[None]:
    def end(number: int, frame: FrameType | None) -> None:
        raise TooLong(f"no answer within {PATIENCE} s")

    former = signal.signal(signal.SIGALRM, end)
    signal.setitimer(signal.ITIMER_REAL, PATIENCE)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, former)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("prepared")
    runs.prepare(folder)
    assert main(["train", *short("sft", folder, folder), f"out={folder}/run", "training.checkpoint_every=1"]) == 0
    return folder


@pytest.fixture(autouse=True)
def as_it_was(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """The case's folder is the working directory and on the path; its modules are forgotten, and its environment."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    known, environment = set(sys.modules), dict(os.environ)
    yield
    for name in set(sys.modules) - known:
        if name.partition(".")[0].startswith("mine"):
            del sys.modules[name]
    os.environ.clear()
    os.environ.update(environment)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_a_bad_input_is_answered_by_one_line(
    case: Case, tmp_path: Path, prepared: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    case.write(tmp_path, prepared)
    before = set(tmp_path.rglob("*"))
    capfd.readouterr()
    status, said = run(case, case.words(tmp_path, prepared), tmp_path, capfd)
    assert "Traceback (most recent call last)" not in said, said
    assert status == case.status, said
    lines = [line for line in said.splitlines() if line.startswith("alignlab: ")]
    if case.status:
        assert len(lines) == 1, said
        assert len(lines[0]) < 1000, f"a message of {len(lines[0]):,} characters"
    for wanted in case.says:
        assert wanted.replace("{here}", str(tmp_path)) in said, said
    assert [name for name in case.never if (tmp_path / name).exists()] == []
    assert not unfinished(tmp_path, before)


def run(case: Case, words: list[str], here: Path, capfd: pytest.CaptureFixture[str]) -> tuple[int, str]:
    """The exit status and what went to stderr."""
    if case.process:
        found = subprocess.run(
            [sys.executable, "-m", "alignlab", *words],
            env=runs.environment() | {"PYTHONPATH": os.pathsep.join([str(here), str(runs.REPOSITORY)])},
            cwd=here,
            capture_output=True,
            timeout=PATIENCE + 10,  # starting takes seconds by itself
        )
        return found.returncode, found.stderr.decode(errors="replace")
    try:
        with patience():
            status = main(words)
    except SystemExit as stop:
        pytest.fail(f"the command ended the process, with {stop.code!r}")
    return status, capfd.readouterr().err


def unfinished(here: Path, before: set[Path]) -> list[str]:
    """What a command has left that is neither there nor not there: files with a temporary name, a run's model without
    its result, a result without its model."""
    new = set(here.rglob("*")) - before
    found = [str(p.relative_to(here)) for p in new if p.name.endswith((".tmp", ".partial")) or ".tmp." in p.name]
    for folder in {p.parent for p in new if p.name in ("model", "result.json") and p.parent.name != "model"}:
        if (folder / "model").exists() != (folder / "result.json").exists():
            found.append(f"{folder.relative_to(here)}: a model without a result, or the reverse")
    return found


def test_the_corpus_is_large_and_its_cases_differ() -> None:
    assert len(CASES) >= 10
    assert len({(c.run, str(c.files), str(c.make)) for c in CASES.values()}) == len(CASES)
