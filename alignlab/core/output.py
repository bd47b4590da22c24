"""Printing that ends nothing, whether a reader or a terminal is gone, a disk is full, or an encoding lacks symbols."""

from __future__ import annotations

import errno
import locale
import os
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, TextIO, cast

ASCII = {
    **{"→": "->", "←": "<-", "…": "...", "·": "-", "–": "-", "—": "-", "−": "-", "×": "x", "±": "+/-", "≥": ">="},
    **{"≤": "<=", "≠": "!=", "≈": "~", "’": "'", "‘": "'", "“": '"', "”": '"', "π": "pi", "β": "beta", "•": "*"},
    **{"━": "-", "─": "-", "│": "|", "└": "`", "├": "|", "✓": "yes", "✗": "no"},
}
"""What stands for a symbol where the encoding has none."""

MAY_PASS = (errno.ENOSPC, errno.EDQUOT, errno.EAGAIN)
"""Errors after which a later line may be written again."""


class Output:
    """A text stream that never raises. What cannot be written is lost.

    Attributes:
        lost: the first error, or None.
    """

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream
        self.lost: Exception | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)

    def write(self, text: str) -> int:
        try:
            self.stream.write(text)
        except UnicodeEncodeError:
            self.write(plain(text, self.stream.encoding))
        except (OSError, ValueError) as error:  # ValueError: it is closed
            self._lose(error)
        return len(text)

    def writelines(self, lines: Iterable[str]) -> None:
        for line in lines:
            self.write(line)

    def flush(self) -> None:
        try:
            self.stream.flush()
        except (OSError, ValueError) as error:
            self._lose(error)

    def end(self) -> None:
        """Write what is waiting. Where that fails, nothing that the interpreter does at its end fails again."""
        before, self.lost = self.lost, None
        self.flush()
        if self.lost is not None:
            self._discard()
        self.lost = before or self.lost

    def _lose(self, error: Exception) -> None:
        self.lost = self.lost or error
        if getattr(error, "errno", None) not in MAY_PASS:
            self._discard()

    def _discard(self) -> None:
        """Send the rest to nowhere, that of libraries in C and of child processes too."""
        with suppress(OSError, ValueError):
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, self.stream.fileno())
            os.close(null)


def plain(text: str, encoding: str) -> str:
    """A text that an encoding can write: symbols that it lacks are written with others."""

    def known(symbol: str) -> str:
        try:
            symbol.encode(encoding)
        except UnicodeEncodeError:
            return ASCII.get(symbol, "?")
        return symbol

    return "".join(map(known, text))


@contextmanager
def safe_output(own_process: bool) -> Iterator[Output]:
    """Within it, printing ends nothing; yields standard output.

    Args:
        own_process: whether the process ends afterwards; otherwise all is as it was.
    """
    former = sys.stdout, sys.stderr
    if own_process:
        for number in (0, 1, 2):  # one that is closed would become the next file that is opened, a checkpoint perhaps
            try:
                os.fstat(number)
            except OSError:
                os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)
        if locale.getencoding().lower() not in ("utf-8", "utf8"):
            with suppress(locale.Error):
                locale.setlocale(locale.LC_CTYPE, "C.UTF-8")  # files are UTF-8 wherever a run goes on
    safe = [Output(stream or open(os.devnull, "w", encoding="utf-8")) for stream in former]  # noqa: SIM115
    sys.stdout, sys.stderr = (cast(TextIO, stream) for stream in safe)
    try:
        yield safe[0]
    finally:
        for stream in safe:
            stream.end()
        if not own_process:
            sys.stdout, sys.stderr = former
