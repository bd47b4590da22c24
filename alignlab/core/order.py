"""Which response of a group is better than another, by the columns that they have."""

from __future__ import annotations

from alignlab.core.errors import AlignlabError
from alignlab.core.group import Group, Response

RANKS = ("lost_to", "preference", "score", "reward")
"""Columns that can order the responses of a group. The first one that a group has decides."""


def ranked(group: Group) -> tuple[str, list[int]]:
    """The column that orders a group, and the indices of the responses that have it.

    A record's own response (source "data") may lack the column: it was not compared with the sampled ones.

    Raises:
        AlignlabError: the responses have no such column, or "preference" for more than two.
    """
    for column in RANKS:
        having = [i for i, r in enumerate(group.responses) if column in r.columns]
        if len(having) >= 2 and all(r.source == "data" for r in group.responses if column not in r.columns):
            if column == "preference" and len(having) != 2:
                raise AlignlabError(f"{group.place}: 'preference' is for groups of two responses; use 'score' for more")
            return column, having
    raise AlignlabError(
        f"{group.place}: preference pairs need a 'score' (or 'preference' or 'reward') for each "
        "response: data with chosen and rejected, or a scorer"
    )


def compared(group: Group) -> list[tuple[int, int, float, float]]:
    """The pairs of a group: (winner, loser, probability that the winner is preferred, how much better it is).

    Winner and loser are indices within the group. `Batch.pairs` explains which column decides.

    Raises:
        AlignlabError: as `ranked`; or the values of the column contradict each other.
    """
    if len(group.responses) < 2:
        return []
    column, having = ranked(group)
    responses = group.responses
    if column == "lost_to":
        found = []
        for i in having:
            winner = int(_value(responses[i], column))
            if winner < 0:
                continue
            if winner not in having or winner == i:
                raise AlignlabError(
                    f"{group.place}: 'lost_to' of response {i} is {winner}: it must be the index of another "
                    "response, or -1"
                )
            found.append((winner, i, 1.0, _margin(responses[winner], responses[i], 1.0)))
        return found
    if column == "preference":
        i, j = having
        p, q = _value(responses[i], column), _value(responses[j], column)
        if abs(p + q - 1) > 1e-6:
            raise AlignlabError(f"{group.place}: the preferences of a pair must sum to 1, got {p} and {q}")
        first, second = (i, j) if p >= q else (j, i)
        return [(first, second, max(p, q), _margin(responses[first], responses[second], abs(p - q)))]
    found = []
    for place, i in enumerate(having):
        for j in having[place + 1 :]:
            gap = _value(responses[i], column) - _value(responses[j], column)
            if gap:
                found.append((i, j, 1.0, gap) if gap > 0 else (j, i, 1.0, -gap))
    return found


def net_wins(group: Group) -> list[int]:
    """For each response, how many siblings it beats minus how many beat it; an even pair (p = 1/2) counts for none."""
    found = [0] * len(group.responses)
    for winner, loser, probability, _ in compared(group):
        found[winner] += probability > 0.5
        found[loser] -= probability > 0.5
    return found


def best_response(group: Group) -> int:
    """Index within the group of its best response. The first one wins a tie. A group of one needs no column."""
    if len(group.responses) == 1:
        return 0
    column, having = ranked(group)
    sign = -1.0 if column == "lost_to" else 1.0
    return max(having, key=lambda i: sign * _value(group.responses[i], column))


def _value(response: Response, column: str) -> float:
    return float(response.columns[column])  # type: ignore[arg-type]


def _margin(winner: Response, loser: Response, otherwise: float) -> float:
    """The difference of the scores; `otherwise` if the responses have no scores."""
    if "score" in winner.columns and "score" in loser.columns:
        return _value(winner, "score") - _value(loser, "score")
    return otherwise
