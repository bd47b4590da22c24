from __future__ import annotations

import io
import os
from collections.abc import Callable

import pytest
from rich.console import Console

from alignlab.training.callbacks.progress import ProgressDisplay


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


def plain() -> tuple[ProgressDisplay, Clock, Callable[[], list[str]]]:
    """A display that writes to a file, its clock, and what it has written."""
    file, clock = io.StringIO(), Clock()
    return ProgressDisplay(out=Console(file=file), clock=clock), clock, lambda: file.getvalue().splitlines()


def test_a_plain_line_at_most_every_ten_seconds_and_the_first_and_the_last() -> None:
    display, clock, lines = plain()
    for step in range(1, 101):
        display.update(step, {"done": step / 100, "loss": 0.5})
        clock.now += 1.0
    # First at second 0, then at 10, 20, ..., 90 (steps 11, 21, ..., 91), and the last, without waiting for `close`.
    expected = ["1", *map(str, range(11, 100, 10)), "100"]
    assert [line.split()[1] for line in lines()] == expected
    display.close()
    assert [line.split()[1] for line in lines()] == expected


def test_what_a_line_says() -> None:
    display, clock, lines = plain()
    display.update(1, {"done": 0.01, "loss": 0.69314, "tokens_per_second": 12345.6, "lr": 1e-5})
    clock.now += 30.0
    display.update(11, {"done": 0.11, "loss": 0.5, "kl": 0.125})
    # A tenth took 30 seconds, 89 hundredths are left: 267 seconds.
    assert lines() == [
        "step 1 (1%)  loss 0.6931  12,346 tokens/s",
        "step 11 (11%)  loss 0.5  kl 0.125  12,346 tokens/s  ETA 0:04:27",
    ]


def test_the_time_left_is_reckoned_from_the_first_step_on() -> None:
    display, clock, lines = plain()
    display.update(7, {"done": 0.25, "loss": 1.0})
    clock.now += 3600.0
    display.update(8, {"done": 0.5})  # a quarter in an hour, half is left: two hours
    display.update(9, {"done": 1.0})
    assert lines() == [
        "step 7 (25%)  loss 1",
        "step 8 (50%)  loss 1  ETA 2:00:00",
        "step 9 (100%)  loss 1  ETA 0:00:00",
    ]


def test_stopped_early_the_last_step_is_still_shown_once() -> None:
    display, _, lines = plain()
    for step in (1, 2, 3):
        display.update(step, {"done": step / 100, "loss": 1.0})
    display.close()
    display.close()
    assert [line.split()[1] for line in lines()] == ["1", "3"]


def test_a_line_is_never_wrapped_nor_coloured() -> None:
    file = io.StringIO()
    display = ProgressDisplay("plain", out=Console(file=file, width=20, force_terminal=True))
    display.update(123456789, {"done": 0.5, "loss": 0.123, "reward": 4.0, "tokens_per_second": 1e6})
    assert file.getvalue() == "step 123456789 (50%)  loss 0.123  reward 4  1,000,000 tokens/s\n"


@pytest.mark.parametrize(("mode", "is_main"), [("off", True), ("plain", False), ("rich", False), ("auto", False)])
def test_silence(mode: str, is_main: bool) -> None:
    file = io.StringIO()
    display = ProgressDisplay(mode, is_main, out=Console(file=file, force_terminal=True))  # type: ignore[arg-type]
    display.update(1, {"done": 0.5, "loss": 1.0})
    display.update(2, {"done": 1.0, "loss": 1.0})
    display.close()
    assert file.getvalue() == ""


def test_a_terminal_gets_one_live_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm-256color")
    ours, theirs = os.openpty()
    with os.fdopen(theirs, "w") as terminal:
        display = ProgressDisplay(out=Console(file=terminal, width=120))
        assert display.mode == "rich"
        for step in (1, 2, 3):
            display.update(step, {"done": step / 3, "loss": 1 / step, "tokens_per_second": 1234.0})
        display.close()
        terminal.flush()
        written = b""
        while not written.endswith(b"\x1b[?25h"):  # the cursor is shown again: the last thing written
            written += os.read(ours, 100_000)
    os.close(ours)
    seen = written.decode()
    assert "step 3 (100%)" in seen
    assert "loss 0.3333" in seen
    assert "1,234 tokens/s" in seen
    # One line that is drawn over (erase line), not a line a step.
    assert seen.count("\n") == 1
    assert "\x1b[2K" in seen


def test_a_terminal_that_cannot_draw_gets_plain_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "dumb")
    display = ProgressDisplay(out=Console(file=io.StringIO(), force_terminal=True))
    assert display.mode == "plain"
