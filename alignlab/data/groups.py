"""Files of ours: records as JSON lines; groups as they were sampled, token ids and all, since text would not tokenise
back exactly.

Of the columns that have a value for each token only the labels of steps are written: log-probs belong to a policy.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from alignlab.core.errors import DataError
from alignlab.core.files import write_text
from alignlab.core.group import Column, Group, Response, is_per_token, numbers

KEPT = ("step_label",)
"""Columns with a value for each loss-bearing token that are written."""


def write_jsonl(path: str | Path, records: Iterable[Mapping[str, object]]) -> None:
    """Write records as JSON objects, one a line, atomically: the file is there whole or not at all.

    Raises:
        DataError: a record holds NaN, an infinity or something that JSON does not know.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = []
    for number, record in enumerate(records, 1):
        try:
            lines.append(json.dumps(dict(record), ensure_ascii=False, allow_nan=False) + "\n")
        except (TypeError, ValueError) as error:
            raise DataError(f"{path}:{number}: the record cannot be written as JSON: {error}") from error
    write_text(path, "".join(lines), as_it_is=True)


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
                "columns": {k: _plain(v) for k, v in r.columns.items() if not is_per_token(v) or k in KEPT},
            }
            for r in group.responses
        ],
        **({"columns": group.columns} if group.columns else {}),
        **({"extra": group.extra} if group.extra else {}),
    }


def record_to_group(record: Mapping[str, Any]) -> Group:
    """The group a record holds.

    Raises:
        ValueError: it is not such a record.
    """
    try:
        responses = [
            Response(
                _ids(r["token_ids"]),
                r.get("loss_mask"),
                {k: _read(v) for k, v in r.get("columns", {}).items()},
                bool(r.get("finished", True)),
                _text(r, "text", ""),
                _text(r, "source", "data"),
            )
            for r in record["responses"]
        ]
        prompt_ids = _ids(record["prompt_ids"])
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"not a group as `alignlab sample` writes it: {type(error).__name__}: {error}") from error
    if not prompt_ids or any(not r.token_ids for r in responses):
        raise ValueError("a prompt and every response need at least one token")
    for response in responses:
        if response.loss_mask is not None and len(response.loss_mask) != len(response.token_ids):
            raise ValueError("loss_mask and token_ids differ in length")
        for name, values in response.columns.items():
            if not isinstance(values, float) and len(values) != response.loss_tokens:
                raise ValueError(f"{name} has {len(values)} values for {response.loss_tokens} loss-bearing tokens")
    columns, extra = record.get("columns") or {}, record.get("extra") or {}
    if not isinstance(columns, Mapping) or not isinstance(extra, Mapping):
        raise ValueError("columns and extra must be objects")
    prompt = _text(record, "prompt", "")
    return Group(prompt_ids, responses, prompt=prompt, columns=dict(columns), extra=dict(extra))


def _read(value: Any) -> Column:
    return numbers([*map(float, value)]) if is_per_token(value) else float(value)


def _text(record: Mapping[str, Any], name: str, default: str) -> str:
    value = record.get(name)
    if value is not None and not isinstance(value, str):
        raise ValueError(f"{name} must be a text, not {type(value).__name__}")
    return value or default


def _ids(values: Any) -> list[int]:
    """Token ids, which are whole numbers from 0 on."""
    found = list(map(int, values))
    if any(a != b or b < 0 for a, b in zip(values, found, strict=True)):
        raise ValueError("token ids must be whole numbers, >= 0")
    return found


def _plain(value: Column) -> Any:
    import numpy as np

    return np.asarray(value).tolist()
