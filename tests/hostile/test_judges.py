"""Whatever a judge's endpoint replies, a run gets an answer, or one line that says what was wrong: in time, within its
limits, and nothing that was paid for is lost."""

from __future__ import annotations

import json
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from email.utils import formatdate
from pathlib import Path
from typing import Any

import pytest

from alignlab.core import AlignlabError, ConfigError, Group, Response
from alignlab.scoring import Endpoint, JudgePairs, JudgeScores
from tests.components import need
from tests.scoring.judge_server import Reply, serving

need("openai")

KEY = "sk-Zq7wv93kLmN2pXbT5rUyHc"
PATIENCE = 20.0
"""Seconds that any of these may take."""


def asking(url: str, **settings: Any) -> Endpoint:
    return Endpoint("m", url, **{"cache": None, "retries": 0, "timeout": 5.0, **settings})


def ask(made: Endpoint, text: str = "q") -> Any:
    return made.ask([{"role": "user", "content": text}])


def body(text: Any = "1", **more: Any) -> str:
    return json.dumps({"choices": [{"message": {"content": text}}], **more})


def usage(**counts: Any) -> Reply:
    return 200, {}, body(usage=counts)


@pytest.fixture(autouse=True)
def in_time() -> Iterator[None]:
    begun = time.monotonic()
    yield
    assert time.monotonic() - begun < PATIENCE


# ---------------------------------------------------------------------- bodies

DEEP = "[" * 100_000
BODIES: dict[str, tuple[str, str]] = {
    "deep lists": (DEEP, "no chat completion"),
    "deep objects": ('{"a":' * 100_000, "no chat completion"),
    "deep content": ('{"choices": [{"message": {"content": ' + DEEP + "]" * 100_000 + "}}]}", "no chat completion"),
    "nothing": ("", r"no chat completion: \(nothing\)"),
    "spaces": (" \n", r"no chat completion: \(nothing\)"),
    "an HTML page": ("<html><h1>502 Bad Gateway</h1>", "<h1>502 Bad Gateway"),
    "an error object with status 200": ('{"error": {"message": "out of credit"}}', "out of credit"),
    "null": ("null", "no chat completion: null"),
    "a number": ("1e999", "no chat completion: 1e999"),
    "a text": ('"1"', "no chat completion"),
    "no choices": ('{"choices": []}', "no chat completion"),
    "choices that are an object": ('{"choices": {"0": 1}}', "no chat completion"),
    "a choice that is null": ('{"choices": [null]}', "no chat completion"),
    "half a reply": (body()[:-10], "no chat completion"),
    "a stream of events": ("data: {}\n\ndata: [DONE]", "no chat completion: data:"),
    "5,000 digits": ('{"choices": ' + "1" * 5000 + "}", "no chat completion"),
    "control characters": ("\x00\x1b[31m", "no chat completion"),
}


@pytest.mark.parametrize(("text", "said"), BODIES.values(), ids=BODIES.keys())
def test_a_body_that_is_no_completion(text: str, said: str) -> None:
    with serving(lambda *_: (200, {}, text)) as server, pytest.raises(AlignlabError, match=said) as error:
        ask(asking(server.url))
    assert server.url in str(error.value) and len(str(error.value)) < 500


LOG_PROBS: dict[str, Any] = {
    "1e999": 1e999,
    "-1e999 and a text": "x",
    "null": None,
    "800, whose exponential overflows": 800,
    "NaN": float("nan"),
    "400 digits": 10**400,
    "a list": [],
}


@pytest.mark.parametrize("value", LOG_PROBS.values(), ids=LOG_PROBS.keys())
@pytest.mark.parametrize("kind", [JudgePairs, JudgeScores])
def test_log_probs_that_are_none_leave_the_text(kind: Any, value: Any) -> None:
    """The answer was paid for, and says all that a judge without log-probs would say; the report says so."""
    token = {"token": "1", "top_logprobs": [{"token": "1", "logprob": value}, {"token": "2", "logprob": -1.0}]}
    reply = {"choices": [{"message": {"content": "1"}, "logprobs": {"content": [token]}}]}
    with serving(lambda *_: (200, {}, json.dumps(reply))) as server:
        judge = kind(asking(server.url))
        groups = [Group([1], [Response([2], text="a"), Response([3], text="b")], "data.jsonl:1", "p")]
        judge.score(groups)
    column = judge.fills[-1]
    assert [r.columns[column] for r in groups[0].responses] == ([0.5, 0.5] if kind is JudgePairs else [1.0, 1.0])
    assert judge.report["soft"] == 0 and len(server.requests) == 2


@pytest.mark.parametrize("logprobs", ["x", [], {"content": "abc"}, {"content": [1]}, {"content": {"a": 1}}, 7])
def test_log_probs_of_another_shape_leave_the_text(logprobs: Any) -> None:
    reply = {"choices": [{"message": {"content": "1"}, "logprobs": logprobs}]}
    with serving(lambda *_: (200, {}, json.dumps(reply))) as server:
        assert (ask(asking(server.url)).text, len(server.requests)) == ("1", 1)


@pytest.mark.parametrize("text", ["\ud800", "1 \udfff"])
def test_half_characters_are_marked_kept_and_asked_about(text: str, tmp_path: Path) -> None:
    """They were found after paying, where the next request could not be encoded."""
    replies = [body(text), body("Answer: 7")]
    with serving(lambda _, n: (200, {}, replies[n])) as server:
        judge = JudgeScores(asking(server.url, cache=str(tmp_path / "c")))
        groups = [Group([1], [Response([2], text="a")], "data.jsonl:1", "p")]
        judge.score(groups)
        assert groups[0].responses[0].columns["reward"] == 7
        assert "\ufffd" in server.requests[1]["messages"][1]["content"]
        again = JudgeScores(asking(server.url, cache=str(tmp_path / "c")))
        again.score(groups)
    assert (len(server.requests), again.endpoint.usage.cache_hits, again.counts["unparsable"]) == (2, 2, 1)


def test_a_question_with_half_a_character_is_not_sent() -> None:
    with serving(lambda *_: "1") as server, pytest.raises(AlignlabError, match="surrogates not allowed"):
        ask(asking(server.url), "\ud800")
    assert not server.requests


@pytest.mark.parametrize(
    "content", [None, 5, [], {"a": 1}, True, ["1"], "9" * 5000, "-9e999", "(" * 20_000, " " * 20_000]
)
def test_content_of_any_shape(content: Any) -> None:
    with serving(lambda *_: (200, {}, body(content))) as server:
        judge = JudgeScores(asking(server.url), attempts=1, unparsable="tie", low=-1, high=6, soft=False)
        groups = [Group([1], [Response([2], text="a")], "data.jsonl:1", "p")]
        judge.score(groups)
    assert -1 <= groups[0].responses[0].columns["reward"] <= 6


# ---------------------------------------------------------------------- cost

COUNTS: dict[str, Any] = {
    "negative": -(10**9),
    "absurd": 10**30,
    "1e999": 1e999,
    "a text": "many",
    "null": None,
    "a list": [1],
    "true": True,
    "zero": 0,
}


@pytest.mark.parametrize("count", COUNTS.values(), ids=COUNTS.keys())
def test_no_count_defeats_the_limit_of_cost(count: Any, capsys: pytest.CaptureFixture[str]) -> None:
    """A question of 100 bytes is taken as 100 tokens, an answer of one byte as one: 101 × 10 / 10⁶ each."""
    with serving(lambda *_: usage(prompt_tokens=count, completion_tokens=count)) as server:
        made = asking(server.url, price_prompt=10.0, price_completion=10.0, max_cost=0.003)
        with pytest.raises(AlignlabError, match=r"max_cost=0\.003: the limit is reached \(3 requests"):
            for i in range(9):
                ask(made, f"{i:096d}")
        made.tell()
    assert made.usage.cost == pytest.approx(3 * 101e-5)
    assert "3 replies without usable counts" in capsys.readouterr().err


@pytest.mark.parametrize("given", ["x", [], 7, None])
def test_usage_of_another_shape(given: Any) -> None:
    with serving(lambda *_: (200, {}, body(usage=given))) as server:
        made = asking(server.url)
        assert ask(made).text == "1" and made.usage.uncounted == 1


def test_what_cannot_be_read_is_paid_for_too() -> None:
    with serving(lambda *_: (200, {}, "[]")) as server:
        made = asking(server.url, price_prompt=10.0, max_cost=0.0015, retries=9)
        with pytest.raises(AlignlabError, match=r"max_cost=0\.0015: the limit is reached"):
            ask(made, "x" * 96)
    assert len(server.requests) == 2


# ---------------------------------------------------------------------- waiting


@pytest.mark.parametrize(
    "headers",
    [
        {"Retry-After": "3600"},
        {"Retry-After": "601"},
        {"Retry-After": formatdate(time.time() + 4000, usegmt=True)},
        {"retry-after-ms": "3600000"},
    ],
)
def test_a_wait_that_is_too_long_ends_the_command(headers: dict[str, str], tmp_path: Path) -> None:
    with serving(lambda *_: (429, headers, "slow down")) as server:
        said = r"status 429.*slow down\. No more than 600 s are waited: run the same command again later\. All answers"
        with pytest.raises(AlignlabError, match=said):
            ask(asking(server.url, retries=5, cache=str(tmp_path / "c")))
    assert len(server.requests) == 1


@pytest.mark.parametrize("wished", ["banana", "-5", "nan", "inf", "", "Mon, 99 Foo 2020", "1e999"])
def test_a_wait_that_cannot_be_understood_is_the_usual_one(wished: str) -> None:
    with serving(lambda _, n: (429, {"Retry-After": wished}, "slow") if n == 0 else "1") as server:
        assert ask(asking(server.url, retries=1)).text == "1"
    assert 0.4 < server.times[1] - server.times[0] < 3


def test_a_failure_elsewhere_ends_a_wait() -> None:
    def answer(request: dict[str, Any], _: int) -> Reply:
        return (429, {"Retry-After": "500"}, "") if "a" in request["messages"][0]["content"] else (400, {}, "no")

    with serving(answer, 0.1) as server:
        made = asking(server.url, retries=3, concurrency=2)
        with pytest.raises(AlignlabError, match=r"status 400|given up"):
            made.map(lambda q: ask(made, q), ["a", "b"])


@contextmanager
def raw(serve: Callable[[socket.socket], None]) -> Iterator[str]:
    """A server that speaks bytes."""
    listener = socket.create_server(("127.0.0.1", 0))

    def accept() -> None:
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            with connection:
                connection.recv(65536)
                with suppress(OSError):
                    serve(connection)

    thread = threading.Thread(target=accept, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}/v1"
    finally:
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()
        thread.join(5)


HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n"


def trickle(connection: socket.socket) -> None:
    connection.sendall(HEAD + b"Content-Length: 100000\r\n\r\n")
    for _ in range(100):
        connection.sendall(b" ")
        time.sleep(0.1)


def trickle_chunks_of_an_error(connection: socket.socket) -> None:
    connection.sendall(b"HTTP/1.1 400 Bad\r\nTransfer-Encoding: chunked\r\n\r\n")
    for _ in range(100):
        connection.sendall(b"1\r\n \r\n")
        time.sleep(0.1)


@pytest.mark.parametrize("serve", [trickle, trickle_chunks_of_an_error])
def test_a_reply_that_trickles_is_given_up_at_the_timeout(serve: Callable[[socket.socket], None]) -> None:
    """Each byte comes in time; the whole does not."""
    with raw(serve) as url:
        begun = time.monotonic()
        with pytest.raises(AlignlabError, match=r"no answer within 0\.5 s: raise scoring\.endpoint\.timeout"):
            ask(asking(url, timeout=0.5))
        assert time.monotonic() - begun < 2


def flood(connection: socket.socket) -> None:
    connection.sendall(HEAD + b"Content-Length: 40000000\r\n\r\n")
    for _ in range(40):
        connection.sendall(b" " * 1_000_000)


def flood_without_end(connection: socket.socket) -> None:
    connection.sendall(HEAD + b"Transfer-Encoding: chunked\r\n\r\n")
    while True:
        connection.sendall(b"100000\r\n" + b" " * 0x100000 + b"\r\n")


@pytest.mark.parametrize("serve", [flood, flood_without_end])
def test_a_reply_that_is_too_large_is_not_read(serve: Callable[[socket.socket], None]) -> None:
    with raw(serve) as url, pytest.raises(AlignlabError, match="the reply is larger than 16 MB"):
        ask(asking(url, retries=3))


def test_a_compressed_reply_is_not_unpacked() -> None:
    with (
        serving(lambda *_: (200, {"Content-Encoding": "gzip"}, "x")) as server,
        pytest.raises(AlignlabError, match=r"the reply is compressed \(gzip\)"),
    ):
        ask(asking(server.url))
    assert server.headers[0]["accept-encoding"] == "identity"


# ---------------------------------------------------------------------- connections

BROKEN: dict[str, bytes] = {
    "in the middle of the body": HEAD + b'Content-Length: 1000\r\n\r\n{"choices"',
    "in the middle of a chunk": HEAD + b"Transfer-Encoding: chunked\r\n\r\nff\r\n{",
    "in the middle of the headers": HEAD,
    "before the headers": b"",
    "with what is no HTTP": b"SSH-2.0-OpenSSH_9.6\r\n\r\n",
    "with a length that is none": HEAD + b"Content-Length: many\r\n\r\n{}",
    "with endless headers": b"HTTP/1.1 200 OK\r\n" + b"X: " + b"a" * 300_000,
}


@pytest.mark.parametrize("sent", BROKEN.values(), ids=BROKEN.keys())
def test_a_connection_that_breaks(sent: bytes) -> None:
    with (
        raw(lambda connection: connection.sendall(sent)) as url,
        pytest.raises(AlignlabError, match=r"the connection broke after 2 tries \(") as error,
    ):
        ask(asking(url, retries=1))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_redirects_are_told_and_not_followed(status: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither the question nor the key goes to another address."""
    monkeypatch.setenv("MY_KEY", KEY)
    with serving(lambda *_: "1") as other:
        there = f"{other.url}/chat/completions?key={KEY}"
        with (
            serving(lambda *_: (status, {"Location": there}, "")) as server,
            pytest.raises(AlignlabError, match=f"status {status}, a redirect to {other.url}.*: give that") as error,
        ):
            ask(asking(server.url, key_variable="MY_KEY", retries=2))
    assert KEY not in str(error.value)
    assert (len(server.requests), len(other.requests)) == (1, 0)


@pytest.mark.parametrize("kind", ["text/html", "application/octet-stream", "", "application/json; charset=utf-16"])
def test_the_content_type_does_not_matter(kind: str) -> None:
    with serving(lambda *_: (200, {"Content-Type": kind}, "\ufeff" + body("schön"))) as server:
        assert ask(asking(server.url)).text == "schön"


@pytest.mark.parametrize("status", [100, 204, 206, 226, 304, 402, 418, 451, 499, 501, 520, 599])
def test_any_status_is_one_line(status: int) -> None:
    with (
        raw(lambda c: c.sendall(f"HTTP/1.1 {status} X\r\nContent-Length: 0\r\n\r\n".encode())) as url,
        pytest.raises(AlignlabError, match=rf"status {status}|no chat completion|the connection broke"),
    ):
        ask(asking(url))


# ---------------------------------------------------------------------- keys, settings, the cache

ESCAPED = "".join(f"\\u{ord(c):04x}" for c in KEY)


@pytest.mark.parametrize(
    "reply",
    [
        (200, {}, f"not JSON {KEY}"),
        (401, {}, f"bad {KEY}"),
        (500, {}, f'{{"error": {{"message": "bad {KEY}"}}}}'),
        (302, {"Location": f"http://{KEY}@example.org/"}, ""),
        (429, {"Retry-After": KEY}, ""),
        (200, {"Content-Encoding": KEY}, ""),
    ],
)
def test_the_key_is_in_no_message(reply: Reply, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_KEY", KEY)
    with serving(lambda *_: reply) as server, pytest.raises(AlignlabError) as error:
        ask(asking(server.url, key_variable="MY_KEY"))
    assert KEY not in str(error.value)


def test_an_escaped_key_is_not_kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("MY_KEY", KEY)
    with serving(lambda *_: (200, {}, body("X").replace("X", ESCAPED))) as server:
        assert KEY not in ask(asking(server.url, key_variable="MY_KEY", cache=str(tmp_path / "c"))).text
    assert not any(KEY.encode() in p.read_bytes() for p in (tmp_path / "c").rglob("*") if p.is_file())


@pytest.mark.parametrize(
    "settings",
    [
        {"base_url": "http://["},
        {"base_url": "http://localhost:99999/v1"},
        {"base_url": "http://localhost:x/v1"},
        {"base_url": "http:///v1"},
        {"base_url": "http://a b/v1"},
        {"base_url": "http://a\n/v1"},
        {"timeout": float("inf")},
        {"timeout": float("nan")},
        {"parameters": {"stream": True}},
        {"parameters": {"messages": []}},
    ],
    ids=str,
)
def test_settings_that_cannot_work_are_refused_at_once(settings: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=rf"^scoring\.endpoint\.{next(iter(settings))}"):
        Endpoint(**{"model": "m", "base_url": "http://localhost/v1", **settings})


@pytest.mark.parametrize("parameters", [{"temperature": float("nan")}, {"x": {1, 2}}, {"x": "\ud800"}], ids=str)
def test_parameters_that_cannot_be_sent(parameters: dict[str, Any]) -> None:
    with serving(lambda *_: "1") as server, pytest.raises(AlignlabError, match=r"(cannot be sent|not allowed)"):
        ask(asking(server.url, parameters=parameters))
    assert not server.requests


KEPT: list[Any] = [
    "not JSON",
    "7",
    "[]",
    "{}",
    '{"text": 5}',
    '{"text": "1", "tokens": [[1]]}',
    {"a": "pickle"},
    "[" * 10**5,
]


@pytest.mark.parametrize("kept", KEPT, ids=[f"{k!r:.30}" for k in KEPT])
def test_a_cache_of_something_else(kept: Any, tmp_path: Path) -> None:
    import diskcache

    from alignlab.scoring.endpoint import PARAMETERS, question_key

    key = question_key("m", [{"role": "user", "content": "q"}], dict(PARAMETERS))
    with diskcache.Cache(str(tmp_path / "c")) as cache:
        cache[key] = kept
    with (
        serving(lambda *_: "1") as server,
        pytest.raises(ConfigError, match=r"^scoring\.endpoint\.cache=.*(answers|cannot be used)"),
    ):
        ask(asking(server.url, cache=str(tmp_path / "c")))
    assert not server.requests


def test_an_error_of_the_judge_is_one_line_of_the_command(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from alignlab.cli import main
    from tests.training import runs

    runs.prepare(tmp_path)
    monkeypatch.chdir(tmp_path)
    replies = iter([body("\ud800"), DEEP, "<html>"])
    with serving(lambda *_: (200, {}, next(replies, "<html>"))) as server:
        words = [f"model={tmp_path}/base", "data=prompts", f"data.path={tmp_path}/prompts.jsonl", "group_size=1"]
        words += ["rollout.max_new_tokens=3", "scoring=judge_scores", "scoring.endpoint.model=m", f"out={tmp_path}/out"]
        words += [f"scoring.endpoint.base_url={server.url}", "scoring.endpoint.retries=0"]
        assert main(["sample", *words]) == 2
    said = capfd.readouterr().err
    assert re.search(r"^alignlab: scoring\.endpoint\.base_url=.*no chat completion", said, re.M), said
    assert "Traceback" not in said
