"""Streams that end nothing, whatever becomes of what they write to."""

from __future__ import annotations

import errno
import io
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from alignlab.cli import main
from alignlab.core.output import ASCII, Output, plain, safe_output
from tests.training import forks


def text(raw: Any, encoding: str = "utf-8") -> io.TextIOWrapper:
    return io.TextIOWrapper(raw, encoding=encoding, write_through=True)


def pipe_without_reader() -> io.TextIOWrapper:
    read, write = os.pipe()
    os.close(read)
    return text(os.fdopen(write, "wb"))


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO, errno.EPIPE, errno.EBADF])
def test_no_error_of_writing_is_raised_and_the_first_is_kept(number: int) -> None:
    class Bad(io.BytesIO):
        def write(self, data: Any) -> int:
            raise OSError(number, os.strerror(number))

    output = Output(text(Bad()))
    print("one", file=output, flush=True)
    output.writelines(["two\n", "three\n"])
    assert isinstance(output.lost, OSError) and output.lost.errno == number


def test_a_stream_that_is_closed_is_no_error() -> None:
    stream = text(io.BytesIO())
    stream.close()
    output = Output(stream)
    print("one", file=output, flush=True)
    assert isinstance(output.lost, ValueError)


def test_what_waits_for_a_reader_that_is_gone_is_dropped() -> None:
    """Or the interpreter would fail at its end to write it, and end with status 120."""
    output = Output(pipe_without_reader())
    print("one", file=output, flush=True)
    assert isinstance(output.lost, BrokenPipeError)
    output.stream.flush()
    output.stream.close()


def test_a_disk_that_was_full_may_have_room_again() -> None:
    class Full(io.BytesIO):
        full = True

        def write(self, data: Any) -> int:
            if self.full:
                raise OSError(errno.ENOSPC, "No space left on device")
            return super().write(data)

    raw = Full()
    output = Output(text(raw))
    print("lost", file=output, flush=True)
    raw.full = False
    print("kept", file=output, flush=True)
    assert raw.getvalue().endswith(b"kept\n")
    assert output.lost is not None


@pytest.mark.parametrize(
    ("encoding", "expected"),
    [("ascii", "a -> b... 3 x 4 >= ? ?"), ("latin-1", "a -> b... 3 × 4 >= é ?"), ("utf-8", "a → b… 3 × 4 ≥ é 中")],
)
def test_symbols_that_an_encoding_lacks_are_written_with_others(encoding: str, expected: str) -> None:
    raw = io.BytesIO()
    output = Output(text(raw, encoding))
    print("a → b… 3 × 4 ≥ é 中", file=output, end="", flush=True)
    assert raw.getvalue().decode(encoding) == expected
    assert all(stands_for.isascii() for stands_for in ASCII.values())


def test_half_a_character_of_a_files_name_can_be_printed() -> None:
    raw = io.BytesIO()
    output = Output(text(raw))
    print("a name: \udcff", file=output, end="", flush=True)
    assert raw.getvalue() == b"a name: ?"
    assert plain("\udcff", "utf-8") == "?"


def test_streams_are_put_back() -> None:
    before = sys.stdout, sys.stderr
    with safe_output(own_process=False), pytest.raises(ZeroDivisionError):
        assert isinstance(sys.stdout, Output)
        raise ZeroDivisionError
    assert (sys.stdout, sys.stderr) == before


# ------------------------------------------------------------------ commands, in processes of their own


def ends_with(words: list[str], prepare: Callable[[], object], log: Path) -> int:
    """The status of a command in a fork, whose standard streams are as `prepare` leaves them."""

    def act() -> None:
        prepare()
        sys.argv = ["alignlab", *words]
        raise SystemExit(main())

    return forks.wait(forks.fork(act, log))


def onto(path: str, number: int = 1) -> None:
    os.dup2(os.open(path, os.O_WRONLY), number)


def nobody_reads() -> None:
    read, write = os.pipe()
    os.close(read)
    os.dup2(write, 1)


def closed() -> None:
    for number, name in ((1, "stdout"), (2, "stderr")):
        os.close(number)
        setattr(sys, name, None)  # as the interpreter has it then


@pytest.mark.parametrize("words", [["--help"], ["--version"], ["train", "--help"], ["status", "{here}"]])
def test_printing_commands_end_quietly_where_nobody_reads_on(words: list[str], tmp_path: Path) -> None:
    (tmp_path / "runs").mkdir()
    words = [word.format(here=tmp_path / "runs") for word in words]
    normal = ends_with(words, lambda: None, tmp_path / "normal")
    assert ends_with(words, nobody_reads, tmp_path / "log") == (normal or 128 + signal.SIGPIPE)
    assert "Traceback" not in (tmp_path / "log").read_text() and "Broken pipe" not in (tmp_path / "log").read_text()
    assert ends_with(words, closed, tmp_path / "log") == normal


def test_a_command_whose_only_work_is_to_print_says_that_it_could_not(tmp_path: Path) -> None:
    log = tmp_path / "log"
    assert ends_with(["--help"], lambda: onto("/dev/full"), log) == 74
    assert log.read_text() == "alignlab: not all could be printed: [Errno 28] No space left on device\n"


def test_an_error_that_nobody_can_read_keeps_its_status(tmp_path: Path) -> None:
    log = tmp_path / "log"
    assert ends_with(["nosuch"], lambda: onto("/dev/full", 2), log) == 2
    assert ends_with(["nosuch"], closed, log) == 2
    assert log.read_text() == ""


def test_a_file_never_takes_the_place_of_a_closed_stream(tmp_path: Path) -> None:
    """What is written to number 2 would land in a checkpoint."""

    def act() -> None:
        closed()
        with safe_output(own_process=True):
            file = os.open(tmp_path / "weights", os.O_WRONLY | os.O_CREAT)
            assert file > 2 and os.get_inheritable(2)
            os.write(2, b"a message")

    assert forks.wait(forks.fork(act)) == 0
    assert (tmp_path / "weights").read_bytes() == b""
