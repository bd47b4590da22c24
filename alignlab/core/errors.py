"""Errors that a user can put right. The command line prints them as one line, without a traceback."""

from __future__ import annotations

import difflib
import traceback
from collections.abc import Iterable, Sequence
from pathlib import Path


class AlignlabError(Exception):
    """Something the user can put right. The message says what was wrong, where, and what to do.

    Attributes:
        status: what a command ends with.
    """

    status = 2


class ConfigError(AlignlabError):
    """A setting is unknown or impossible. The message begins with the key, as it is written on the command line."""


class DataError(AlignlabError):
    """A record cannot be used. The message begins with file and line."""


class NonFiniteError(AlignlabError):
    """A loss or a gradient became NaN or infinite. The message names the records."""


STARTER = "ALIGNLAB_STARTER"
"""The variable that tells a process that the one which started it says what became of the others."""


class PeerLost(AlignlabError):
    """Another process of the run has stopped or does not answer. The fault is there, not in this process."""

    status = 69  # EX_UNAVAILABLE of sysexits.h


class StartAgain(AlignlabError):
    """The run cannot go on in these processes. Start the same command again to go on."""

    status = 75  # EX_TEMPFAIL of sysexits.h


class SamplerLost(AlignlabError):
    """What draws a run's responses, such as a server, is gone. A run saves a checkpoint before it ends."""


class Interrupted(AlignlabError):
    """The run was asked to stop by a signal, named as in "SIGTERM", and has saved a checkpoint."""

    def __init__(self, signal: str, saved: str) -> None:
        super().__init__(f"stopped by {signal}; {saved}")
        self.signal = signal


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """The nearest known word, as in `"; did you mean 'beta'?"`; all of them if none is near; "" if none is known."""
    words = sorted(known)
    near = difflib.get_close_matches(word, words, n=1, cutoff=0.6)
    if near:
        return f"; did you mean '{near[0]}'?"
    return f"; known here: {', '.join(words)}" if words else ""


def require(condition: bool, key: str, value: object, rule: str) -> None:
    """Raise a `ConfigError` unless `condition` holds, e.g. `require(beta > 0, "beta", beta, "must be > 0")`."""
    if not condition:
        raise ConfigError(f"{key}={value!r}: {rule}")


def require_choice(key: str, value: object, choices: Sequence[str]) -> None:
    """Raise a `ConfigError` unless `value` is one of the choices."""
    if value not in choices:
        *others, last = map(repr, choices)
        raise ConfigError(f"{key}={value!r}: must be {', '.join(others)} or {last}")


def failure(error: BaseException) -> str:
    """An error of someone else's code in one line, with the place it comes from."""
    place = traceback.extract_tb(error.__traceback__)[-1]
    file, line = (error.filename, error.lineno) if isinstance(error, SyntaxError) else (place.filename, place.lineno)
    return f"{type(error).__name__}: {shorten(error)} ({Path(file or '?').name}:{line})"


def one_line(text: str, limit: int = 4000) -> str:
    """A text without line ends and other control characters, cut where it is too long for anyone to read."""
    plain = "".join(" " if c in "\n\r\t" else c if c.isprintable() else repr(c)[1:-1] for c in text)
    return plain if len(plain) <= limit else f"{plain[:limit]} … ({len(plain):,} characters)"


def shorten(error: BaseException, limit: int = 500) -> str:
    """An error's first two lines in one, of at most `limit` characters."""
    try:
        said = str(error)
    except Exception:  # of a class of the user's
        said = ""
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    text = "; ".join(lines[:2]) if lines else type(error).__name__
    return text if len(text) <= limit else f"{text[:limit]} …"
