"""A model behind an OpenAI-compatible endpoint: questions in, answers out, each paid for once."""

from __future__ import annotations

import atexit
import hashlib
import importlib.util
import json
import os
import re
import sqlite3
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass, field
from types import MappingProxyType
from typing import Any, NoReturn, TypeVar
from urllib.parse import urlsplit

from alignlab.core import AlignlabError, ConfigError, require
from alignlab.core.progress import progress
from alignlab.core.secrets import HIDDEN, SECRET_VALUE, find_secret

Item = TypeVar("Item")
Result = TypeVar("Result")
Message = dict[str, str]

PARAMETERS: Mapping[str, Any] = MappingProxyType({"temperature": 0.0, "max_tokens": 16})
TELL_EVERY = 60.0
"""Seconds between two lines about the cost."""
FIRST_WAIT, LONGEST_WAIT = 0.5, 8.0
"""Seconds before a garbled reply is asked for again: doubled each time, as the client does for failed requests."""
KEY = "scoring.endpoint"
CACHE: Mapping[str, Any] = MappingProxyType(
    # Nothing is ever thrown away; the default journal, since write-ahead logs do not work on network drives.
    {"timeout": 60, "eviction_policy": "none", "cull_limit": 0, "sqlite_journal_mode": "delete"}
)
"""Settings of the cache on disk."""


def question_key(model: str, messages: Sequence[Message], parameters: Mapping[str, Any]) -> str:
    """SHA-256 of everything that decides an answer, in hex. The address does not: a server may move. A server that
    offers another model under the same name needs another cache."""
    text = json.dumps([model, list(messages), dict(parameters)], sort_keys=True, ensure_ascii=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()


class AnswerCache:
    """Answers that have been paid for, by key: on disk (`diskcache`), or in memory. For several threads and processes.

    An answer is written as soon as it is there: a run that is killed loses none. The folder holds hashes of questions
    and the answers, no question and no key of a service.

    Args:
        path: the folder, made when first used; None: keep answers in memory.
    """

    def __init__(self, path: str | None) -> None:
        self.path, self._lock = path, threading.Lock()
        self._kept: Any = {} if path is None else None

    def get(self, key: str) -> Any:
        """The answer, or None."""
        return self._run(lambda kept: kept.get(key))

    def put(self, key: str, answer: Any) -> Any:
        """Keep an answer. Returns what is kept: where another process was first, its answer, so that all agree."""
        add = dict.setdefault if self.path is None else lambda kept, *new: kept.add(*new, retry=True)
        self._run(lambda kept: add(kept, key, json.dumps(answer)))
        return self.get(key)

    def _run(self, do: Callable[[Any], Any]) -> Any:
        try:
            with self._lock:
                if self._kept is None:
                    import diskcache

                    self._kept = diskcache.Cache(self.path, **CACHE)
            found = do(self._kept)
        except (sqlite3.Error, OSError) as error:
            raise ConfigError(
                f"{KEY}.cache={self.path!r}: cannot be used ({error}): give another folder, or null for none"
            ) from error
        return json.loads(found) if isinstance(found, str) else None


@dataclass(frozen=True)
class Answer:
    """What the model said.

    Attributes:
        text: the answer, "" where there was none.
        tokens: for each token of the answer its text and the log-probs, in nats, of the likeliest alternatives by their
            text (the same text may come several times); empty where the endpoint gave none.
        prompt_tokens, completion_tokens: what was paid for; 0 where the endpoint does not say.
    """

    text: str
    tokens: list[tuple[str, list[tuple[str, float]]]] = field(default_factory=list)
    prompt_tokens: int = 0
    completion_tokens: int = 0

    @classmethod
    def read(cls, body: str) -> Answer:
        """From the body of a reply.

        Raises:
            ValueError: it is no chat completion.
        """
        try:
            reply = json.loads(body)
            choice, usage = reply["choices"][0], reply.get("usage") or {}
            listed = (choice.get("logprobs") or {}).get("content") or []
            return cls(
                str(choice["message"].get("content") or ""),
                [
                    (str(t["token"]), [(str(o["token"]), float(o["logprob"])) for o in t.get("top_logprobs") or []])
                    for t in listed
                ],
                int(usage.get("prompt_tokens") or 0),
                int(usage.get("completion_tokens") or 0),
            )
        except (KeyError, IndexError, TypeError, AttributeError, ValueError) as error:
            raise ValueError(f"{type(error).__name__}: {error}") from error


@dataclass
class Usage:
    """What has been asked so far, by this process.

    Attributes:
        requests: questions sent, in however many tries.
        cache_hits: questions answered from the cache.
        retries: tries after the first, for time-outs, lost connections, status 408, 409, 429 and 5xx, garbled replies.
        prompt_tokens, completion_tokens: as the endpoint counts them.
        cost: by the prices given, in their currency.
    """

    requests: int = 0
    cache_hits: int = 0
    retries: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cost: float = 0.0


class Endpoint:
    """Asks a model over `/chat/completions`; nothing is sent, read or opened before the first question.

    Args:
        model: its name there.
        base_url: the address up to `/v1`.
        key_variable: name of the environment variable that holds the key. Where there is none, as for local servers,
            a placeholder is sent. The key itself has no place in a config.
        parameters: fields of the request besides model and messages; null leaves one out.
        timeout: seconds to wait for an answer, > 0.
        retries: tries after the first, with exponential back-off, or as long as the endpoint's Retry-After says.
        concurrency: questions under way at once, in each process.
        cache: folder of the answers, shared by runs and processes; None: keep them in memory only.
        price_prompt, price_completion: of a million tokens, in any currency.
        max_requests: questions to send at most, over all processes, since the command was started; None: no limit.
        max_cost: the same for the cost. It is looked at before each question: those under way may exceed it.
    """

    def __init__(
        self,
        model: str,
        base_url: str = "https://api.openai.com/v1",
        key_variable: str = "OPENAI_API_KEY",
        parameters: Mapping[str, Any] = PARAMETERS,
        timeout: float = 60.0,
        retries: int = 8,
        concurrency: int = 8,
        cache: str | None = "runs/judge",
        price_prompt: float = 0.0,
        price_completion: float = 0.0,
        max_requests: int | None = None,
        max_cost: float | None = None,
    ) -> None:
        self._key = os.environ.get(key_variable, "").strip()
        self._secret = self._key if len(self._key) >= 8 else ""  # a local server's "EMPTY" may stand anywhere
        given = {"model": model, "base_url": base_url, "cache": cache, "parameters": parameters}
        address = urlsplit(base_url)
        found = find_secret(given, KEY, self._secret) or (
            f"{KEY}.base_url" if address.query or "@" in address.netloc else None
        )
        if not re.fullmatch(r"[A-Z_][A-Z0-9_]{0,63}", key_variable) or SECRET_VALUE.search(key_variable):
            raise ConfigError(
                f"{KEY}.key_variable: must be the NAME of an environment variable, as in OPENAI_API_KEY, not a key"
            )
        if found:
            raise ConfigError(
                f"{found}: looks like a secret, and configs are written down: put it in an environment variable and "
                f"give that one's name as {KEY}.key_variable"
            )
        good = address.scheme in ("http", "https") and bool(address.netloc)
        require(good, f"{KEY}.base_url", base_url, "must be an address, as in http://localhost:8000/v1")
        require(bool(model), f"{KEY}.model", model, "must name a model")
        require(timeout > 0, f"{KEY}.timeout", timeout, "must be > 0")
        require(retries >= 0, f"{KEY}.retries", retries, "must be at least 0")
        require(concurrency >= 1, f"{KEY}.concurrency", concurrency, "must be at least 1")
        require(min(price_prompt, price_completion) >= 0, f"{KEY}.price_prompt", price_prompt, "must not be negative")
        for name, limit in (("max_requests", max_requests), ("max_cost", max_cost)):
            require(limit is None or limit > 0, f"{KEY}.{name}", limit, "must be > 0, or null for no limit")
        if max_cost is not None and not (price_prompt or price_completion):
            raise ConfigError(f"{KEY}.max_cost={max_cost}: needs {KEY}.price_prompt and price_completion")
        for package in ("openai", "diskcache"):
            if importlib.util.find_spec(package) is None:
                raise ConfigError(f"scoring: a judge needs the package {package}: pip install 'alignlab[judge]'")
        self.model, self.base_url, self.key_variable = model, base_url, key_variable
        self.parameters = {k: v for k, v in parameters.items() if v is not None}
        self.timeout, self.retries, self.concurrency = timeout, retries, concurrency
        self.price_prompt, self.price_completion = price_prompt, price_completion
        self.max_requests, self.max_cost = max_requests, max_cost
        self.cache, self.usage = AnswerCache(cache), Usage()
        self._lock = threading.Lock()
        self._client: Any = None
        self._told, self._untold = -float("inf"), ""

    def ask(self, messages: Sequence[Message], alternatives: int = 0) -> Answer:
        """The answer to a conversation, from the cache where it is there. Safe to call from several threads.

        Args:
            alternatives: how many of the likeliest tokens to ask for at each place; 0: none.

        Raises:
            AlignlabError: the endpoint fails, with its address and status; or a limit is reached.
        """
        parameters = dict(self.parameters)
        if alternatives:
            parameters |= {"logprobs": True, "top_logprobs": alternatives}
        key = question_key(self.model, messages, parameters)
        kept = self.cache.get(key)
        if kept is not None:
            with self._lock:
                self.usage.cache_hits += 1
            return Answer(**kept)
        self._reserve()
        answer = self._request(messages, parameters)
        with self._lock:
            usage = self.usage
            usage.prompt_tokens += answer.prompt_tokens
            usage.completion_tokens += answer.completion_tokens
            usage.cost += (
                answer.prompt_tokens * self.price_prompt + answer.completion_tokens * self.price_completion
            ) / 1e6
        return Answer(**self.cache.put(key, asdict(answer)))

    def map(self, function: Callable[[Item], Result], items: Sequence[Item]) -> dict[Item, Result]:
        """`function` of each item, `concurrency` at once. After a failure nothing new is begun; what is under way is
        waited for, and its answers kept."""
        found: dict[Item, Result] = {}
        with ThreadPoolExecutor(self.concurrency, thread_name_prefix="judge") as pool:
            futures = {pool.submit(function, item): item for item in dict.fromkeys(items)}
            try:
                for future in progress(as_completed(futures), f"judge {self.model}", len(futures)):
                    found[futures[future]] = future.result()
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise
        return found

    def tell(self, more: str = "") -> None:
        """Say on the first process's stderr what was asked so far: at once, then once a minute, and at the end."""
        if os.environ.get("RANK", "0") != "0":
            return
        usage = self.usage
        text = (
            f"judge {self.model}: {usage.requests:,} requests ({usage.retries:,} tried again), {usage.cache_hits:,} "
            f"from the cache, {usage.prompt_tokens:,} + {usage.completion_tokens:,} tokens"
        )
        text += f", cost {usage.cost:.4f}" if self.price_prompt or self.price_completion else ""
        text += " in this process" if os.environ.get("WORLD_SIZE", "1") != "1" else ""
        if self._told < 0:
            atexit.register(self._tell_rest)
        self._untold = text + more
        if time.monotonic() - self._told >= TELL_EVERY:
            self._tell_rest()

    def _tell_rest(self) -> None:
        if self._untold:
            print(self._untold, file=sys.stderr)
        self._told, self._untold = time.monotonic(), ""

    def _reserve(self) -> None:
        """Count a question that is about to be sent, if the limits allow it."""
        world, rank = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))
        with self._lock:
            asked, cost = self.usage.requests, self.usage.cost
            if self.max_requests is not None and asked >= (self.max_requests + world - 1 - rank) // world:
                self._stop("max_requests", self.max_requests)
            if self.max_cost is not None and cost >= self.max_cost / world:
                self._stop("max_cost", self.max_cost)
            self.usage.requests += 1

    def _stop(self, name: str, limit: float) -> NoReturn:
        spent = f"{self.usage.requests:,} requests" + (f", cost {self.usage.cost:.4f}" if name == "max_cost" else "")
        kept = f"All answers are in {self.cache.path}: " if self.cache.path else "The answers are lost (no cache): "
        raise AlignlabError(
            f"{KEY}.{name}={limit}: the limit is reached ({spent}). {kept}"
            "raise the limit and run the same command again to go on"
        )

    def _request(self, messages: Sequence[Message], parameters: Mapping[str, Any]) -> Answer:
        """Ask the endpoint. The client tries again by itself where its request fails."""
        import openai

        body, wait = "", FIRST_WAIT
        for attempt in range(self.retries + 1):
            if attempt:
                time.sleep(wait)
                wait = min(2 * wait, LONGEST_WAIT)
            try:
                reply = self._connect().chat.completions.with_raw_response.create(
                    model=self.model, messages=list(messages), extra_body=dict(parameters)
                )
            except openai.APIStatusError as error:
                status, wished = error.status_code, error.response.headers.get("retry-after", "")
                after = f", Retry-After: {wished[:40]}" if wished else ""
                tries = "" if wished else self._tries(status in (408, 409, 429) or status >= 500)
                said = self._hide(error.response.text) + self._hint(status)
                raise self._failure(f"status {status}{tries}{after}: {said}") from None
            except openai.APITimeoutError:
                raise self._failure(
                    f"no answer within {self.timeout:g} s{self._tries()}: raise {KEY}.timeout?"
                ) from None
            except openai.APIConnectionError as error:
                raise self._failure(
                    f"no connection{self._tries()} ({self._hide(str(error.__cause__ or error))}): is it running?"
                ) from None
            body = reply.http_response.text
            with self._lock:
                self.usage.retries += reply.retries_taken + (attempt > 0)
            try:
                return Answer.read(body.replace(self._secret, HIDDEN) if self._secret else body)
            except ValueError:
                continue
        raise self._failure(f"the reply is no chat completion{self._tries()}: {self._hide(body)}")

    def _connect(self) -> Any:
        """The client, made when first needed."""
        import openai

        if not self._key.isascii() or any(c <= " " for c in self._key):  # the client's own message would show it
            raise ConfigError(
                f"{self.key_variable}: the key in this environment variable has a space or odd sign in it"
            )
        with self._lock:
            if self._client is None:
                self._client = openai.OpenAI(
                    api_key=self._key or "none", base_url=self.base_url, timeout=self.timeout, max_retries=self.retries
                )
            return self._client

    def _failure(self, reason: str) -> AlignlabError:
        return AlignlabError(f"{KEY}.base_url={self.base_url}, model {self.model}: {reason}")

    def _tries(self, several: bool = True) -> str:
        return f" after {self.retries + 1} tries" if several and self.retries else ""

    def _hint(self, status: int) -> str:
        if status in (401, 403):
            there = "is refused" if self._key else "is not set"
            return f" (the key in the environment variable {self.key_variable} {there})"
        if status == 404:
            return f" (is {KEY}.model={self.model} served there?)"
        return f" (for endpoints without log-probs: scoring.soft=false; see {KEY}.parameters)" if status == 400 else ""

    def _hide(self, text: str) -> str:
        """The beginning of what someone else said, in one line and without secrets."""
        clean = text.replace(self._secret, HIDDEN) if self._secret else text
        return " ".join(SECRET_VALUE.sub(HIDDEN, clean).split())[:200] or "(nothing)"
