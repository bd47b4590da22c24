"""As much of a wandb server as wandb's own client and `wandb sync` ask for, on this machine.

It keeps what a real one keeps: of a run's metadata the last value that was sent, and of its files the lines, each at
the place that the client gives it.
"""

from __future__ import annotations

import gzip
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

HISTORY, EVENTS, SUMMARY = "wandb-history.jsonl", "wandb-events.jsonl", "wandb-summary.json"
ENTITY = {"id": "1", "name": "us"}


@dataclass
class Run:
    """What the server knows of a run: its metadata, and the lines of its files."""

    about: dict[str, Any] = field(default_factory=dict)
    files: dict[str, list[str]] = field(default_factory=dict)

    @property
    def history(self) -> list[dict[str, Any]]:
        return [_plain(line) for line in self.files.get(HISTORY, [])]

    @property
    def summary(self) -> dict[str, Any]:
        return _plain(self.files[SUMMARY][-1])


def _plain(line: str) -> dict[str, Any]:
    return {name: value for name, value in json.loads(line).items() if not name.startswith("_")}


@dataclass
class Server:
    url: str = ""
    runs: dict[str, Run] = field(default_factory=dict)

    def answer(self, query: str, about: dict[str, Any]) -> dict[str, Any]:
        """What a query is for is the name after its first word."""
        kind = query.replace("(", " ").split()[1]
        if kind == "RunResumeStatus":
            project = {"id": "1", "name": about["project"], "entity": ENTITY}
            return {"model": {**project, "bucket": self._bucket(about["name"])}}
        if kind == "UpsertBucket":
            new = about["name"] not in self.runs
            run = self.runs.setdefault(about["name"], Run())
            run.about.update({key: value for key, value in about.items() if value is not None})
            project = {"id": "1", "name": run.about["project"], "entity": ENTITY}
            bucket = {"id": "1", "name": about["name"], "historyLineCount": len(run.history), "project": project}
            return {"upsertBucket": {"bucket": bucket, "inserted": new}}
        if kind == "CreateRunFiles":
            files = [{"name": name, "uploadUrl": f"{self.url}/{name}"} for name in about["files"]]
            return {"createRunFiles": {"runID": "1", "uploadHeaders": [], "files": files}}
        if "viewer" in query:
            return {"viewer": {"id": "1", "entity": "us", "username": "us", "flags": "{}", "teams": {"edges": []}}}
        return {"serverInfo": {"features": []}}

    def _bucket(self, name: str) -> dict[str, Any] | None:
        if name not in self.runs:
            return None
        run = self.runs[name]
        history, events = (run.files.get(file, []) for file in (HISTORY, EVENTS))
        return {
            "id": "1",
            "name": name,
            "config": run.about["config"],
            "wandbConfig": '{"t": 1}',
            "summaryMetrics": run.files.get(SUMMARY, ["{}"])[-1],
            "historyLineCount": len(history),
            "eventsLineCount": len(events),
            "logLineCount": 0,
            "historyTail": json.dumps(history[-1:]),
            "eventsTail": json.dumps(events[-1:]),
            "tags": [],
        }

    def stream(self, name: str, sent: dict[str, Any]) -> None:
        for file, chunk in (sent.get("files") or {}).items():
            lines = self.runs[name].files.setdefault(file, [])
            lines[chunk["offset"] :] = chunk["content"]


@contextmanager
def serve() -> Iterator[Server]:
    """A server, listening until the block ends."""
    server = Server()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, format: str, *args: Any) -> None:
            pass

        def _reply(self, value: Any = None) -> None:
            text = json.dumps(value or {}).encode()
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(text)))
            self.end_headers()
            self.wfile.write(text)

        def _body(self) -> bytes:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            return gzip.decompress(body) if self.headers.get("Content-Encoding") == "gzip" else body

        def do_GET(self) -> None:
            self._reply()

        def do_PUT(self) -> None:
            self._body()
            self._reply()

        def do_POST(self) -> None:
            body = self._body()
            if self.path == "/graphql":
                asked = json.loads(body)
                return self._reply({"data": server.answer(asked["query"], asked.get("variables") or {})})
            if self.path.endswith("/file_stream"):
                server.stream(self.path.split("/")[-2], json.loads(body))
            return self._reply()

    class Listener(ThreadingHTTPServer):
        daemon_threads = True

        def handle_error(self, request: Any, client_address: Any) -> None:
            """A client that has gone is no error."""

    listener = Listener(("127.0.0.1", 0), Handler)
    server.url = f"http://127.0.0.1:{listener.server_port}"
    thread = threading.Thread(target=listener.serve_forever, args=(0.05,))
    thread.start()
    try:
        yield server
    finally:
        listener.shutdown()
        thread.join()
        listener.server_close()
