"""Groups on disk: what was sampled, as it was sampled, token ids and all: text would not tokenise back exactly.

Of the columns that have a value for each token only the labels of steps are kept: log-probs belong to a policy.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from alignlab.core import Group, Response
from alignlab.core.group import Column

KEPT = ("step_label",)
"""Lists that are written: one value for each loss-bearing token."""


def group_to_record(group: Group) -> dict[str, Any]:
    """A group as a JSON record; `record_to_group` is the inverse."""
    return {
        "prompt": group.prompt,
        "prompt_ids": group.prompt_ids,
        "responses": [
            {
                "text": r.text,
                "token_ids": r.token_ids,
                "finished": r.finished,
                "source": r.source,
                **({} if r.loss_mask is None else {"loss_mask": r.loss_mask}),
                "columns": {k: v for k, v in r.columns.items() if not isinstance(v, list) or k in KEPT},
            }
            for r in group.responses
        ],
        **({"columns": group.columns} if group.columns else {}),
        **({"extra": group.extra} if group.extra else {}),
    }


def record_to_group(record: Mapping[str, Any], origin: str) -> Group:
    """The group a record holds.

    Raises:
        ValueError: it is not such a record.
    """
    try:
        responses = [
            Response(
                list(map(int, r["token_ids"])),
                r.get("loss_mask"),
                {k: _column(v) for k, v in r.get("columns", {}).items()},
                bool(r.get("finished", True)),
                r.get("text", ""),
                r.get("source", "data"),
            )
            for r in record["responses"]
        ]
        prompt_ids = list(map(int, record["prompt_ids"]))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"not a group as `alignlab sample` writes it: {type(error).__name__}: {error}") from error
    if not prompt_ids or any(not r.token_ids for r in responses):
        raise ValueError("a prompt and every response need at least one token")
    for response in responses:
        if response.loss_mask is not None and len(response.loss_mask) != len(response.token_ids):
            raise ValueError("loss_mask and token_ids differ in length")
        for name, values in response.columns.items():
            if isinstance(values, list) and len(values) != response.loss_tokens:
                raise ValueError(f"{name} has {len(values)} values for {response.loss_tokens} loss-bearing tokens")
    columns, extra = record.get("columns") or {}, record.get("extra") or {}
    return Group(prompt_ids, responses, origin, record.get("prompt") or "", dict(columns), dict(extra))


def _column(value: Any) -> Column:
    return [float(v) for v in value] if isinstance(value, list) else float(value)
