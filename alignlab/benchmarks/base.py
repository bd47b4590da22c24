"""What a benchmark is given, a base class for benchmarks, and what most of them measure."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

from alignlab.benchmarks.exact.metrics import best_of_n_kl_bound
from alignlab.core import ConfigError, Group, Sampler, Scorer
from alignlab.core.parts import drawn, score
from alignlab.rollout import best_of
from alignlab.rollout.policy import Policy

REFERENCE_SEED = 1 << 31
"""Added to the seed of the reference's answers: a win rate is of independent answers. With the same random numbers a
policy near the reference would give the same answer, and the best of N would be compared with one of the N."""


@dataclass
class Subject:
    """The policy that is measured, and what it is measured with.

    Attributes:
        policy: what is measured.
        reference: opens what KL and win rate are measured against, as in `with subject.reference() as reference`.
        sampler: makes a sampler of a policy, with the run's rollout settings.
        base: opens the base model, which judges how fluent answers are; None where there is none.
        proxy: the reward model that the policy may have been trained with, and may have learnt to exploit.
        max_tokens_per_microbatch: tokens per forward pass.
        seed: of sampling.
        best_of: answers are the best of this many samples by the proxy's reward, >= 1; 1 is the policy itself.
    """

    policy: Policy
    reference: Callable[[], AbstractContextManager[Policy]]
    sampler: Callable[[Policy], Sampler]
    base: Callable[[], Policy] | None = None
    proxy: Scorer | None = None
    max_tokens_per_microbatch: int = 16384
    seed: int = 0
    best_of: int = 1

    def judge(self) -> Scorer:
        """The proxy, which picks the best of several samples.

        Raises:
            ConfigError: there is none.
        """
        if self.proxy is None:
            raise ConfigError(f"best_of={self.best_of}: a reward model picks the best, and none is given")
        return self.proxy

    def answers(self, prompts: Sequence[Group]) -> list[Group]:
        """Each prompt with one answer of the policy: a sample, or the best of `best_of` samples."""
        sampler = self.sampler(self.policy)
        if self.best_of == 1:
            return drawn(sampler, None, prompts, 1, self.seed)
        return best_of(sampler, self.judge(), prompts, self.best_of, self.seed)

    def log_probs(self, policy: Policy, groups: Sequence[Group]) -> list[float]:
        """Log-prob of each response under a policy, in nats, in order."""
        outputs = policy.model.outputs(groups, ("logp",), self.max_tokens_per_microbatch)
        return [float(logp.double().sum()) for logp in outputs["logp"]]


class Benchmark:
    """A base class: a benchmark that writes no data, has no reward for training and brings no model. Only `name` and
    `evaluate` must be defined.

    `core.Benchmark`, `TrainingBenchmark`, `HasReward`, `HasBaseModel` and `MeasuresBestOf` say what each method is for.
    Override `base_path` too where making the base model takes long: plans ask for its folder only.
    """

    name: ClassVar[str]
    files: ClassVar[tuple[str, ...]] = ()
    supports_best_of: ClassVar[bool] = False
    metrics: ClassVar[tuple[str, ...]] = ()
    """Names of all that it may measure. With them a comparison's sort_by is checked before anything is trained."""

    def base_model(self) -> str | None:
        return None

    def base_path(self) -> str | None:
        return self.base_model()

    def write_data(self, folder: Path, model: str) -> None:
        if self.files:
            raise NotImplementedError(f"{type(self).__name__} has files but does not define write_data")

    def evaluate(self, subject: Subject) -> Mapping[str, Any]:
        raise NotImplementedError(f"{type(self).__name__} does not define evaluate")


MEASURED = ("reward", "kl", "win_rate", "response_length", "finished", "perplexity", "proxy_reward")
"""What `measure` gives."""


def measure(subject: Subject, prompts: Sequence[Group], gold: Scorer) -> tuple[dict[str, Any], list[Group]]:
    """The metrics of a policy from one answer to each held-out prompt, and these answers, scored by `gold`.

    `reward` and `reward_per_prompt`; `kl`, the mean of log π − log π_ref, in nats per response; `win_rate` against one
    answer of the reference, a tie counting half; `response_length` in tokens; `finished`, the share that ended by
    itself. `perplexity` under the base model and `proxy_reward` where the subject has them. Where `best_of` is above 1
    the KL is an upper bound, and `note` says so.
    """
    mine = subject.answers(prompts)
    score(gold, mine)
    logp_N = subject.log_probs(subject.policy, mine)
    with subject.reference() as reference:
        theirs = drawn(subject.sampler(reference), None, prompts, 1, subject.seed + REFERENCE_SEED)
        ref_logp_N = subject.log_probs(reference, mine)
    score(gold, theirs)
    reward, other = column(mine, "reward"), column(theirs, "reward")
    tokens = [len(g.responses[0].token_ids) for g in mine]
    found: dict[str, Any] = {
        "reward": mean(reward),
        "kl": mean([a - b for a, b in zip(logp_N, ref_logp_N, strict=True)]),
        "win_rate": mean([(a > b) + 0.5 * (a == b) for a, b in zip(reward, other, strict=True)]),
        "response_length": mean([float(t) for t in tokens]),
        "finished": mean([float(g.responses[0].finished) for g in mine]),
        "reward_per_prompt": reward,
    }
    if subject.base is not None:
        found["perplexity"] = math.exp(-math.fsum(subject.log_probs(subject.base(), mine)) / sum(tokens))
    if subject.proxy is not None:
        scored = [g.with_responses([replace(r, columns=dict(r.columns)) for r in g.responses]) for g in mine]
        score(subject.proxy, scored)
        found["proxy_reward"] = mean(column(scored, "reward"))
    if subject.best_of > 1:
        # log(π_n/π_ref) is log(π_n/π) + log(π/π_ref): the second is estimated above, the first is at most this.
        found["kl"] += best_of_n_kl_bound(subject.best_of)
        found["note"] = f"its KL is an upper bound, log {subject.best_of} - {subject.best_of - 1}/{subject.best_of}"
        found["note"] += " for the choice (Beirami et al. 2024, arXiv:2401.01879)"
    return found, mine


def column(groups: Sequence[Group], name: str) -> list[float]:
    """A column's values, response by response."""
    return [float(r.columns[name]) for g in groups for r in g.responses]  # type: ignore[arg-type]


def mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)
