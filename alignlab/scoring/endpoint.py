"""A model behind an OpenAI-compatible endpoint: questions in, answers out, each paid for once."""

from __future__ import annotations

import atexit
import importlib.util
import logging
import os
import re
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from types import MappingProxyType
from typing import Any, NoReturn, TypeVar
from urllib.parse import urlsplit

from alignlab.core import AlignlabError, ConfigError, require
from alignlab.core.errors import shorten
from alignlab.core.progress import progress
from alignlab.core.secrets import HIDDEN, SECRET_VALUE, find_secret
from alignlab.scoring.judge_answers import Answer
from alignlab.scoring.judge_cache import KEY, AnswerCache, question_key

log = logging.getLogger(__name__)

Item = TypeVar("Item")
Result = TypeVar("Result")
Message = dict[str, str]

PARAMETERS: Mapping[str, Any] = MappingProxyType({"temperature": 0.0, "max_tokens": 16})
TELL_EVERY = 60.0
"""Seconds between two lines about the cost."""
FIRST_WAIT, LONGEST_WAIT = 0.5, 8.0
"""Seconds before a question is asked again: doubled each time, unless the endpoint says how long to wait."""
LONGEST_RETRY_AFTER = 600.0
"""Seconds that an endpoint may ask to wait; where it asks for more the command ends instead, and says so."""
OURS = ("model", "messages", "stream", "n")
"""Fields of a request that are no parameters."""


@dataclass
class Usage:
    """What has been asked so far, by this process.

    Attributes:
        requests: questions sent, in however many tries.
        cache_hits: questions answered from the cache.
        retries: tries after the first, for time-outs, lost connections, status 408, 409, 429 and 5xx, garbled replies.
        prompt_tokens, completion_tokens: as the endpoint counts them.
        uncounted: replies without usable counts of tokens. For the cost they are taken as a token for each byte, which
            no tokenizer exceeds.
        cost: by the prices given, in their currency.
    """

    requests: int = 0
    cache_hits: int = 0
    retries: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    uncounted: int = 0
    cost: float = 0.0


class _Failed(Exception):
    """One try that brought no answer.

    Attributes:
        what, why: its reason, before and after the number of tries.
        again: whether another try may bring one.
        after: seconds to wait before it, where the endpoint says so.
    """

    def __init__(self, what: str, why: str, again: bool = True, after: float | None = None) -> None:
        super().__init__(what)
        self.what, self.why, self.again, self.after = what, why, again, after


class Endpoint:
    """Asks a model over `/chat/completions`; nothing is sent, read or opened before the first question.

    Args:
        model: its name there.
        base_url: the address up to `/v1`.
        key_variable: name of the environment variable that holds the key. Where there is none, as for local servers,
            a placeholder is sent. The key itself has no place in a config.
        parameters: fields of the request besides model and messages; null leaves one out.
        timeout: seconds to wait for an answer, to its last byte, > 0.
        retries: tries after the first, with exponential back-off, or as long as the endpoint's Retry-After says: up to
            ten minutes. Where it says more, the command ends: the same one goes on later, by the answers kept.
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
        try:
            address = urlsplit(base_url)
            good = address.scheme in ("http", "https") and bool(address.hostname) and address.port != 0
            good = good and base_url.isprintable() and " " not in base_url
        except ValueError:  # no port, no host
            address, good = urlsplit(""), False
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
        require(good, f"{KEY}.base_url", base_url, "must be an address, as in http://localhost:8000/v1")
        require(bool(model), f"{KEY}.model", model, "must name a model")
        require(0 < timeout < float("inf"), f"{KEY}.timeout", timeout, "must be > 0, and finite")
        require(retries >= 0, f"{KEY}.retries", retries, "must be at least 0")
        require(concurrency >= 1, f"{KEY}.concurrency", concurrency, "must be at least 1")
        require(min(price_prompt, price_completion) >= 0, f"{KEY}.price_prompt", price_prompt, "must not be negative")
        for name, limit in (("max_requests", max_requests), ("max_cost", max_cost)):
            require(limit is None or limit > 0, f"{KEY}.{name}", limit, "must be > 0, or null for no limit")
        if max_cost is not None and not (price_prompt or price_completion):
            raise ConfigError(f"{KEY}.max_cost={max_cost}: needs {KEY}.price_prompt and price_completion")
        for name in OURS:
            require(name not in parameters, f"{KEY}.parameters.{name}", parameters.get(name), "cannot be chosen")
        for package in ("openai", "diskcache"):
            if importlib.util.find_spec(package) is None:
                raise ConfigError(f"scoring: a judge needs the package {package}: pip install 'alignlab[judge]'")
        self.model, self.base_url, self.key_variable = model, base_url, key_variable
        self.parameters = {k: v for k, v in parameters.items() if v is not None}
        self.timeout, self.retries, self.concurrency = timeout, retries, concurrency
        self.price_prompt, self.price_completion = price_prompt, price_completion
        self.max_requests, self.max_cost = max_requests, max_cost
        self.cache, self.usage = AnswerCache(cache), Usage()
        self._lock, self._over = threading.Lock(), threading.Event()
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
            return self._checked(kept)
        self._reserve()
        answer = self._request(messages, parameters)
        return self._checked(self.cache.put(key, asdict(answer)))

    def _checked(self, kept: Any) -> Answer:
        """An answer from the cache, whose folder may come from elsewhere."""
        try:
            return Answer.kept(kept)
        except ValueError:
            raise ConfigError(
                f"{KEY}.cache={self.cache.path!r}: holds something else than answers: give another folder, or null"
            ) from None

    def map(self, function: Callable[[Item], Result], items: Sequence[Item]) -> dict[Item, Result]:
        """`function` of each item, `concurrency` at once. After a failure nothing new is begun; what is under way is
        waited for, and its answers kept."""
        found: dict[Item, Result] = {}
        self._over.clear()
        with ThreadPoolExecutor(self.concurrency, thread_name_prefix="judge") as pool:
            futures = {pool.submit(function, item): item for item in dict.fromkeys(items)}
            try:
                for future in progress(as_completed(futures), f"judge {self.model}", len(futures)):
                    found[futures[future]] = future.result()
            except BaseException:
                self._over.set()
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
        if usage.uncounted and usage.cost:
            text += f" ({usage.uncounted:,} replies without usable counts, taken as a token for each byte)"
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
            asked = self.usage.requests
            if self.max_requests is not None and asked >= (self.max_requests + world - 1 - rank) // world:
                self._stop("max_requests", self.max_requests)
            self._check_cost()
            self.usage.requests += 1

    def _check_cost(self) -> None:
        if self.max_cost is not None and self.usage.cost >= self.max_cost / int(os.environ.get("WORLD_SIZE", "1")):
            self._stop("max_cost", self.max_cost)

    def _pay(self, messages: Sequence[Message], answer: Answer) -> None:
        """Count what a reply cost. Counts that the endpoint does not give are set so high that `max_cost` holds."""
        prompt, completion = answer.prompt_tokens, answer.completion_tokens
        with self._lock:
            usage = self.usage
            usage.prompt_tokens += prompt
            usage.completion_tokens += completion
            usage.uncounted += not prompt or (not completion and bool(answer.text))
            prompt = prompt or sum(len(text.encode()) for m in messages for text in m.values())
            completion = completion or len(answer.text.encode())
            usage.cost += (prompt * self.price_prompt + completion * self.price_completion) / 1e6

    def _stop(self, name: str, limit: float) -> NoReturn:
        spent = f"{self.usage.requests:,} requests" + (f", cost {self.usage.cost:.4f}" if name == "max_cost" else "")
        raise AlignlabError(
            f"{KEY}.{name}={limit}: the limit is reached ({spent}). {self._kept}: "
            "raise the limit and run the same command again to go on"
        )

    @property
    def _kept(self) -> str:
        return f"All answers are in {self.cache.path}" if self.cache.path else "The answers are lost (no cache)"

    def _request(self, messages: Sequence[Message], parameters: Mapping[str, Any]) -> Answer:
        """Ask the endpoint, again where that may help."""
        wait = FIRST_WAIT
        for attempt in range(self.retries + 1):
            try:
                return self._try(messages, parameters)
            except _Failed as failed:
                tries = f" after {attempt + 1} tries" if attempt else ""
                if not failed.again or attempt == self.retries:
                    raise self._failure(f"{failed.what}{tries}{failed.why}") from None
                if failed.after is not None and failed.after > LONGEST_RETRY_AFTER:
                    raise self._failure(
                        f"{failed.what}{tries}{failed.why}. No more than {LONGEST_RETRY_AFTER:.0f} s are waited: run "
                        f"the same command again later. {self._kept}"
                    ) from None
                pause = wait if failed.after is None else failed.after
            wait = min(2 * wait, LONGEST_WAIT)
            with self._lock:
                self._check_cost()
                self.usage.retries += 1
            if pause > LONGEST_WAIT:
                log.warning("judge %s: asked to wait %.0f s (Retry-After)", self.model, pause)
            if self._over.wait(pause):
                break
        raise self._failure("given up, since another question failed")

    def _try(self, messages: Sequence[Message], parameters: Mapping[str, Any]) -> Answer:
        """Ask the endpoint once."""
        import openai

        from alignlab.scoring.judge_http import HTTP, Refused, retry_after

        create = self._connect().chat.completions.with_raw_response.create
        try:
            reply = create(model=self.model, messages=list(messages), extra_body=dict(parameters)).http_response
        except openai.APIStatusError as error:
            status, headers = error.status_code, error.response.headers
            wished, place = headers.get("retry-after", ""), headers.get("location", "")
            again = (status in (408, 409, 429) or status >= 500) and headers.get("x-should-retry") != "false"
            why = f", Retry-After: {self._hide(wished)[:40]}" if wished else ""
            why += f", a redirect to {self._hide(place)}: give that address" if status < 400 and place else ""
            why += f": {self._hide(_text_of(error.response))}{self._hint(status)}"
            raise _Failed(f"status {status}", why, again, retry_after(headers)) from None
        except openai.APITimeoutError:
            raise _Failed(f"no answer within {self.timeout:g} s", f": raise {KEY}.timeout?") from None
        except openai.APIConnectionError as error:
            cause = error.__cause__ or error
            if isinstance(cause, Refused | UnicodeError):
                raise _Failed(self._hide(str(cause)), "", again=False) from None
            begun = not isinstance(cause, HTTP.ConnectError)
            what = "the connection broke" if begun else "no connection"
            raise _Failed(what, f" ({self._hide(str(cause))}){'' if begun else ': is it running?'}") from None
        except Exception as error:  # the client refuses to send it
            raise _Failed(f"the request cannot be sent ({self._hide(shorten(error))})", "", again=False) from None
        body = _text_of(reply)
        try:
            answer = Answer.read(body, self._without_key)
        except ValueError:
            self._pay(messages, Answer(""))
            raise _Failed("the reply is no chat completion", f": {self._hide(body)}") from None
        self._pay(messages, answer)
        return answer

    def _connect(self) -> Any:
        """The client, made when first needed."""
        import openai

        if not self._key.isascii() or any(c <= " " for c in self._key):  # the client's own message would show it
            raise ConfigError(
                f"{self.key_variable}: the key in this environment variable has a space or odd sign in it"
            )
        with self._lock:
            if self._client is None:
                from alignlab.scoring.judge_http import make_client

                self._client = openai.OpenAI(
                    api_key=self._key or "none",
                    base_url=self.base_url,
                    timeout=self.timeout,
                    max_retries=0,  # by itself it would wait as long as it likes
                    http_client=make_client(self.timeout),
                )
            return self._client

    def _failure(self, reason: str) -> AlignlabError:
        return AlignlabError(f"{KEY}.base_url={self.base_url}, model {self.model}: {reason}")

    def _hint(self, status: int) -> str:
        if status in (401, 403):
            there = "is refused" if self._key else "is not set"
            return f" (the key in the environment variable {self.key_variable} {there})"
        if status == 404:
            return f" (is {KEY}.model={self.model} served there?)"
        return f" (for endpoints without log-probs: scoring.soft=false; see {KEY}.parameters)" if status == 400 else ""

    def _without_key(self, text: str) -> str:
        return text.replace(self._secret, HIDDEN) if self._secret else text

    def _hide(self, text: str) -> str:
        """The beginning of what someone else said, in one line and without secrets."""
        return " ".join(SECRET_VALUE.sub(HIDDEN, self._without_key(text)).split())[:200] or "(nothing)"


def _text_of(response: Any) -> str:
    """The body of a reply. JSON is UTF-8, whatever its headers say."""
    return bytes(response.content).decode("utf-8-sig", "replace")
