"""How scorers are called, wherever that is: each fills columns of its own, with numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from alignlab.core import AlignlabError, ConfigError, Group, Scorer
from alignlab.core.parts import calling, name_of, records


def check_columns(scorers: Mapping[str, Scorer]) -> None:
    """Refuse scorers that fill the same column: the last one's values would replace the others'.

    Args:
        scorers: by name, as messages call them.

    Raises:
        ConfigError: two of them do.
    """
    filled: dict[str, str] = {}
    for name, scorer in scorers.items():
        for column in scorer.fills:
            if column in filled:
                raise ConfigError(
                    f"{name}: fills the column '{column}', as {filled[column]} does, and one would replace the other: "
                    "make one of both with scoring=combined, or give one another column"
                )
        filled |= dict.fromkeys(scorer.fills, name)


def run_scorer(scorer: Scorer, groups: Sequence[Group], key: str = "") -> None:
    """Let a scorer fill its columns, and see that it did.

    Args:
        key: where the config has it, for messages; the class and method are named otherwise.

    Raises:
        AlignlabError: it raised, left a group without any of its columns, or filled one with what is no finite number.
    """
    with calling(scorer, "score", records(groups)):
        scorer.score(groups)
    method, fills = key or name_of(scorer, "score"), scorer.fills
    for group in groups:
        if fills and group.responses and not any(c in r.columns for r in group.responses for c in fills):
            raise AlignlabError(
                f"{group.place}: {method}: set none of the columns in its `fills` ({', '.join(fills)}): "
                "response.columns[name] = value, for every response"
            )
        for response in group.responses:
            for column in fills:
                value = response.columns.get(column, 0.0)
                if not _finite(value):
                    raise AlignlabError(
                        f"{group.place}: {method}: set the column '{column}' of a response to {value!r}: a finite "
                        "number is wanted, or one for each token"
                    )


def _finite(value: object) -> bool:
    try:
        return not isinstance(value, str | bytes) and bool(np.isfinite(np.asarray(value, np.float64)).all())
    except (TypeError, ValueError):
        return False
