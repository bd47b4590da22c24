"""A real HTTP server in a thread that speaks `/v1/chat/completions`, and judges by a rule of the test's."""

from __future__ import annotations

import json
import math
import re
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Reply = tuple[int, dict[str, str], str]
"""Status, headers, body."""


def completion(text: str | None, tokens: Sequence[tuple[str, dict[str, float]]] = (), usage: Any = (10, 1)) -> Reply:
    """A chat completion; `tokens` are those of the text with the probabilities of alternatives."""
    content = [
        {"token": t, "logprob": 0.0, "top_logprobs": [{"token": o, "logprob": math.log(p)} for o, p in tops.items()]}
        for t, tops in tokens
    ]
    choice: dict[str, Any] = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": "stop"}
    if tokens:
        choice["logprobs"] = {"content": content}
    body: dict[str, Any] = {"id": "x", "object": "chat.completion", "created": 0, "model": "m", "choices": [choice]}
    if usage:
        body["usage"] = {"prompt_tokens": usage[0], "completion_tokens": usage[1], "total_tokens": sum(usage)}
    return 200, {}, json.dumps(body)


@dataclass
class Server:
    """What the server was asked.

    Attributes:
        answer: the request's body and how many came before → a text, or a whole reply.
        delay: seconds each request takes.
        most: requests there were at once, at most.
    """

    answer: Callable[[dict[str, Any], int], str | Reply]
    url: str = ""
    delay: float = 0.0
    requests: list[dict[str, Any]] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)
    times: list[float] = field(default_factory=list)
    most: int = 0
    now: int = 0

    @property
    def questions(self) -> list[str]:
        """The first message of each request."""
        return [r["messages"][0]["content"] for r in self.requests]


@contextmanager
def serving(answer: Callable[[dict[str, Any], int], str | Reply], delay: float = 0.0) -> Iterator[Server]:
    server, lock = Server(answer, delay=delay), threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with lock:
                number = len(server.requests)
                server.requests.append(body)
                server.headers.append({k.lower(): v for k, v in self.headers.items()})
                server.times.append(time.monotonic())
                server.now += 1
                server.most = max(server.most, server.now)
            time.sleep(server.delay)
            assert self.path == "/v1/chat/completions", self.path
            said = server.answer(body, number)
            status, headers, text = completion(said) if isinstance(said, str) else said
            data = text.encode()
            with lock:
                server.now -= 1
            try:
                self.send_response(status)
                for name, value in {"Content-Type": "application/json", **headers}.items():
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)
            except OSError:  # the client has given up waiting
                self.close_connection = True

        def log_message(self, *_: Any) -> None:
            pass

    httpd = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    httpd.daemon_threads = True
    thread = threading.Thread(target=httpd.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    server.url = f"http://127.0.0.1:{httpd.server_address[1]}/v1"
    try:
        yield server
    finally:
        httpd.shutdown()
        thread.join()
        httpd.server_close()


PAIR = re.compile(r"Response 1:\n(.*?)\n\nResponse 2:\n(.*?)\n\nWhich", re.DOTALL)


def shown(body: dict[str, Any]) -> tuple[str, str]:
    """The two responses in a question of the default template, as they are shown."""
    found = PAIR.search(body["messages"][0]["content"])
    assert found is not None, body
    return found[1], found[2]


def more_a(body: dict[str, Any], _: int) -> str:
    """The rule: more of the letter a is better; of equals the one shown first."""
    first, second = shown(body)
    return "1" if first.count("a") >= second.count("a") else "2"
