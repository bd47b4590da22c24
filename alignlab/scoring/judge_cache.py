"""Answers of a judge that have been paid for, kept on disk."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

from alignlab.core import ConfigError
from alignlab.core.errors import shorten

KEY = "scoring.endpoint"
"""Where an endpoint stands in a config, for messages."""
CACHE: Mapping[str, Any] = MappingProxyType(
    # Nothing is ever thrown away; the default journal, since write-ahead logs do not work on network drives.
    {"timeout": 60, "eviction_policy": "none", "cull_limit": 0, "sqlite_journal_mode": "delete"}
)
"""Settings of the cache on disk."""


def question_key(model: str, messages: Sequence[Mapping[str, str]], parameters: Mapping[str, Any]) -> str:
    """SHA-256 of everything that decides an answer, in hex. The address does not: a server may move. A server that
    offers another model under the same name needs another cache."""
    text = json.dumps([model, list(messages), dict(parameters)], sort_keys=True, ensure_ascii=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()


class AnswerCache:
    """Answers that have been paid for, by key: on disk (`diskcache`), or in memory. For several threads and processes.

    An answer is written as soon as it is there: a run that is killed loses none. The folder holds hashes of questions
    and the answers, no question and no key of a service.

    Args:
        path: the folder, made when first used; None: keep answers in memory.
    """

    def __init__(self, path: str | None) -> None:
        self.path, self._lock = path, threading.Lock()
        self._kept: Any = {} if path is None else None

    def get(self, key: str) -> Any:
        """The answer, or None."""
        return self._run(lambda kept: kept.get(key))

    def put(self, key: str, answer: Any) -> Any:
        """Keep an answer. Returns what is kept: where another process was first, its answer, so that all agree."""
        add = dict.setdefault if self.path is None else lambda kept, *new: kept.add(*new, retry=True)
        self._run(lambda kept: add(kept, key, json.dumps(answer)))
        return self.get(key)

    def _run(self, do: Callable[[Any], Any]) -> Any:
        try:
            with self._lock:
                if self._kept is None:
                    self._kept = _open_cache(self.path)
            found = do(self._kept)
            return json.loads(found) if isinstance(found, str) else None
        except Exception as error:  # of the disk, of the database, or of what is in it
            raise ConfigError(
                f"{KEY}.cache={self.path!r}: cannot be used ({shorten(error)}): give another folder, or null for none"
            ) from error


def _open_cache(path: str | None) -> Any:
    """A folder of answers, which may come from someone else: pickles in it, which would run, are not read."""
    import diskcache

    class TextDisk(diskcache.Disk):  # type: ignore[misc]
        def fetch(self, mode: int, filename: Any, value: Any, read: bool) -> Any:
            if mode == diskcache.core.MODE_PICKLE:
                raise ValueError("it holds something else than answers")
            return super().fetch(mode, filename, value, read)

    return diskcache.Cache(path, disk=TextDisk, **CACHE)
