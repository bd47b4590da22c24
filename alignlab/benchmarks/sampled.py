"""Figures of a policy from its answers to held-out prompts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from alignlab.benchmarks.base import Subject
from alignlab.benchmarks.exact.metrics import best_of_n_kl_bound
from alignlab.core import Group, Scorer
from alignlab.models import PackedModel

OTHER = 1 << 31
"""Added to the seed of the reference's answers: a win rate is of independent answers. With the same random numbers a
policy near the reference would give the same answer, and the best of N would be held against one of the N."""


def measure(subject: Subject, prompts: Sequence[Group], gold: Scorer) -> tuple[dict[str, Any], list[Group]]:
    """Reward, KL and the other figures every benchmark has, and the answers, scored by `gold`."""
    mine = subject.answers(prompts)
    gold.score(mine)
    logp_N = sums(subject.policy, mine, subject.max_tokens_per_microbatch)
    with subject.reference() as reference:
        theirs = subject.sampler(reference).sample(prompts, 1, subject.seed + OTHER)
        ref_logp_N = sums(reference, mine, subject.max_tokens_per_microbatch)
    gold.score(theirs)
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
        found["perplexity"] = math.exp(
            -math.fsum(sums(subject.base(), mine, subject.max_tokens_per_microbatch)) / sum(tokens)
        )
    if subject.proxy is not None:
        scored = [g.with_responses([replace(r, columns=dict(r.columns)) for r in g.responses]) for g in mine]
        subject.proxy.score(scored)
        found["proxy_reward"] = mean(column(scored, "reward"))
    if subject.best_of > 1:
        # log(π_n/π_ref) is log(π_n/π) + log(π/π_ref): the second is estimated above, the first is at most this.
        found["kl"] += best_of_n_kl_bound(subject.best_of)
        found["note"] = f"its KL is an upper bound, log {subject.best_of} - {subject.best_of - 1}/{subject.best_of}"
        found["note"] += " for the choice (Beirami et al. 2024, arXiv:2401.01879)"
    return found, mine


def sums(model: PackedModel, groups: Sequence[Group], max_tokens_per_microbatch: int) -> list[float]:
    """Log-prob of each response, in nats."""
    return [float(v.double().sum()) for v in model.outputs(groups, ("logp",), max_tokens_per_microbatch)["logp"]]


def column(groups: Sequence[Group], name: str) -> list[float]:
    return [float(r.columns[name]) for g in groups for r in g.responses]  # type: ignore[arg-type]


def mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)
