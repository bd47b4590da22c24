"""Which responses of a group are better than which, by the columns they have."""

from __future__ import annotations

from alignlab.core.errors import AlignlabError
from alignlab.core.group import Group, Response

RANKS = ("lost_to", "preference", "score", "reward")
"""Columns that order the responses of a group; the first that is there decides."""


def ranked(group: Group) -> tuple[str, list[int]]:
    """The column that orders a group, and the responses that have it: all but a record's own ("data") that was not
    compared with the sampled ones.

    Raises:
        AlignlabError: responses have no such column, or it cannot be right.
    """
    for column in RANKS:
        having = [i for i, r in enumerate(group.responses) if column in r.columns]
        if len(having) >= 2 and all(r.source == "data" for r in group.responses if column not in r.columns):
            if column == "preference" and len(having) != 2:
                raise AlignlabError(
                    f"{group.origin}: 'preference' is for groups of two responses; use 'score' for more"
                )
            return column, having
    raise AlignlabError(
        f"{group.origin or 'a group'}: preference pairs need a 'score' (or 'preference' or 'reward') for each "
        "response: data with chosen and rejected, or a scorer"
    )


def compared(group: Group) -> list[tuple[int, int, float, float]]:
    """The pairs of a group: (winner, loser, probability that the winner is preferred, by how much it is better).

    Winner and loser are indices within the group; see `Batch.pairs` for the order.
    """
    if len(group.responses) < 2:
        return []
    column, having = ranked(group)
    responses = group.responses
    if column == "lost_to":
        found = []
        for i in having:
            victor = int(_value(responses[i], column))
            if victor < 0:
                continue
            if victor not in having or victor == i:
                raise AlignlabError(f"{group.origin}: 'lost_to' of response {i} names no other response: {victor}")
            found.append((victor, i, 1.0, _margin(responses[victor], responses[i], 1.0)))
        return found
    if column == "preference":
        i, j = having
        p, q = _value(responses[i], column), _value(responses[j], column)
        if abs(p + q - 1) > 1e-6:
            raise AlignlabError(f"{group.origin}: the preferences of a pair must sum to 1, got {p} and {q}")
        first, second = (i, j) if p >= q else (j, i)
        return [(first, second, max(p, q), _margin(responses[first], responses[second], abs(p - q)))]
    found = []
    for place, i in enumerate(having):
        for j in having[place + 1 :]:
            gap = _value(responses[i], column) - _value(responses[j], column)
            if gap:
                found.append((i, j, 1.0, gap) if gap > 0 else (j, i, 1.0, -gap))
    return found


def best_response(group: Group) -> int:
    """Index of the best response of a group; the first wins a tie. The only one, where there is one."""
    if len(group.responses) == 1:
        return 0
    column, having = ranked(group)
    sign = -1.0 if column == "lost_to" else 1.0
    return max(having, key=lambda i: sign * _value(group.responses[i], column))


def _value(response: Response, column: str) -> float:
    return float(response.columns[column])  # type: ignore[arg-type]


def _margin(winner: Response, loser: Response, otherwise: float) -> float:
    """The difference of their scores where they have some."""
    if "score" in winner.columns and "score" in loser.columns:
        return _value(winner, "score") - _value(loser, "score")
    return otherwise
