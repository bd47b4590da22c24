"""Best of N: draw, score, keep the best."""

from __future__ import annotations

from collections.abc import Sequence

from alignlab.algorithms.rejection_sampling import best
from alignlab.core import AlignlabError, Group, Sampler, Scorer


def best_of(
    sampler: Sampler, scorer: Scorer, groups: Sequence[Group], n: int, seed: int, column: str = "reward"
) -> list[Group]:
    """For each group, in order, the one of n sampled responses with the highest `column`; the first among equals.

    Raises:
        AlignlabError: where the scorer does not fill that column.
    """
    if column not in scorer.fills:
        raise AlignlabError(f"best of {n}: the scorer fills {', '.join(scorer.fills) or 'nothing'}, not '{column}'")
    sampled = sampler.sample(groups, n, seed)
    scorer.score(sampled)
    return [g.with_responses(best(g, 1, column)) for g in sampled]
