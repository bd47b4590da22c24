"""Writing records."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path

from alignlab.core.errors import DataError


def write_jsonl(path: str | Path, records: Iterable[Mapping[str, object]]) -> None:
    """Write records as JSON objects, one a line, atomically: the file is there whole or not at all.

    Raises:
        DataError: a record holds NaN, an infinity or something that JSON does not know.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(unfinished, "w", encoding="utf-8") as stream:
            for number, record in enumerate(records, 1):
                try:
                    line = json.dumps(dict(record), ensure_ascii=False, allow_nan=False)
                except (TypeError, ValueError) as error:
                    raise DataError(f"{path}:{number}: the record cannot be written as JSON: {error}") from error
                stream.write(line + "\n")
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)
