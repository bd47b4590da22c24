"""How well a process reward model finds the first wrong step, beside what needs no model at all.

ProcessBench's figures (Zheng et al. 2024, arXiv:2412.06559): the share of right solutions of which no step is called
wrong, the share of wrong ones of which the first step called wrong is the first wrong one, and their harmonic mean.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from alignlab.core import Group
from alignlab.scoring import ProcessRewardScorer

Case = tuple[list[float], int | None]
"""P(right) of each step, and which step is the first wrong one, None where all are right."""


def cases(scorer: ProcessRewardScorer, groups: Sequence[Group]) -> list[Case]:
    """Of records with labels; a step whose label a length limit cut off counts for nothing."""
    found = []
    for group, judged in zip(groups, scorer.judge(groups), strict=True):
        for response, (ends, right) in zip(group.responses, judged, strict=True):
            labels = response.columns["step_label"]
            kept = [p for end, p in zip(ends, right, strict=True) if end in set(response.predicted)]
            found.append((kept, first(labels)))
    return found


def first(labels: Sequence[float]) -> int | None:
    return next((i for i, label in enumerate(labels) if label < 0), None)


def figures(told: Sequence[tuple[int | None, int | None]]) -> dict[str, float]:
    """From pairs (which step is called wrong first, which is)."""
    right = [said is None for said, truth in told if truth is None]
    wrong = [said == truth for said, truth in told if truth is not None]
    a = sum(right) / len(right) if right else float("nan")
    b = sum(wrong) / len(wrong) if wrong else float("nan")
    return {"right": a, "wrong": b, "f1": 2 * a * b / (a + b) if a + b else 0.0, "n": len(told)}


def at(found: Sequence[Case], threshold: float) -> dict[str, float]:
    """A step is called wrong where P(right) is below the threshold."""
    return figures([(next((i for i, p in enumerate(right) if p < threshold), None), truth) for right, truth in found])


def best_threshold(found: Sequence[Case]) -> float:
    """The one with the highest harmonic mean, as ProcessBench picks it on another part of the data."""
    return max([0.5, *(i / 50 for i in range(1, 50))], key=lambda t: at(found, t)["f1"])


def steps_right(found: Sequence[Case]) -> float:
    """Share of the steps, up to the first wrong one, that are told apart at 1/2."""
    told = [
        (p >= 0.5) == (truth is None or i < truth)
        for right, truth in found
        for i, p in enumerate(right)
        if truth is None or i <= truth
    ]
    return sum(told) / len(told)


def baselines(train: Sequence[Case], test: Sequence[Case]) -> dict[str, dict[str, float]]:
    """What can be said without reading a solution: always the same, or drawn from how often what is so in training."""
    truth = [t for _, t in test]
    steps = [(i, t) for right, t in test for i in range(len(right)) if t is None or i <= t]
    majority = sum(t is None or i < t for i, t in steps) / len(steps)
    places = Counter(t for _, t in train if t is not None)
    commonest = places.most_common(1)[0][0]
    total = sum(places.values())
    right = [t for t in truth if t is None]
    wrong = [t for t in truth if t is not None]
    hit = sum(places[t] / total for t in wrong) / max(len(wrong), 1)
    share = sum(t is None for _, t in train) / len(train)
    draws = {"right": share if right else float("nan"), "wrong": (1 - share) * hit}
    draws["f1"] = 2 * draws["right"] * draws["wrong"] / (draws["right"] + draws["wrong"])
    return {
        "all steps right": figures([(None, t) for t in truth]) | {"steps": majority},
        f"step {commonest + 1} wrong": figures([(commonest, t) for t in truth]),
        "drawn from training": draws | {"n": len(test)},
    }


def table(rows: dict[str, dict[str, float]]) -> str:
    lines = ["| | right solutions | wrong solutions | harmonic mean | steps |", "|:--|--:|--:|--:|--:|"]
    for name, row in rows.items():
        cells = [f"{row[k]:.3f}" if k in row else "" for k in ("right", "wrong", "f1", "steps")]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)
