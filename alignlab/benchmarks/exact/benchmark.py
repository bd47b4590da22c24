"""The exact benchmark as comparisons use it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from alignlab.benchmarks.base import Benchmark, Subject
from alignlab.benchmarks.exact import metrics
from alignlab.benchmarks.exact.base_model import BaseModelSettings, base_folder, base_model
from alignlab.benchmarks.exact.enumeration import completion_log_probs
from alignlab.benchmarks.exact.language import ExactReward, ExactWorld, ExactWorldSettings
from alignlab.benchmarks.exact.process import demonstrations, sample
from alignlab.benchmarks.exact.steps import labelled_steps
from alignlab.build import section
from alignlab.core import AlignlabError, ConfigError, Group, Response, Scorer, require
from alignlab.core.parts import score
from alignlab.core.progress import progress
from alignlab.data import write_jsonl

PROXY_SAMPLES = 4096
"""Completions from which the mean proxy reward is estimated; its standard error is a 64th of the deviation."""

SIBLINGS = 16
"""Completions scored as one group: more attend over longer rows, fewer make more groups to lay out."""
SCORED = 4096
"""Completions scored between two looks at the clock."""


class ExactBenchmark(Benchmark):
    """Enumerable: every metric but `proxy_reward` is computed, not estimated.

    Args:
        beta: the objective's price of a nat of KL, in units of reward, > 0.
        demonstrations: how many demonstrations there are for supervised fine-tuning.
        solutions: how many completions there are with a label for each word, for a process reward model.
        prompt_copies: how often each prompt stands in the training prompts.
        seed: of the demonstrations and solutions.
        world: which language; see `ExactWorldSettings`.
        base: the base model; see `BaseModelSettings`.
    """

    name = "exact"
    metrics = (
        *("reward", "kl", "entropy", "win_rate", "objective", "objective_score", "frontier_efficiency"),
        *("reference_reward", "reference_entropy", "optimum_reward", "optimum_kl", "proxy_reward"),
    )
    files = ("demonstrations", "prompts", "steps")
    supports_best_of = True

    def __init__(
        self,
        beta: float = 0.05,
        demonstrations: int = 4096,
        prompt_copies: int = 64,
        seed: int = 0,
        world: dict[str, Any] | None = None,
        base: dict[str, Any] | None = None,
        solutions: int = 4096,
    ) -> None:
        require(beta > 0, "benchmark.beta", beta, "must be > 0")
        require(demonstrations >= 1, "benchmark.demonstrations", demonstrations, "must be at least 1")
        require(solutions >= 1, "benchmark.solutions", solutions, "must be at least 1")
        require(prompt_copies >= 1, "benchmark.prompt_copies", prompt_copies, "must be at least 1")
        self.beta, self.seed = beta, seed
        self.demonstrations, self.solutions, self.prompt_copies = demonstrations, solutions, prompt_copies
        settings = section(ExactWorldSettings, world or {}, "benchmark.world")
        self.base = section(BaseModelSettings, base or {}, "benchmark.base")
        try:
            self.world = ExactWorld(settings)
        except ConfigError as error:  # possible each, but not together
            raise ConfigError(f"benchmark.world.{error}") from error

    def base_model(self) -> str | None:
        return str(base_model(self.world, self.base))

    def base_path(self) -> str | None:
        return str(base_folder(self.world, self.base))

    def write_data(self, folder: Path, model: str) -> None:
        write_jsonl(folder / "demonstrations.jsonl", demonstrations(self.world, self.demonstrations, self.seed))
        write_jsonl(folder / "prompts.jsonl", self.world.prompts() * self.prompt_copies)
        write_jsonl(folder / "steps.jsonl", labelled_steps(self.world, self.solutions, self.seed))

    def gold(self) -> Scorer:
        return ExactReward(self.world)

    def evaluate(self, subject: Subject) -> dict[str, Any]:
        logp_XY = completion_log_probs(subject.policy.model.network, self.world)
        with subject.reference() as reference:
            ref_logp_XY = completion_log_probs(reference.model.network, self.world)
        proxy_reward = None
        if subject.best_of > 1:
            proxy_XY = self.scores(subject.judge())
            logp_XY = metrics.best_of_n(logp_XY, proxy_XY, subject.best_of)
            proxy_reward = metrics.expectation(logp_XY, proxy_XY)
        elif subject.proxy is not None:
            proxy_reward = self._proxy_reward(logp_XY, subject.proxy, subject.seed)
        found: dict[str, Any] = metrics.policy_metrics(logp_XY, ref_logp_XY, self.world.reward_XY, self.beta)
        if proxy_reward is not None:
            found["proxy_reward"] = proxy_reward
        top = metrics.kl_divergence(metrics.greedy(ref_logp_XY, self.world.reward_XY), ref_logp_XY)
        grid = [top * (i / 40) ** 2 for i in range(41)]  # the curve is steep near 0
        found["frontier"] = [[kl, metrics.frontier(ref_logp_XY, self.world.reward_XY, kl)] for kl in grid]
        found["samples"] = self._samples(logp_XY, subject.seed)
        return found

    def scores(self, scorer: Scorer) -> Tensor:
        """The reward that a scorer gives to every completion of every prompt, float64, shape (X, Y).

        Raises:
            AlignlabError: one of them is not a finite number.
        """
        world = self.world
        groups = []
        for x, (ids, text) in enumerate(zip(world.prompt_ids, world.prompt_texts, strict=True)):
            tokens = [world.token_ids(y) for y in range(world.Y)]
            responses = [Response(t, text=world.text(t), source="policy") for t in tokens]
            parts = [responses[i : i + SIBLINGS] for i in range(0, world.Y, SIBLINGS)]
            groups += [Group(ids, part, f"prompt {x + 1}", text) for part in parts]
        size = SCORED // SIBLINGS
        batches = [groups[i : i + size] for i in range(0, len(groups), size)]
        for batch in progress(batches, "scoring every completion", len(batches)):
            score(scorer, batch)
        rewards = [float(r.columns["reward"]) for g in groups for r in g.responses]  # type: ignore[arg-type]
        reward_XY = torch.tensor(rewards, dtype=torch.float64).view(world.X, world.Y)
        if not reward_XY.isfinite().all():
            raise AlignlabError("the reward model's scores are not finite numbers: its training has diverged")
        return reward_XY

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
        score(proxy, groups)
        rewards = [float(r.columns["reward"]) for g in groups for r in g.responses]  # type: ignore[arg-type]
        return sum(rewards) / len(rewards)

    def _samples(self, logp_XY: Tensor, seed: int) -> list[dict[str, str]]:
        groups = self._draw(logp_XY, 2 * self.world.X, seed)
        return [{"prompt": g.prompt, "answer": " | ".join(r.text or "(nothing)" for r in g.responses)} for g in groups]
