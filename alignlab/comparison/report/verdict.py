"""What a leaderboard says, in plain sentences: which algorithm is best, and is that more than chance?"""

from __future__ import annotations

from collections.abc import Sequence

from alignlab.comparison.report.leaderboard import NOTE, Leaderboard
from alignlab.comparison.report.metrics import format_number, metric
from alignlab.comparison.statistics import Comparison, Estimate


def verdict(board: Leaderboard) -> list[str]:
    """Sentences: the best algorithm, those it cannot be told from, those it beats, what could not be tested, and what
    was left out."""
    return [*_ranking(board), *(f"LEFT OUT: {text}." for text in board.left_out)]


def _ranking(board: Leaderboard) -> list[str]:
    known = metric(board.sort_by)
    ranked = [row for row in board.rows if row["rank"] is not None]
    if not ranked:
        return [f"No algorithm has a value for {known.title}, so none can be called the best."]
    best = ranked[0]["algorithm"]
    extreme = "lowest" if known.better < 0 else "highest"
    found = board.estimate(ranked[0], board.sort_by)
    assert found is not None  # ranked rows have it
    seeds = len(ranked[0]["seeds"])
    sentences = [
        f"{best} has the {extreme} {known.title} on {board.benchmark}: {_with_interval(found, known.decimals)} "
        f"({seeds} seed{'s' if seeds > 1 else ''})."
    ]
    if len(ranked) == 1:
        return [*sentences, "No other algorithm was measured, so there is nothing to compare it with."]
    pairs = [board.between(best, row["algorithm"]) for row in ranked[1:]]
    alike = [pair for pair in pairs if pair.significant is False]
    different = [pair for pair in pairs if pair.significant]
    sign = known.better or 1
    beaten = [pair for pair in different if pair.difference and pair.difference.mean * sign > 0]
    contrary = [pair for pair in different if pair not in beaten]
    untested = [pair for pair in pairs if pair.significant is None]
    if alike:
        one = len(alike) == 1
        sentences.append(
            f"The difference from {_names(alike)} is not significant: these runs cannot tell {'it' if one else 'them'} "
            f"apart from the best{_nearest(alike, board)}."
        )
    if beaten:
        every = "every other algorithm" if len(beaten) == len(pairs) > 1 else _names(beaten)
        sentences.append(
            f"It is significantly {'better than' if known.better else 'above'} {every}{_nearest(beaten, board)}."
        )
    if contrary:
        sentences.append(f"On the seeds in common, though, it is significantly behind {_names(contrary)}.")
    if untested:
        sentences.append(
            f"Whether it differs from {_names(untested)} cannot be tested: that takes two seeds in common, or "
            "one and per-prompt values."
        )
    if any(pair.seeds == 1 for pair in alike + different):
        sentences.append(
            "Where only one seed is compared, this holds for the trained models at hand and says nothing of how "
            "another seed would have fared."
        )
    return sentences


def method(board: Leaderboard) -> str:
    """How intervals and tests were made and what must be said of single rows, for the foot of a table."""
    prompts = sorted(set(board.prompts.values()))
    what = "seeds (Student's t)"
    if prompts:
        what += f" and, where there are per-prompt values, {' or '.join(map(str, prompts))} prompts (bootstrap)"
    notes = "".join(f" {row['algorithm']}: {row[NOTE]}." for row in board.rows if row.get(NOTE))
    return (
        f"Mean and 95 % interval over {what}. ≈: not distinguishable from the best at the 5 % level, paired tests with "
        f"Holm's correction over all pairs of algorithms on {metric(board.sort_by).title}; ?: cannot be tested.{notes}"
    )


def format_p(p: float | None) -> str:
    """`p = 0.012`, `p < 0.001`, or nothing where there is none."""
    if p is None:
        return ""
    return "p < 0.001" if p < 0.001 else f"p = {p:.3f}" if p < 0.0995 else f"p = {p:.2f}"


def _nearest(pairs: Sequence[Comparison], board: Leaderboard) -> str:
    """The first of the pairs in numbers: ` (dpo: +0.012, 95 % interval 0.001 to 0.023, p = 0.03 after …)`."""
    pair, decimals = pairs[0], metric(board.sort_by).decimals
    assert pair.difference is not None  # a tested pair has one
    name = f"{pair.b}: " if len(pairs) > 1 else ""
    sign = "+" if pair.difference.mean >= 0 else ""
    tested = sum(other.p is not None for other in board.comparisons)
    corrected = f" after correction for {tested} comparisons" if tested > 1 else ""
    return f" ({name}{sign}{_with_interval(pair.difference, decimals)}, {format_p(pair.p_holm)}{corrected})"


def _with_interval(found: Estimate, decimals: int | None) -> str:
    mean, low, high = (format_number(value, decimals, found.mean) for value in (found.mean, found.low, found.high))
    if found.low is not None and found.low == found.high:
        return f"{mean} with every seed"
    return f"{mean} (no interval)" if found.low is None else f"{mean}, 95 % interval {low} to {high}"


def _names(pairs: Sequence[Comparison]) -> str:
    names = [pair.b for pair in pairs]
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
