"""A stand-in for a vLLM server: its HTTP interface, without vLLM. As a program, a stand-in for the server's process:
`python fake_vllm.py -I -m vllm.entrypoints.openai.api_server --port N …`."""

from __future__ import annotations

import json
import socket
import sys
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Choice = tuple[list[int], list[float], str]
"""Tokens, their log-probs, and why they end: "stop" or "length"."""

Answer = Callable[[dict[str, Any]], list[Choice]]


def always(tokens: list[int], logp: list[float], ending: str = "length") -> Answer:
    return lambda request: [(tokens, logp, ending)] * request["n"]


class Http(ThreadingHTTPServer):
    request_queue_size = 128  # as many as may ask at the same moment
    daemon_threads = True


class UnixHttp(Http):
    address_family = socket.AF_UNIX

    def server_bind(self) -> None:
        self.socket.bind(self.server_address)
        self.server_name, self.server_port = "localhost", 0

    def get_request(self) -> tuple[Any, Any]:
        return self.socket.accept()[0], ("local", 0)


class FakeVllm:
    """A server on a free port of this machine, for as long as the block lasts.

    Attributes:
        answer: what it says to a request for completions.
        asked: paths and bodies of what it was asked, in order.
        refuse: path → status and message, instead of doing it.
        broken: whether it breaks connections off from now on.
        raw: whether log-probs are those before the filters, as by vLLM's default.
    """

    def __init__(self, answer: Answer, version: str = "0.32.0", port: int = 0, uds: str | None = None) -> None:
        self.answer, self.version, self.raw, self.broken = answer, version, False, False
        self.asked: list[tuple[str, dict[str, Any]]] = []
        self.refuse: dict[str, tuple[int, str]] = {}
        self.seen: Callable[[str, dict[str, Any]], None] = lambda path, body: None
        fake = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self.reply(None)

            def do_POST(self) -> None:
                self.reply(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))

            def reply(self, body: Any) -> None:
                if fake.broken:
                    self.connection.close()
                    return
                status, answer = fake.reply(self.path, body)
                text = answer if isinstance(answer, str) else json.dumps(answer)
                self.send_response(status)
                self.end_headers()
                self.wfile.write(text.encode())

            def log_message(self, *arguments: Any) -> None:
                pass

        self.http = UnixHttp(uds, Handler) if uds else Http(("127.0.0.1", port), Handler)  # type: ignore[arg-type]
        self.http.handle_error = lambda request, address: None  # type: ignore[method-assign]

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.http.server_address[1]}"

    def of(self, path: str) -> list[dict[str, Any]]:
        """What it was asked at a path, but for what only looks whether it is one to work with."""
        return [body for p, body in self.asked if p == path and body.get("logit_bias") != {"0": 100.0}]

    @property
    def completions(self) -> list[dict[str, Any]]:
        return self.of("/v1/completions")

    def reply(self, path: str, body: Any) -> tuple[int, Any]:
        if body is not None:
            self.asked.append((path, body))
            self.seen(path, body)
        if path in self.refuse:
            status, message = self.refuse[path]
            return status, {"error": {"message": message}}
        if path == "/version":
            return 200, {"version": self.version}
        if path == "/v1/models":
            return 200, {"data": [{"id": "base"}]}
        if path != "/v1/completions":
            return 200, ""
        if body.get("logit_bias") == {"0": 100.0}:
            choices = [([0], [-4.0 if self.raw else 0.0], "length")]
        else:
            choices = self.answer(body)
        made = [
            {"index": i, "token_ids": t, "logprobs": {"token_logprobs": p}, "finish_reason": e, "text": "said by it"}
            for i, (t, p, e) in enumerate(choices)
        ]
        return 200, {"choices": made[::-1]}

    def __enter__(self) -> FakeVllm:
        threading.Thread(target=self.http.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return self

    def __exit__(self, *problem: Any) -> None:
        self.http.shutdown()
        self.http.server_close()


def main(words: list[str]) -> None:
    """What the interpreter that has vLLM would do with these words."""
    if "-c" in words:
        print("0.32.0")
        return
    if "--fail" in words:
        sys.exit("some line\nValueError: No available memory for the cache blocks.\nand another")
    with FakeVllm(always([5], [-1.0]), uds=words[words.index("--uds") + 1]):
        print("Application startup complete", words, flush=True)
        time.sleep(60)


if __name__ == "__main__":
    main(sys.argv[1:])
