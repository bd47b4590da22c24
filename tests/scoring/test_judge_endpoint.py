"""The line to a judge: retries, limits, the cache, the cost, and a key that stays secret; against a real server."""

from __future__ import annotations

import logging
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from alignlab.core import AlignlabError, ConfigError
from alignlab.scoring import Endpoint
from alignlab.scoring.endpoint import AnswerCache, question_key
from tests.components import need
from tests.scoring.judge_server import Reply, Server, completion, serving
from tests.training import forks

need("openai")

SECRET = "sk-Zq7wv93kLmN2pXbT5rUyHc"


@pytest.fixture
def serve() -> Iterator[Callable[..., Server]]:
    with ExitStack() as stack:
        yield lambda answer, delay=0.0: stack.enter_context(serving(answer, delay))


def endpoint(url: str, cache: Path | None = None, **settings: Any) -> Endpoint:
    return Endpoint("m", url, cache=str(cache) if cache else None, **{"retries": 0, "timeout": 20.0, **settings})


def user(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


def echo(body: dict[str, Any], _: int) -> str:
    return str(body["messages"][-1]["content"])


# Failures


def test_too_many_requests_then_success_after_the_wait_asked_for(serve: Callable[..., Server]) -> None:
    server = serve(lambda body, n: (429, {"Retry-After": "1"}, '{"error": {"message": "slow"}}') if n == 0 else "ok")
    made = endpoint(server.url, retries=2)
    assert made.ask(user("q")).text == "ok"
    assert server.times[1] - server.times[0] >= 1.0
    assert (made.usage.requests, made.usage.retries, made.usage.prompt_tokens) == (1, 1, 10)


def test_server_errors_are_retried_with_growing_waits(serve: Callable[..., Server]) -> None:
    """The client waits 0.5 s, then 1 s, each less up to a quarter of it."""
    server = serve(lambda body, n: (500, {}, "boom") if n < 2 else "ok")
    assert endpoint(server.url, retries=2).ask(user("q")).text == "ok"
    waits = [b - a for a, b in zip(server.times, server.times[1:], strict=False)]
    assert waits[0] >= 0.375
    assert waits[1] >= 0.75


def test_server_errors_without_end(serve: Callable[..., Server]) -> None:
    server = serve(lambda *_: (503, {}, "out of\norder"))
    with pytest.raises(AlignlabError) as error:
        endpoint(server.url, retries=1).ask(user("q"))
    assert str(error.value) == (
        f"scoring.endpoint.base_url={server.url}, model m: status 503 after 2 tries: out of order"
    )
    assert len(server.requests) == 2


@pytest.mark.parametrize(
    ("status", "hint"),
    [(400, "scoring.soft=false"), (401, "variable JUDGE_KEY is not set"), (404, "scoring.endpoint.model=m served")],
)
def test_what_is_wrong_with_the_request_is_said_at_once(serve: Callable[..., Server], status: int, hint: str) -> None:
    server = serve(lambda *_: (status, {}, "no"))
    with pytest.raises(AlignlabError, match=rf"status {status}: no \(.*{hint}"):
        endpoint(server.url, retries=3, key_variable="JUDGE_KEY").ask(user("q"))
    assert len(server.requests) == 1


def test_nobody_listens() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}/v1"
    begun = time.monotonic()
    with pytest.raises(AlignlabError, match=rf"base_url={url}, .*no connection after 2 tries \(.*is it running"):
        endpoint(url, retries=1).ask(user("q"))
    assert time.monotonic() - begun >= 0.375


def test_an_answer_that_does_not_come(serve: Callable[..., Server]) -> None:
    slow = serve(echo, 1.5)
    with pytest.raises(AlignlabError, match=r"no answer within 0\.2 s after 2 tries: raise scoring\.endpoint\.timeout"):
        endpoint(slow.url, retries=1, timeout=0.2).ask(user("q"))
    assert len(slow.requests) == 2


@pytest.mark.parametrize("body", ["<html>not JSON", '{"choices": []}', "[]", '{"choices": [{"message": null}]}'])
def test_garbage(serve: Callable[..., Server], body: str) -> None:
    once = serve(lambda _, n: (200, {}, body) if n == 0 else "ok")
    made = endpoint(once.url, retries=1)
    assert made.ask(user("q")).text == "ok"
    assert made.usage.retries == 1
    always = serve(lambda *_: (200, {}, body))
    with pytest.raises(AlignlabError, match=r"the reply is no chat completion: ") as error:
        endpoint(always.url).ask(user("q"))
    assert always.url in str(error.value) and body[:10] in str(error.value)


# Many at once


def test_questions_run_side_by_side_and_no_more_than_allowed(serve: Callable[..., Server]) -> None:
    server = serve(echo, 0.2)
    made = endpoint(server.url, concurrency=3)
    begun = time.monotonic()
    found = made.map(lambda q: made.ask(user(q)).text, [f"q{i}" for i in range(9)])
    assert found == {f"q{i}": f"q{i}" for i in range(9)}
    assert server.most == 3
    assert time.monotonic() - begun < 9 * 0.2, "faster than one after the other"


def test_after_a_failure_nothing_new_is_asked_and_answers_are_kept(
    serve: Callable[..., Server], tmp_path: Path
) -> None:
    def answer(body: dict[str, Any], _: int) -> str | Reply:
        return (400, {}, "no") if body["messages"][0]["content"] == "q1" else "ok"

    server = serve(answer, 0.1)
    made = endpoint(server.url, tmp_path / "c", concurrency=2)
    with pytest.raises(AlignlabError, match="status 400"):
        made.map(lambda q: made.ask(user(q)), [f"q{i}" for i in range(50)])
    asked = len(server.requests)
    assert asked < 10
    time.sleep(0.3)
    assert len(server.requests) == asked
    again = endpoint(server.url, tmp_path / "c")
    for request in list(server.requests):
        if request["messages"][0]["content"] != "q1":
            assert again.ask(request["messages"]).text == "ok"
    assert (again.usage.requests, len(server.requests)) == (0, asked)


# The cache


def test_what_is_cached_is_not_asked_again_after_a_restart(serve: Callable[..., Server], tmp_path: Path) -> None:
    tops = [("1", {"1": 0.75, "2": 0.25})]
    server = serve(lambda *_: completion("1", tops, (7, 3)))
    path = tmp_path / "folder" / "judge.sqlite"
    first = endpoint(server.url, path).ask(user("q"), 5)
    made = endpoint("http://127.0.0.1:9/v1", path)
    second = made.ask(user("q"), 5)
    assert second == first
    assert (first.text, len(first.tokens[0][1])) == ("1", 2)
    assert (made.usage.requests, made.usage.cache_hits, made.usage.prompt_tokens) == (0, 1, 0)
    for changed in (lambda e: e.ask(user("other"), 5), lambda e: e.ask(user("q"), 4), lambda e: e.ask(user("q"))):
        count = len(server.requests)
        changed(endpoint(server.url, path))
        assert len(server.requests) == count + 1, "another question, or other parameters"
    endpoint(server.url, path, parameters={"temperature": 1.0}).ask(user("q"), 5)
    Endpoint("other", server.url, cache=str(path)).ask(user("q"), 5)
    assert len(server.requests) == 6


def test_the_key_depends_on_what_decides_the_answer_not_on_the_order_of_fields() -> None:
    key = question_key("m", user("q"), {"a": 1, "b": 2})
    assert key == question_key("m", user("q"), {"b": 2, "a": 1})
    others = [("n", user("q"), {"a": 1, "b": 2}), ("m", user("r"), {"a": 1, "b": 2}), ("m", user("q"), {"a": 1})]
    assert len({key, *(question_key(*o) for o in others)}) == 4


def test_the_first_answer_stands(tmp_path: Path) -> None:
    a, b = AnswerCache(str(tmp_path / "c")), AnswerCache(str(tmp_path / "c"))
    assert a.get("k") is None
    assert b.put("k", {"n": 1}) == {"n": 1}
    assert a.put("k", {"n": 2}) == {"n": 1}
    assert a.get("k") == b.get("k") == {"n": 1}


def test_several_processes_write_at_once(tmp_path: Path) -> None:
    path = str(tmp_path / "c")

    def write(name: str) -> None:
        cache = AnswerCache(path)
        for i in range(60):
            cache.put(f"shared{i}", {"by": name})
            cache.put(f"{name}{i}", i)

    running = [forks.fork(partial(write, name), tmp_path / "log") for name in "xyz"]
    assert [forks.wait(pid) for pid in running] == [0, 0, 0], (tmp_path / "log").read_text()
    cache = AnswerCache(path)
    assert [cache.get(f"{name}{i}") for name in "xyz" for i in range(60)] == [*range(60)] * 3
    assert all(cache.get(f"shared{i}")["by"] in "xyz" for i in range(60))


def test_a_killed_run_loses_no_answer(serve: Callable[..., Server], tmp_path: Path) -> None:
    server = serve(echo, 0.02)

    def ask() -> None:
        made = Endpoint("m", server.url, cache=str(tmp_path / "c"), concurrency=1)
        made.map(lambda q: made.ask(user(q)), [f"q{i}" for i in range(1000)])

    running = forks.fork(ask, tmp_path / "log")
    deadline = time.monotonic() + 120
    while len(server.requests) < 8 and time.monotonic() < deadline:
        time.sleep(0.02)
    os.kill(running, signal.SIGKILL)
    assert forks.wait(running) == -signal.SIGKILL, (tmp_path / "log").read_text()
    asked = len(server.requests)
    assert asked >= 8
    made = endpoint(server.url, tmp_path / "c")
    # One after the other: when question n arrives, the answers before it are kept. The last may have been under way.
    for i in range(asked - 1):
        assert made.ask(user(f"q{i}")).text == f"q{i}"
    assert (made.usage.cache_hits, made.usage.requests) == (asked - 1, 0)


def test_a_cache_that_cannot_be(serve: Callable[..., Server], tmp_path: Path) -> None:
    server = serve(echo)
    (tmp_path / "text").write_text("this is no database, and long enough to be seen as none" * 20)
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "cache.db").write_text("this is no database, and long enough to be seen as none" * 20)
    for path in (tmp_path / "text", tmp_path / "broken", tmp_path / "text" / "below"):
        with pytest.raises(ConfigError, match=r"^scoring\.endpoint\.cache=.*cannot be used"):
            endpoint(server.url, path).ask(user("q"))
    assert not server.requests, "found out before anything is paid for"


# Cost and limits


def test_the_cost_by_hand(serve: Callable[..., Server], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """3 × (1,000 × 2.5 + 20 × 10) / 10⁶ = 0.0081."""
    server = serve(lambda *_: completion("1", usage=(1000, 20)))
    made = endpoint(server.url, tmp_path / "c", price_prompt=2.5, price_completion=10.0)
    for question in ("a", "b", "a", "c"):
        made.ask(user(question))
    usage = made.usage
    assert (usage.requests, usage.cache_hits, usage.prompt_tokens, usage.completion_tokens) == (3, 1, 3000, 60)
    assert usage.cost == pytest.approx(0.0081, abs=1e-12)
    made.tell(", and more")
    made.tell("not yet")
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("judge ")]
    assert said == ["judge m: 3 requests (0 tried again), 1 from the cache, 3,000 + 60 tokens, cost 0.0081, and more"]
    made._tell_rest()
    assert "not yet" in capsys.readouterr().err


def test_a_server_that_counts_no_tokens(serve: Callable[..., Server]) -> None:
    made = endpoint(serve(lambda *_: completion("1", usage=None)).url)
    assert made.ask(user("q")).text == "1"
    assert (made.usage.requests, made.usage.prompt_tokens) == (1, 0)


def test_a_limit_stops_and_loses_nothing(serve: Callable[..., Server], tmp_path: Path) -> None:
    server = serve(echo)
    questions = [f"q{i}" for i in range(10)]
    made = endpoint(server.url, tmp_path / "c", max_requests=4)
    match = r"^scoring\.endpoint\.max_requests=4: the limit is reached \(4 requests\)\. All answers are in .*raise"
    with pytest.raises(AlignlabError, match=match):
        made.map(lambda q: made.ask(user(q)), questions)
    assert len(server.requests) == 4
    again = endpoint(server.url, tmp_path / "c")
    assert again.map(lambda q: again.ask(user(q)).text, questions) == {q: q for q in questions}
    assert (again.usage.cache_hits, again.usage.requests) == (4, 6)


def test_a_limit_of_cost(serve: Callable[..., Server]) -> None:
    """Each question costs 0.001: after three of them 0.003 is reached."""
    server = serve(lambda *_: completion("1", usage=(100, 0)))
    made = endpoint(server.url, concurrency=1, price_prompt=10.0, max_cost=0.0029)
    with pytest.raises(AlignlabError, match=r"max_cost=0\.0029: the limit is reached \(3 requests, cost 0\.0030\)"):
        made.map(lambda q: made.ask(user(q)), [*"abcdef"])
    assert len(server.requests) == 3


def test_a_limit_is_shared_by_the_processes(serve: Callable[..., Server], monkeypatch: pytest.MonkeyPatch) -> None:
    counts = []
    for rank in range(3):
        monkeypatch.setenv("WORLD_SIZE", "3")
        monkeypatch.setenv("RANK", str(rank))
        server = serve(echo)
        made = endpoint(server.url, max_requests=7)
        with pytest.raises(AlignlabError, match="max_requests=7"):
            made.map(lambda q, made=made: made.ask(user(q)), [*"abcdef"])  # type: ignore[misc]
        counts.append(len(server.requests))
    assert counts == [3, 2, 2]


# The key


@pytest.mark.parametrize("secret", [SECRET, "no-known-kind-of-key"])
def test_the_key_is_sent_and_seen_nowhere(
    secret: str, serve: Callable[..., Server], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    """Even where the server repeats it, in an answer or in its refusal, and with all logging on."""
    caplog.set_level(logging.DEBUG)
    monkeypatch.setenv("MY_KEY", f" {secret}\n")
    server = serve(lambda *_: f"your key is {secret}")
    made = endpoint(server.url, tmp_path / "c", key_variable="MY_KEY")
    assert made.ask(user("q")).text == "your key is <secret>"
    assert server.headers[0]["authorization"] == f"Bearer {secret}"
    made.tell()
    messages = []
    for status in (401, 500, 429):
        refusing = serve(lambda *_, status=status: (status, {}, f'{{"error": {{"message": "bad key {secret}"}}}}'))
        with pytest.raises(AlignlabError) as error:
            endpoint(refusing.url, key_variable="MY_KEY").ask(user("q"))
        messages.append(str(error.value))
    assert "bad key <secret>" in messages[0] and "MY_KEY is refused" in messages[0]
    garbage = serve(lambda *_: (200, {}, f"not JSON {secret}"))
    with pytest.raises(AlignlabError, match="not JSON <secret>"):
        endpoint(garbage.url, key_variable="MY_KEY").ask(user("q"))
    out, err = capfd.readouterr()
    seen = [out, err, caplog.text, repr(made), repr(made.usage), *messages]
    assert caplog.text, "the client's own log is on"
    assert not any(secret in text for text in seen)
    assert not any(secret.encode() in path.read_bytes() for path in (tmp_path / "c").rglob("*") if path.is_file())


def test_no_key_is_needed_locally(serve: Callable[..., Server], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    server = serve(echo)
    assert endpoint(server.url).ask(user("q")).text == "q"
    assert server.headers[0]["authorization"] == "Bearer none"


@pytest.mark.parametrize("key", [SECRET + " x", SECRET + "\nx", SECRET + "ü"])
def test_a_key_that_cannot_be_sent(key: str, monkeypatch: pytest.MonkeyPatch, serve: Callable[..., Server]) -> None:
    monkeypatch.setenv("MY_KEY", key)
    with pytest.raises(ConfigError, match=r"^MY_KEY: the key in this environment variable has") as error:
        endpoint(serve(echo).url, key_variable="MY_KEY").ask(user("q"))
    assert SECRET not in str(error.value)


@pytest.mark.parametrize(
    ("settings", "place"),
    [
        ({"key_variable": SECRET}, "key_variable"),
        ({"key_variable": "abcdef0123456789"}, "key_variable"),
        ({"model": SECRET}, "model"),
        ({"base_url": f"https://me:{SECRET}@example.org/v1"}, "base_url"),
        ({"base_url": f"https://example.org/v1?key={SECRET}"}, "base_url"),
        ({"base_url": "https://abc@example.org/v1"}, "base_url"),
        ({"parameters": {"api_key": "abc"}}, "parameters.api_key"),
        ({"parameters": {"extra": [{"x": SECRET}]}}, "parameters.extra.0.x"),
        ({"model": "no-known-kind-of-key"}, "model"),
    ],
)
def test_a_config_that_carries_a_key_is_refused(
    settings: dict[str, Any], place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "no-known-kind-of-key")
    with pytest.raises(ConfigError, match=rf"^scoring\.endpoint\.{place}: ") as error:
        Endpoint(**{"model": "m", **settings})
    shown = next(iter(settings.values()))
    assert SECRET not in str(error.value)
    assert not isinstance(shown, str) or shown not in str(error.value)


def test_a_package_that_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "openai", None)
    with pytest.raises(ConfigError, match=r"needs the package openai: pip install 'alignlab\[judge\]'"):
        Endpoint("m")


def test_settings_out_of_range() -> None:
    cases: list[dict[str, Any]] = [
        {"base_url": "localhost:8000"}, {"timeout": 0.0}, {"retries": -1}, {"concurrency": 0}, {"max_requests": 0},
        {"max_cost": 0.0}, {"price_prompt": -1.0}, {"max_cost": 1.0}, {"model": ""},
    ]  # fmt: skip
    for settings in cases:
        name = next(iter(settings))
        with pytest.raises(ConfigError, match=rf"^scoring\.endpoint\.{name}="):
            Endpoint(**{"model": "m", **settings})


def test_null_leaves_a_parameter_out(serve: Callable[..., Server]) -> None:
    server = serve(echo)
    endpoint(server.url, parameters={"max_tokens": None, "max_completion_tokens": 9, "top_k": 1}).ask(user("q"))
    assert server.requests[0] == {"model": "m", "messages": user("q"), "max_completion_tokens": 9, "top_k": 1}
