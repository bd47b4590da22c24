"""Groups on disk: what was sampled, as it was sampled, token ids and all. Text alone would not tokenise back exactly."""

from __future__ import annotations

from typing import Any

from alignlab.core import DataError, Group, Response


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
                "columns": {k: v for k, v in r.columns.items() if not isinstance(v, list)},
            }
            for r in group.responses
        ],
        **({"columns": group.columns} if group.columns else {}),
        **({"extra": group.extra} if group.extra else {}),
    }


def record_to_group(record: dict[str, Any], origin: str) -> Group:
    """The group a record holds.

    Raises:
        DataError: it is not such a record.
    """
    try:
        responses = [
            Response(
                list(map(int, r["token_ids"])),
                r.get("loss_mask"),
                {k: float(v) for k, v in r.get("columns", {}).items()},
                bool(r.get("finished", True)),
                r.get("text", ""),
                r.get("source", "data"),
            )
            for r in record["responses"]
        ]
        prompt_ids = list(map(int, record["prompt_ids"]))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise DataError(
            f"{origin}: not a group as `alignlab sample` writes it: {type(error).__name__}: {error}"
        ) from error
    if not prompt_ids or any(not r.token_ids for r in responses):
        raise DataError(f"{origin}: a prompt and every response need at least one token")
    columns, extra = record.get("columns", {}), record.get("extra", {})
    return Group(prompt_ids, responses, origin, record.get("prompt", ""), columns, extra)
