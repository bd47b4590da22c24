"""A `Sampler` whose responses come from a vLLM server."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from itertools import groupby
from typing import Any

from alignlab.core import AlignlabError, ConfigError, Group, NonFiniteError
from alignlab.data.progress import progress
from alignlab.models import PackedModel
from alignlab.rollout.batching import Row
from alignlab.rollout.local import LocalEngine
from alignlab.rollout.settings import RolloutSettings
from alignlab.rollout.vllm.client import ServerLost
from alignlab.rollout.vllm.run import VllmRun

AT_ONCE = 64
"""Requests under way: the server orders its work itself, it only has to know of enough."""

IMPOSSIBLE = -1000.0
"""Below this a log-prob stands for minus infinity."""

BIAS = -100.0
"""Added to the logit of a token that must not come: the least that vLLM takes."""


class VllmEngine(LocalEngine):
    """Draws what `LocalEngine` would draw, from the same distribution and ending by the same rules, with other random
    numbers. A prompt's samples are one request with a seed of its own, so that other prompts change nothing, up to
    rounding of the logits (which here depends on what else is in the server's batch).

    Args:
        run: the server; it has been given the weights of `model`.
    """

    def __init__(self, model: PackedModel, settings: RolloutSettings, run: VllmRun, progress: bool = True) -> None:
        check_settings(settings)
        super().__init__(model, settings, progress)
        self.run, self._bar = run, progress
        self._vocabulary = int(model.config.vocab_size)

    def sample(self, groups: Sequence[Group], n: int, seed: int) -> list[Group]:
        """As `LocalEngine.sample`. Called by all processes of a run, each with its groups.

        Raises:
            ServerLost: on every process, where the server is gone.
        """
        with self.run.agreed():
            return super().sample(groups, n, seed)

    def sample_here(self, groups: Sequence[Group], n: int, seed: int) -> list[Group]:
        """The same, for this process alone and in any thread, without a bar."""
        self._bar = False
        return super().sample(groups, n, seed)

    def draw(
        self, rows: Sequence[Row], until: Callable[[Row], bool] | None = None, settings: RolloutSettings | None = None
    ) -> None:
        if until is not None:
            raise ConfigError("search: responses are drawn step by step, which a vLLM server cannot: use rollout=local")
        settings = settings or self.settings
        for row in rows:
            row.begun = len(row.tokens)
        requests = [list(same) for _, same in groupby(rows, key=lambda r: (r.key, len(r.tokens)))]
        if not requests:
            return
        with ThreadPoolExecutor(min(AT_ONCE, len(requests))) as pool:
            asked = {pool.submit(self._ask, request, settings): request for request in requests}
            done = as_completed(asked)
            try:
                for future in progress(done, "generating", len(asked)) if self._bar else done:
                    self._fill(asked[future], future.result(), settings)
            except BaseException:
                for future in asked:
                    future.cancel()
                raise
        self.generated_tokens += sum(len(row.tokens) - row.begun for row in rows)

    def _ask(self, rows: list[Row], settings: RolloutSettings) -> Any:
        return self.run.server.client.post("/v1/completions", self._request(rows, settings))

    def _request(self, rows: list[Row], settings: RolloutSettings) -> dict[str, Any]:
        """What is asked for the rows of one prompt. Every setting is named: a server has defaults of its own."""
        first, greedy = rows[0], settings.temperature == 0
        limit = first.limit - len(first.tokens)
        request: dict[str, Any] = {
            "model": self.run.model_name,
            "prompt": first.context,
            "n": 1 if greedy else len(rows),
            # vLLM gives sample i of a request the seed + i.
            "seed": (int.from_bytes(first.key[:7], "little") + first.sample) % 2**60,
            "max_tokens": limit,
            "min_tokens": max(0, min(settings.min_new_tokens - len(first.tokens), limit)),
            "temperature": settings.temperature,
            "top_k": settings.top_k,
            "top_p": settings.top_p,
            "min_p": settings.min_p,
            "repetition_penalty": 1.0,
            "presence_penalty": 0.0,
            "frequency_penalty": 0.0,
            "stop": self._stopping.strings,
            "stop_token_ids": sorted(t for t in self._stopping.tokens if t < self._vocabulary),
            "ignore_eos": True,  # the end tokens are those above
            "logprobs": 0,
            "return_token_ids": True,
            "add_special_tokens": False,
            "cache_salt": self.run.salt,
        }
        if self._stopping.suppressed:
            request["logit_bias"] = {str(t): BIAS for t in sorted(self._stopping.suppressed) if t < self._vocabulary}
        return request

    def _fill(self, rows: list[Row], answer: Any, settings: RolloutSettings) -> None:
        """Give the rows of a request what came back."""
        greedy = settings.temperature == 0
        choices = sorted(answer["choices"], key=lambda c: c["index"])
        for row, choice in zip(rows, choices * len(rows) if greedy else choices, strict=not greedy):
            tokens, logp = choice.get("token_ids"), (choice.get("logprobs") or {}).get("token_logprobs")
            ending = choice["finish_reason"]
            if ending not in ("stop", "length"):
                raise ServerLost(f"{self.run.server.url} gave up a request: {ending}")
            if not tokens or not logp or len(tokens) != len(logp):
                raise AlignlabError(f"rollout.vllm: {self.run.server.url} gives no token ids with log-probs")
            if not all(p is not None and math.isfinite(p) and p > IMPOSSIBLE for p in logp):
                raise NonFiniteError(f"{row.origin or 'a group'}: the policy's log-probs are not finite numbers")
            row.tokens += tokens
            row.logp += [0.0] * len(tokens) if greedy else logp
            text = self._stopping.ended(row.tokens)
            row.finished = text is not None or ending == "stop"
            row.text = text if text is not None else choice["text"] if row.finished else self._text(row)

    def _text(self, row: Row) -> str:
        return self._stopping.text(row.tokens)


class Prefetch:
    """Responses that are being drawn while something else goes on. Made and taken by all processes alike.

    Attributes:
        engine: that draws them.
        seed: what they are drawn with, which tells whose they are.
        step: optimiser steps that the weights had seen.
    """

    def __init__(self, engine: VllmEngine, groups: Sequence[Group], n: int, seed: int, step: int) -> None:
        self.engine, self.seed, self.step = engine, seed, step
        thread = ThreadPoolExecutor(1)
        self._drawn: Future[list[Group]] = thread.submit(engine.sample_here, groups, n, seed)
        thread.shutdown(wait=False)
        engine.run.background = self._drawn

    def take(self) -> list[Group]:
        """Them, once all are there.

        Raises:
            ServerLost: on every process, where the server is gone.
        """
        with self.engine.run.agreed():
            return self._drawn.result()


def check_settings(settings: RolloutSettings) -> None:
    """Raise ConfigError for what a vLLM server cannot do, or does otherwise than the local engine."""
    if settings.min_p > 0 and settings.top_p < 1:
        raise ConfigError(
            f"rollout.min_p={settings.min_p}: vLLM applies it before top_p, the local engine after: use one of them"
        )
    if settings.suppress_tokens and settings.temperature > 2:
        raise ConfigError(
            f"rollout.temperature={settings.temperature}: at most 2 with suppress_tokens and rollout=vllm, which only "
            "makes tokens very improbable"
        )
