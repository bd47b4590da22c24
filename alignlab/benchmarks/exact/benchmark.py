"""The exact benchmark as comparisons use it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from alignlab.benchmarks.base import Benchmark, Subject
from alignlab.benchmarks.exact import metrics
from alignlab.benchmarks.exact.base_model import BaseModelSettings, base_model
from alignlab.benchmarks.exact.enumeration import completion_log_probs
from alignlab.benchmarks.exact.evaluation import figures
from alignlab.benchmarks.exact.language import ExactWorld, ExactWorldSettings
from alignlab.benchmarks.exact.process import demonstrations, sample
from alignlab.benchmarks.exact.scorer import ExactReward
from alignlab.core import Group, Response, Scorer, require
from alignlab.data import write_jsonl

PROXY_SAMPLES = 4096
"""Completions from which the mean proxy reward is estimated; its standard error is a 64th of the deviation."""


class ExactBenchmark(Benchmark):
    """Enumerable, so that every figure but the proxy's is computed, not estimated.

    Args:
        beta: the objective's price of a nat of KL, in units of reward, > 0.
        demonstrations: how many demonstrations there are for supervised fine-tuning.
        prompt_copies: how often each prompt stands in the training prompts.
        seed: of the demonstrations.
        world: which language; see `ExactWorldSettings`.
        base: the base model; see `BaseModelSettings`.
    """

    name = "exact"

    def __init__(
        self,
        beta: float = 0.05,
        demonstrations: int = 4096,
        prompt_copies: int = 64,
        seed: int = 0,
        world: dict[str, Any] | None = None,
        base: dict[str, Any] | None = None,
    ) -> None:
        require(beta > 0, "benchmark.beta", beta, "must be > 0")
        self.beta, self.demonstrations, self.prompt_copies, self.seed = beta, demonstrations, prompt_copies, seed
        self.world = ExactWorld(ExactWorldSettings(**(world or {})))
        self.base = BaseModelSettings(**(base or {}))

    def base_model(self) -> str | None:
        return str(base_model(self.world, self.base))

    def write_data(self, folder: Path, model: str) -> None:
        write_jsonl(folder / "demonstrations.jsonl", demonstrations(self.world, self.demonstrations, self.seed))
        write_jsonl(folder / "prompts.jsonl", self.world.prompts() * self.prompt_copies)

    def gold(self) -> Scorer:
        return ExactReward(self.world)

    def evaluate(self, subject: Subject) -> dict[str, Any]:
        logp_XY = completion_log_probs(subject.policy.network, self.world)
        with subject.reference() as reference:
            ref_logp_XY = completion_log_probs(reference.network, self.world)
        found: dict[str, Any] = figures(logp_XY, ref_logp_XY, self.world.reward_XY, self.beta)
        if subject.proxy is not None:
            found["proxy_reward"] = self._proxy_reward(logp_XY, subject.proxy, subject.seed)
        top = metrics.kl_divergence(metrics.greedy(ref_logp_XY, self.world.reward_XY), ref_logp_XY)
        grid = [top * (i / 40) ** 2 for i in range(41)]  # the curve is steep near 0
        found["frontier"] = [[kl, metrics.frontier(ref_logp_XY, self.world.reward_XY, kl)] for kl in grid]
        found["samples"] = self._samples(logp_XY, subject.seed)
        return found

    def _draw(self, logp_XY: Tensor, count: int, seed: int) -> list[Group]:
        generator = torch.Generator().manual_seed(seed)
        prompt_N = torch.arange(count) % self.world.X
        chosen = sample(logp_XY, prompt_N, generator)
        groups = [
            Group(ids, [], f"prompt {x + 1}", self.world.prompt_texts[x]) for x, ids in enumerate(self.world.prompt_ids)
        ]
        for x, y in zip(prompt_N.tolist(), chosen.tolist(), strict=True):
            ids = self.world.token_ids(y)
            groups[x].responses.append(Response(ids, text=self.world.text(ids), source="policy"))
        return groups

    def _proxy_reward(self, logp_XY: Tensor, proxy: Scorer, seed: int) -> float:
        size = 64
        groups = [
            g.with_responses(g.responses[i : i + size])
            for g in self._draw(logp_XY, PROXY_SAMPLES, seed)
            for i in range(0, len(g.responses), size)
        ]
        proxy.score(groups)
        rewards = [float(r.columns["reward"]) for g in groups for r in g.responses]  # type: ignore[arg-type]
        return sum(rewards) / len(rewards)

    def _samples(self, logp_XY: Tensor, seed: int) -> list[dict[str, str]]:
        groups = self._draw(logp_XY, 2 * self.world.X, seed)
        return [{"prompt": g.prompt, "answer": " | ".join(r.text or "(nothing)" for r in g.responses)} for g in groups]
