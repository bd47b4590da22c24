"""Which single responses are desirable, by whatever their records or scorers say of them: for KTO."""

from __future__ import annotations

from math import isclose

from alignlab.core import AlignlabError, Group
from alignlab.core.order import RANKS, net_wins, ranked


def desirability(group: Group, threshold: float | None, mean: float) -> list[int]:
    """1 (desirable), -1 (undesirable) or 0 (neither) for each response, by the columns that `KTO` names.

    Args:
        threshold: reward above which a response is desirable; None: `mean`.
        mean: mean reward of the iteration.

    Raises:
        AlignlabError: the responses have none of the columns.
    """
    columns = [r.columns for r in group.responses]
    if any("desirable" in c for c in columns):
        return [0 if "desirable" not in c else 1 if c["desirable"] else -1 for c in columns]
    ranks = {name for c in columns for name in c if name in RANKS} - {"reward"}
    if ranks and len(columns) > 1 and ranked(group)[0] != "reward":
        return [(wins > 0) - (wins < 0) for wins in net_wins(group)]
    missing = [r for r in group.responses if "reward" not in r.columns]
    if len(missing) == len(columns) or any(r.source != "data" for r in missing):
        raise AlignlabError(
            f"{group.place}: KTO needs a column that tells which responses are desirable: 'desirable', "
            "'score' or 'preference' for several responses, or a 'reward' from a scorer (scoring=…)"
        )
    rewards: list[float | None] = [c.get("reward") for c in columns]  # type: ignore[misc]
    if threshold is None:
        return [0 if r is None or isclose(r, mean) else 1 if r > mean else -1 for r in rewards]
    return [0 if r is None else 1 if r > threshold else -1 for r in rewards]
