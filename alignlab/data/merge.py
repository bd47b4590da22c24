"""Records with the same prompt as one: the answers of several models' files become one group of K."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import replace

from alignlab.data.encode import Draft

MERGED = ("demonstrations", "rankings", "unpaired", "steps", "groups")
"""Formats whose responses stand for themselves; of a pair or a conversation that is not so."""


def merge(drafts: Sequence[Draft]) -> tuple[list[Draft], int]:
    """Drafts with the same prompt as one, where the first of them stood, and how many others went into these.

    Responses keep their order; origin and the other fields of the record are those of the first.
    """
    found: dict[Hashable, Draft] = {}
    for place, draft in enumerate(drafts):
        example = draft.example
        key: Hashable = place if example.format not in MERGED else (example.format, draft.prompt, draft.complete)
        if example.group is not None:
            key = tuple(example.group.prompt_ids)
        found[key] = _joined(found[key], draft) if key in found else draft
    return list(found.values()), len(drafts) - len(found)


def _joined(first: Draft, second: Draft) -> Draft:
    a, b = first.example, second.example
    group = a.group
    if group is not None and b.group is not None:
        group = group.with_responses([*group.responses, *b.group.responses])
    example = replace(
        a,
        responses=[*a.responses, *b.responses],
        columns=[*a.columns, *b.columns],
        steps=[*a.steps, *b.steps],
        group=group,
    )
    return replace(first, example=example, responses=[*first.responses, *second.responses])
