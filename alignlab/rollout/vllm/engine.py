"""Responses from a vLLM server."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from contextlib import contextmanager, nullcontext
from itertools import cycle, groupby
from typing import Any

from pydantic import Field

from alignlab.core import AlignlabError, ConfigError, Group, NonFiniteError, RolloutContext, require
from alignlab.core.progress import progress
from alignlab.models import PackedModel
from alignlab.rollout.batching import Row
from alignlab.rollout.local import LocalSampler
from alignlab.rollout.sampler import RowSampler
from alignlab.rollout.settings import RolloutSettings, VllmSettings
from alignlab.rollout.vllm.client import ServerLost
from alignlab.rollout.vllm.run import VllmRun
from alignlab.rollout.vllm.server import Server

log = logging.getLogger(__name__)

AT_ONCE = 64
"""Requests under way: the server orders its work itself, it only has to know of enough."""

IMPOSSIBLE = -1000.0
"""Below this a log-prob stands for minus infinity."""

BIAS = -100.0
"""Added to the logit of a token that must not come: the least that vLLM takes."""


class VllmRollout(RolloutSettings):
    """vLLM servers draw, started with the run or running already. See `RolloutSettings` and `VllmSettings`.

    Without `start`, as where saved models are measured, responses are drawn in this process: the server has one policy.
    """

    vllm: VllmSettings = Field(default_factory=VllmSettings)
    _run: VllmRun | None = None
    _show_progress: bool = True

    @property
    def importance_cap(self) -> float | None:
        return self.vllm.importance_cap

    @property
    def gathers(self) -> bool:
        return self._run is not None

    @property
    def off_policy(self) -> bool:
        return True

    @property
    def prefetches(self) -> bool:
        return self.vllm.asynchronous

    def check(self, config: Mapping[str, Any], algorithm: Any) -> None:
        """Raise ConfigError for what cannot be had from a vLLM server, or not without correction."""
        if self.min_p > 0 and self.top_p < 1:
            raise ConfigError(
                f"rollout.min_p={self.min_p}: vLLM applies it before top_p, the local engine after: use one of them"
            )
        if self.suppress_tokens and self.temperature > 2:
            raise ConfigError(
                f"rollout.temperature={self.temperature}: at most 2 with suppress_tokens and rollout=vllm, which only "
                "makes tokens very improbable"
            )
        environment, quantization = config.get("environment"), config.get("quantization")
        if getattr(environment, "needs_step_sampler", False):
            raise ConfigError(
                "environment: responses are drawn step by step, which a vLLM server cannot: use rollout=local"
            )
        if environment is not None and self.prefetches:
            raise ConfigError(
                "rollout.vllm.asynchronous: responses of an environment are not drawn in advance: leave out one of them"
            )
        quantized = quantization is not None and quantization.kind != "none"
        if algorithm is not None:
            self._check_training(config, algorithm, quantized)
        elif quantized:
            raise ConfigError(
                f"quantization={config['quantization'].kind}: a vLLM server samples from the base as it is: leave it "
                "out"
            )

    def _check_training(self, config: Mapping[str, Any], algorithm: Any, quantized: bool) -> None:
        name, cap, corrects = type(algorithm).__name__, self.importance_cap, algorithm.off_policy_correction
        if config["source"].policy == "reference":
            raise ConfigError(
                "source.policy=reference: a vLLM server has the policy that is trained: use rollout=local"
            )
        if cap is not None:
            rule = f"{name} does not weigh its loss by importance weights"
            require(corrects, "rollout.vllm.importance_cap", cap, rule)
        elif self.prefetches and "old_logp" in algorithm.needs:
            raise ConfigError(
                f"rollout.vllm.asynchronous: {name} takes its samples for the policy's own, and these are an iteration "
                "old: give rollout.vllm.importance_cap, as in 2"
            )
        elif quantized and "old_logp" in algorithm.needs:
            raise ConfigError(
                f"quantization={config['quantization'].kind}: the server samples from the base in full precision: give "
                "rollout.vllm.importance_cap, as in 2, or use rollout=local"
            )

    @contextmanager
    def start(self, context: RolloutContext) -> Iterator[None]:
        """Start the servers or find them, wait until they answer; end them with the block. Called by all processes."""
        self._show_progress = context.show_progress
        with VllmRun(self.vllm, context) as self._run:
            try:
                yield
            finally:
                self._run = None

    def sampler(self, policy: PackedModel) -> RowSampler:
        if self._run is None:
            log.warning("rollout=vllm: no server was started, responses are drawn in this process")
            return LocalSampler(policy, self, self._show_progress)
        self._run.push(policy)
        return VllmSampler(policy, self, self._run, self._show_progress)


class VllmSampler(RowSampler):
    """Draws what `LocalSampler` would draw, from the same distribution and ending by the same rules, with other random
    numbers. A prompt's samples are one request with a seed of its own, so that other prompts change nothing, up to
    rounding of the logits (which here depends on what else is in the server's batch).

    Args:
        run: the servers; they have been given the weights of `model`.
    """

    def __init__(self, model: PackedModel, settings: RolloutSettings, run: VllmRun, progress: bool = True) -> None:
        super().__init__(model, settings, progress)
        self.run, self._agrees = run, True
        self._vocabulary = int(model.config.vocab_size)

    def sample(self, groups: Sequence[Group], n: int, seed: int) -> list[Group]:
        """As `RowSampler.sample`. Called by all processes of a run, each with its groups.

        Raises:
            ServerLost: on every process, where the server is gone.
        """
        with self.run.agreed() if self._agrees else nullcontext():
            return super().sample(groups, n, seed)

    @contextmanager
    def together(self) -> Iterator[None]:
        """See `SharedSampler.together`."""
        with self.run.agreed():
            self._agrees = False
            try:
                yield
            finally:
                self._agrees = True

    def prefetch(self, groups: Sequence[Group], n: int, seed: int) -> Callable[[], list[Group]]:
        """See `alignlab.core.PrefetchingSampler`. The server gets no other weights before the responses are there.

        Raises:
            ServerLost: by the result, on every process, where the server is gone.
        """
        self._progress = False
        thread = ThreadPoolExecutor(1)
        drawn: Future[list[Group]] = thread.submit(super().sample, groups, n, seed)
        thread.shutdown(wait=False)
        self.run.background = drawn

        def take() -> list[Group]:
            with self.run.agreed():
                return drawn.result()

        return take

    def rest(self) -> None:
        """See `alignlab.core.RestingSampler`."""
        self.run.rest()

    def draw(self, rows: Sequence[Row], settings: RolloutSettings) -> None:
        for row in rows:
            row.begun = len(row.tokens)
        requests = [list(same) for _, same in groupby(rows, key=lambda r: (r.key, len(r.tokens)))]
        if not requests:
            return
        if self.run.asleep:
            raise AlignlabError("rollout.vllm: the servers sleep since `rest`: ask the engine for a new sampler")
        servers = cycle(self.run.servers)
        with ThreadPoolExecutor(min(AT_ONCE, len(requests))) as pool:
            asked = {pool.submit(self._ask, next(servers), request, settings): request for request in requests}
            done = as_completed(asked)
            try:
                for future in progress(done, "generating", len(asked)) if self._progress else done:
                    self._fill(asked[future], future.result(), settings)
            except BaseException:
                for future in asked:
                    future.cancel()
                raise
        self.generated_tokens += sum(len(row.tokens) - row.begun for row in rows)

    def _ask(self, server: Server, rows: list[Row], settings: RolloutSettings) -> Any:
        return server.client.post("/v1/completions", self._request(rows, settings))

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
                raise ServerLost(f"a server gave up a request: {ending}")
            if not tokens or not logp or len(tokens) != len(logp):
                raise AlignlabError("rollout.vllm: a server gives no token ids with log-probs")
            if not all(p is not None and math.isfinite(p) and p > IMPOSSIBLE for p in logp):
                raise NonFiniteError(f"{row.origin or 'a group'}: the policy's log-probs are not finite numbers")
            row.tokens += tokens
            row.logp += [0.0] * len(tokens) if greedy else logp
            text = self._stopping.ended(row.tokens)
            row.finished = text is not None or ending == "stop"
            row.text = text if text is not None else choice["text"] if row.finished else self._stopping.text(row.tokens)
