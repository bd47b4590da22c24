"""HTTP for a judge's endpoint: one try, bounded in time and in size, and how long to wait before the next."""

from __future__ import annotations

import importlib
import math
import time
from collections.abc import Iterator, Mapping
from email.utils import parsedate_to_datetime
from typing import Any

import openai

HTTP: Any = importlib.import_module(openai.DefaultHttpxClient.__mro__[1].__module__.partition(".")[0])
"""What the client is made of: httpx, or its successor."""

MOST_BYTES = 16_000_000
"""Of a reply that are read: some thousand tokens with twenty log-probs each."""


class Refused(Exception):
    """A reply that is not read, and why. Asking again would bring the same."""


class _Bounded(HTTP.SyncByteStream):  # type: ignore[misc]
    """The body of a reply, up to a deadline and a size."""

    def __init__(self, stream: Any, deadline: float) -> None:
        self.stream, self.deadline = stream, deadline

    def __iter__(self) -> Iterator[bytes]:
        size = 0
        for chunk in self.stream:
            size += len(chunk)
            if size > MOST_BYTES:
                raise Refused(f"the reply is larger than {MOST_BYTES / 1e6:.0f} MB")
            if time.monotonic() > self.deadline:
                raise HTTP.ReadTimeout("the reply goes on after the deadline")
            yield chunk

    def close(self) -> None:
        self.stream.close()


def make_client(timeout: float) -> Any:
    """A client each of whose replies must be there, to its last byte, within `timeout` seconds.

    The time from the request to the reply's first byte is bounded by the same number. Redirects are not followed: a
    question goes to the address that was given and to no other. A compressed reply is refused: none was asked for, and
    a few bytes could become gigabytes.
    """

    def begin(request: Any) -> None:
        request.extensions = {**request.extensions, "begun": time.monotonic()}

    def bound(response: Any) -> None:
        deadline = response.request.extensions["begun"] + timeout
        coding = response.headers.get("content-encoding", "identity")
        if coding.strip().lower() != "identity":
            raise Refused(f"the reply is compressed ({coding[:40]}), which was not asked for")
        response.request.extensions.get("timeout", {})["read"] = max(deadline - time.monotonic(), 0.01)
        response.stream = _Bounded(response.stream, deadline)

    return openai.DefaultHttpxClient(
        timeout=timeout,
        follow_redirects=False,
        headers={"Accept-Encoding": "identity"},
        event_hooks={"request": [begin], "response": [bound]},
    )


def retry_after(headers: Mapping[str, str]) -> float | None:
    """Seconds to wait as a reply wishes: `retry-after-ms`, or `Retry-After` in seconds or as a date; None where it says
    nothing that can be understood."""
    wished, unit = headers.get("retry-after-ms"), 1000.0
    if wished is None:
        wished, unit = headers.get("retry-after", ""), 1.0
    try:
        seconds = float(wished) / unit
    except ValueError:
        try:
            seconds = parsedate_to_datetime(wished).timestamp() - time.time()
        except (ValueError, TypeError, OverflowError, IndexError):
            return None
    return seconds if math.isfinite(seconds) and seconds >= 0 else None
