"""Requests to a vLLM server, and what it means when they fail."""

from __future__ import annotations

import json
import os
import socket
import threading
from contextlib import suppress
from http.client import HTTPConnection, HTTPException, HTTPSConnection
from typing import Any
from urllib.parse import urlsplit

from alignlab.core import AlignlabError, SamplerLost

KEY = "ALIGNLAB_VLLM_API_KEY"
"""Environment variable with the key of a server that wants one; never in a config."""


class ServerLost(SamplerLost):
    """The server that samples does not answer any more: what was asked of it can be asked again of another one."""

    status = 69  # EX_UNAVAILABLE of sysexits.h


class Refused(AlignlabError):
    """The server answered that it cannot do what was asked."""

    def __init__(self, code: int, reason: str) -> None:
        super().__init__(f"{code}: {reason}")
        self.code, self.reason = code, reason


class UnixConnection(HTTPConnection):
    """HTTP over a Unix socket: a file that only its owner can open, where a port is open to all users of a host."""

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(self.timeout)
        self.sock.connect(self.host)


UNIX = "unix:"
"""How the URL of a server on a Unix socket begins; its path follows."""


class Client:
    """A connection for each request, from any thread.

    Args:
        url: the server's, as in http://host:8000 or unix:/path/of/its/socket.
        timeout: seconds that it may leave a request unanswered.
    """

    def __init__(self, url: str, timeout: float) -> None:
        self.url, self.timeout = url.rstrip("/"), timeout
        parts = urlsplit(self.url)
        self._place = parts.path if url.startswith(UNIX) else parts.netloc
        self._kind: type[HTTPConnection] = UnixConnection if url.startswith(UNIX) else HTTPConnection
        if parts.scheme == "https":
            self._kind = HTTPSConnection
        self._open: set[HTTPConnection] = set()
        self._lock = threading.Lock()
        self._closed = False

    def get(self, path: str, timeout: float | None = None) -> Any:
        return self._ask("GET", path, None, timeout)

    def post(self, path: str, body: dict[str, Any] | None = None) -> Any:
        return self._ask("POST", path, body or {}, None)

    def close(self) -> None:
        """Break off the requests under way: the server gives up what nobody waits for."""
        with self._lock:
            self._closed = True
            for connection in self._open:
                if connection.sock is not None:
                    with suppress(OSError):
                        connection.sock.shutdown(2)

    def _ask(self, method: str, path: str, body: dict[str, Any] | None, timeout: float | None) -> Any:
        """The answer, from JSON where it is that.

        Raises:
            ServerLost: no answer, or one that says that the server is broken.
            Refused: any other answer than a good one.
        """
        headers = {"Content-Type": "application/json"}
        if key := os.environ.get(KEY):
            headers["Authorization"] = f"Bearer {key}"
        if self._kind is UnixConnection:
            headers["Host"] = "localhost"
        connection = self._kind(self._place, timeout=timeout or self.timeout)
        with self._lock:
            if self._closed:
                raise ServerLost(f"{self.url}: not asked any more")
            self._open.add(connection)
        try:
            connection.request(method, path, None if body is None else json.dumps(body), headers)
            answer = connection.getresponse()
            text = answer.read().decode(errors="replace")
        except TimeoutError as error:
            raise ServerLost(f"{self.url} has not answered for {timeout or self.timeout:g} s") from error
        except (OSError, HTTPException) as error:
            raise ServerLost(f"{self.url} does not answer: {str(error) or type(error).__name__}") from error
        finally:
            connection.close()
            with self._lock:
                self._open.discard(connection)
        if answer.status >= 500:
            raise ServerLost(f"{self.url} fails with {answer.status}: {_reason(text)}")
        if answer.status != 200:
            raise Refused(answer.status, _reason(text))
        try:
            return json.loads(text) if text else None
        except ValueError:
            return text


def _reason(text: str) -> str:
    """What a vLLM server says is wrong, in one line."""
    try:
        found = json.loads(text)
    except ValueError:
        found = text
    while isinstance(found, dict) and found:
        found = next((found[k] for k in ("error", "message", "detail") if k in found), str(found))
    return " ".join(str(found).split())[:300] or "no reason given"
