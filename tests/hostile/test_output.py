"""Training goes on and is saved whatever becomes of its output; a closed terminal stops it with a checkpoint. Every run
here is a new interpreter: some of this happens before, and after, anything of ours runs."""

from __future__ import annotations

import fcntl
import os
import pty
import struct
import subprocess
import termios
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from alignlab.training.checkpoints.store import Checkpoints
from tests.training import runs

MORE = ["training.progress=auto", "training.steps=3", "training.batch_size=4"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("output")
    runs.prepare(made)
    runs.train(made, "sft", "whole", *MORE, "training.progress=off")
    return made


@pytest.fixture
def whole(folder: Path) -> dict[str, torch.Tensor]:
    """The weights of an undisturbed run of many steps."""
    runs.train(folder, "sft", "long", *MORE, "training.steps=200", "training.progress=off")
    return runs.weights(folder, "long")


def begin(folder: Path, out: str, *more: str, **options: Any) -> subprocess.Popen[bytes]:
    variables = runs.environment() | options.pop("env", {})
    return subprocess.Popen(
        runs.command(folder, "sft", out, *MORE, *more), env=variables, cwd=runs.REPOSITORY, close_fds=True, **options
    )


def trained(folder: Path, out: str, process: subprocess.Popen[bytes]) -> None:
    """It ended well, with the weights of an undisturbed run, and nothing else in its files."""
    assert process.wait(120) == 0
    assert runs.identical(runs.weights(folder, "whole"), runs.weights(folder, out))
    assert [line["step"] for line in runs.metrics(folder, out)] == [1, 2, 3]


def test_the_reader_goes_and_the_disk_of_the_log_is_full(folder: Path) -> None:
    """As `alignlab train … 2>/dev/full | head -1`."""
    with open("/dev/full", "w") as full:
        process = begin(folder, "head", "training.log_every=1", stdout=subprocess.PIPE, stderr=full)
    assert process.stdout is not None
    assert process.stdout.readline().startswith(b"data: ")
    process.stdout.close()
    trained(folder, "head", process)


def test_standard_streams_that_are_closed(folder: Path) -> None:
    """As `alignlab train … <&- >&- 2>&-`."""
    trained(folder, "closed", begin(folder, "closed", preexec_fn=lambda: os.closerange(0, 3)))


class Terminal:
    """A terminal of a few columns, which a process may have as its own."""

    def __init__(self, columns: int) -> None:
        self.master, self.slave = pty.openpty()
        fcntl.ioctl(self.slave, termios.TIOCSWINSZ, struct.pack("HHHH", 3, columns, 0, 0))

    def own(self) -> None:
        """Make it the controlling terminal of this process."""
        os.setsid()
        fcntl.ioctl(self.slave, termios.TIOCSCTTY, 0)

    def begin(self, folder: Path, out: str, *more: str, **variables: str) -> subprocess.Popen[bytes]:
        process = begin(
            folder, out, *more, env=variables, preexec_fn=self.own, stdout=self.slave, stderr=self.slave,
            stdin=self.slave, pass_fds=[self.slave],
        )  # fmt: skip
        os.close(self.slave)
        return process

    def said(self) -> Iterator[bytes]:
        while True:
            try:
                yield os.read(self.master, 4096)
            except OSError:  # all others have closed it
                return


def test_a_dumb_narrow_terminal_that_knows_only_ascii(folder: Path) -> None:
    terminal = Terminal(columns=3)
    process = terminal.begin(folder, "ascii", PYTHONIOENCODING="ascii", TERM="dumb")
    said = b"".join(terminal.said()).decode("ascii")
    trained(folder, "ascii", process)
    assert f"-> {folder}/ascii/model" in said and "Traceback" not in said and "\x1b[" not in said


def test_a_terminal_that_is_closed_stops_with_a_checkpoint(folder: Path, whole: dict[str, torch.Tensor]) -> None:
    """In the middle of a live display: SIGHUP comes, and all writing fails from then on."""
    terminal = Terminal(columns=80)
    process = terminal.begin(folder, "closing", "training.steps=200", TERM="xterm")
    metrics = folder / "closing/metrics.jsonl"
    seen = b""
    for part in terminal.said():  # a terminal shows what it is given; a full buffer would stop the run
        seen += part
        if metrics.exists() and metrics.read_bytes().count(b"\n") >= 3:
            break
    os.close(terminal.master)
    assert process.wait(120) == 129, seen.decode(errors="replace")
    kept = Checkpoints(folder / "closing/checkpoints", is_main=False).latest()
    assert kept is not None and not (folder / "closing/model").exists()
    runs.train(folder, "sft", "closing", *MORE, "training.steps=200")
    assert runs.identical(whole, runs.weights(folder, "closing"))
