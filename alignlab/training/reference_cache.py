"""What a frozen reference says of the data, kept on disk: a sweep or a comparison computes it once.

A file for each reference, named by a hash of everything that its log-probs follow from: every bit of its weights, its
architecture, the temperature, the precision. In it, by a hash of the prompt and of the responses that are read with it,
the log-probs as they were computed, to the last bit. They are computed a group at a time, so that no rounding depends
on the batch that asked first: runs may come in any order, and at the same time.
"""

from __future__ import annotations

import hashlib
import json
import logging
import sqlite3
import zlib
from collections.abc import Callable, Sequence
from contextlib import closing, suppress
from pathlib import Path
from typing import TypeVar

import numpy as np
import transformers

import alignlab
from alignlab.core import Group, Response
from alignlab.models import Reference
from alignlab.training.checkpoints.hashing import sha256_of_tensors

log = logging.getLogger(__name__)

T = TypeVar("T")

COLUMN = "ref_logp"

PATIENCE = 60.0
"""Seconds to wait while another process writes."""

AT_ONCE = 500
"""Responses asked for in one query; SQLite allows 999 variables at least."""


def identity(reference: Reference, temperature: float, mixed_precision: str) -> str:
    """SHA-256, in hex, of everything that the reference's log-probs follow from, but for what is read. Takes about a
    second for each GB of weights and thread. To be asked before the model is divided among processes."""
    tensors, settings = reference.contents()
    parts = {
        "versions": [alignlab.__version__, transformers.__version__],
        "settings": settings,
        "temperature": temperature,
        "mixed_precision": mixed_precision,
        "weights": sha256_of_tensors(tensors, "hashing the reference"),
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()


def keys(prompt_ids: Sequence[int], responses: Sequence[Response]) -> list[bytes]:
    """16 bytes for each of the responses that are read together: for all that is read, the prompt, the responses, and
    which of their tokens bear loss; and for which of them it is."""
    parts: list[Sequence[int]] = [[len(prompt_ids)], prompt_ids]
    for r in responses:
        parts += [[len(r.token_ids), r.loss_tokens], r.token_ids, r.predicted]
    read = np.concatenate([np.asarray(p, np.int64) for p in parts]).tobytes()
    return [hashlib.blake2b(read, digest_size=16, salt=i.to_bytes(8, "little")).digest() for i in range(len(responses))]


class ReferenceCache:
    """Log-probs of one reference in an SQLite file; safe for several processes, and for those that are killed.

    What cannot be read is computed again. A file that is damaged is put aside, one that cannot be used (a full disk, a
    file system without locks) is left alone from then on: both with a warning, neither ends a run.

    Args:
        folder: where the files are; made when first used.
        identity: of the reference, see `identity`.
    """

    def __init__(self, folder: Path, identity: str) -> None:
        self.path = folder / f"{identity[:32]}.sqlite"
        self._connection: sqlite3.Connection | None = None
        self._usable = True

    def fill(self, groups: Sequence[Group], compute: Callable[[], None]) -> None:
        """Set the column `ref_logp` of the responses that lack it.

        Args:
            compute: sets it for those that the file does not have, which are then kept.
        """
        lacking: list[tuple[bytes, Response]] = []
        for group in groups:
            together = [r for r in group.responses if COLUMN not in r.columns]
            lacking += zip(keys(group.prompt_ids, together), together, strict=True)
        self._look_up(lacking)
        new = [(k, r) for k, r in lacking if COLUMN not in r.columns]
        compute()
        self._keep(new)

    def _look_up(self, wanted: Sequence[tuple[bytes, Response]]) -> None:
        for start in range(0, len(wanted), AT_ONCE):
            some = wanted[start : start + AT_ONCE]
            marks = ",".join("?" * len(some))
            found = self._read(f"SELECT key, logp FROM logps WHERE key IN ({marks})", [k for k, _ in some])
            for k, response in some:
                if k in found:
                    values = _unpack(found[k], response.loss_tokens)
                    if values is None:
                        log.warning("%s: damaged log-probs in it, which are computed again", self.path)
                        self._write("DELETE FROM logps WHERE key = ?", [(k,)])
                    else:
                        response.columns[COLUMN] = values

    def _keep(self, new: Sequence[tuple[bytes, Response]]) -> None:
        if new:
            rows = [(k, _pack(r.columns[COLUMN])) for k, r in new]  # type: ignore[arg-type]
            self._write("INSERT OR IGNORE INTO logps VALUES (?, ?)", rows)
            self._look_up(new)  # what is kept, where another process was first

    def _read(self, query: str, values: Sequence[object]) -> dict[bytes, bytes]:
        return self._run(lambda file: dict(file.execute(query, values).fetchall())) or {}

    def _write(self, statement: str, rows: Sequence[tuple[object, ...]]) -> None:
        """All rows or none."""

        def work(file: sqlite3.Connection) -> None:
            with file:  # a transaction
                file.executemany(statement, rows)

        self._run(work)

    def _run(self, work: Callable[[sqlite3.Connection], T]) -> T | None:
        """What is done with the file, if it can be."""
        for attempt in range(2):
            if not self._usable:
                break
            try:
                if self._connection is None:
                    self._connection = self._open()
                return work(self._connection)
            except (sqlite3.Error, OSError) as error:
                self._give_up(error, again=attempt == 0)
        return None

    def _open(self) -> sqlite3.Connection:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        # The default journal, since write-ahead logs do not work on network drives.
        made = sqlite3.connect(self.path, timeout=PATIENCE, check_same_thread=False)
        made.execute("CREATE TABLE IF NOT EXISTS logps (key BLOB PRIMARY KEY, logp BLOB NOT NULL) WITHOUT ROWID")
        return made

    def _give_up(self, error: Exception, again: bool) -> None:
        """Without the file: for good, or where it was damaged, with a new one."""
        if self._connection is not None:
            with suppress(sqlite3.Error), closing(self._connection):
                self._connection = None
        damaged = isinstance(error, sqlite3.DatabaseError) and not isinstance(error, sqlite3.OperationalError)
        if damaged and again:
            with suppress(OSError):
                self.path.replace(self.path.with_suffix(".damaged"))
            log.warning("%s: damaged (%s): put aside as .damaged; its log-probs are computed again", self.path, error)
            return
        self._usable = False
        log.warning(
            "training.reference_cache: %s cannot be used (%s): the reference's log-probs are computed without it",
            *(self.path, error),
        )


def _pack(values: Sequence[float]) -> bytes:
    """Numbers with a checksum; in float32 where that is all they are."""
    exact = np.asarray(values, np.float64)
    narrow = exact.astype(np.float32)
    body = (narrow if np.array_equal(narrow, exact, equal_nan=True) else exact).tobytes()
    return zlib.crc32(body).to_bytes(4, "little") + body


def _unpack(packed: bytes, count: int) -> np.ndarray | None:
    """The numbers; None where these are not `count` numbers as they were written."""
    body = packed[4:]
    size = {4 * count: np.float32, 8 * count: np.float64}.get(len(body))
    if size is None or zlib.crc32(body).to_bytes(4, "little") != packed[:4]:
        return None
    return np.frombuffer(body, size)
