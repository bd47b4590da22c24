"""Answers that have been paid for, kept on disk: a judge is asked each question once."""

from __future__ import annotations

import hashlib
import json
import sqlite3
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from alignlab.core import ConfigError

PATIENCE = 60.0
"""Seconds to wait while another process writes."""


def question_key(model: str, messages: Sequence[Mapping[str, str]], parameters: Mapping[str, Any]) -> str:
    """SHA-256 of everything that decides an answer, in hex. The address does not: a server may move. A server that
    offers another model under the same name needs another cache."""
    text = json.dumps([model, list(messages), dict(parameters)], sort_keys=True, ensure_ascii=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()


class AnswerCache:
    """A table of answers by key in an SQLite file, or in memory; safe for several threads and processes.

    Each answer is a transaction of its own, written as soon as it is there: a run that is killed loses none. The file
    holds hashes of questions and the answers, no question and no key of a service.

    Args:
        path: the file, made with its folder when first used; None: keep answers in memory.
    """

    def __init__(self, path: str | None) -> None:
        self.path = path
        self._lock = threading.Lock()
        self._connection: sqlite3.Connection | None = None

    def get(self, key: str) -> Any:
        """The answer, or None."""
        with self._lock:
            row = self._run("SELECT answer FROM answers WHERE key = ?", key)
        return None if row is None else json.loads(row[0])

    def put(self, key: str, answer: Any) -> Any:
        """Keep an answer. Returns what is kept: where another process was first, its answer, so that all agree."""
        with self._lock:
            self._run("INSERT OR IGNORE INTO answers VALUES (?, ?)", key, json.dumps(answer))
            row = self._run("SELECT answer FROM answers WHERE key = ?", key)
        return answer if row is None else json.loads(row[0])

    def _run(self, statement: str, *values: str) -> Any:
        try:
            if self._connection is None:
                self._connection = self._open()
            return self._connection.execute(statement, values).fetchone()
        except (sqlite3.Error, OSError) as error:
            raise ConfigError(
                f"scoring.endpoint.cache={self.path!r}: cannot be used ({error}): give another file, or null for none"
            ) from error

    def _open(self) -> sqlite3.Connection:
        if self.path is not None:
            Path(self.path).parent.mkdir(parents=True, exist_ok=True)
        # Autocommit. The default journal, since write-ahead logs do not work on network drives.
        made = sqlite3.connect(self.path or ":memory:", timeout=PATIENCE, isolation_level=None, check_same_thread=False)
        made.execute("CREATE TABLE IF NOT EXISTS answers (key TEXT PRIMARY KEY, answer TEXT NOT NULL) WITHOUT ROWID")
        return made
