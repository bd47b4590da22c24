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
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
import transformers

import alignlab
from alignlab.core import Algorithm, Group, Response
from alignlab.models import Reference
from alignlab.training.checkpoints.hashing import sha256_of_tensors
from alignlab.training.distributed.processes import Processes
from alignlab.training.settings import SourceSettings

log = logging.getLogger(__name__)

COLUMN = "ref_logp"

PATIENCE = 60.0
"""Seconds to wait while another process writes."""


def identity(reference: Reference, temperature: float, precision: str) -> str:
    """SHA-256, in hex, of everything that the reference's log-probs follow from, but for what is read. Takes about a
    second for each GB of weights and thread. To be asked once the weights are held as they will be computed with, and
    before the model is divided among processes."""
    tensors, settings = reference.contents()
    parts = {
        "file": 2,  # how rows are written
        "versions": [alignlab.__version__, transformers.__version__],
        "settings": settings,
        "temperature": temperature,
        "products": [precision, torch.get_float32_matmul_precision()],
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

    A file that cannot be used (damaged, a full disk, a file system without locks) is left alone from then on, with a
    warning: all is computed, and no run ends.

    Args:
        folder: where the files are; made when first used.
        identity: of the reference, see `identity`.
    """

    def __init__(self, folder: Path, identity: str) -> None:
        self.path = folder / f"{identity[:32]}.sqlite"
        self._file: sqlite3.Connection | None = None
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
        new = [(key, r) for key, r in lacking if COLUMN not in r.columns]
        compute()
        rows = [(key, np.asarray(r.columns[COLUMN]).tobytes()) for key, r in new]
        self._run("INSERT OR IGNORE INTO logps VALUES (?, ?)", rows)
        self._look_up(new)  # what is kept, where another process was first

    def _look_up(self, wanted: Sequence[tuple[bytes, Response]]) -> None:
        found = self._run("SELECT logp FROM logps WHERE key = ?", [(key,) for key, _ in wanted])
        for (_, response), row in zip(wanted, found, strict=False):
            sizes = {4 * response.loss_tokens: np.float32, 8 * response.loss_tokens: np.float64}
            if row is not None and len(row[0]) in sizes:
                response.columns[COLUMN] = np.frombuffer(row[0], sizes[len(row[0])])

    def _run(self, statement: str, rows: Sequence[tuple[bytes, ...]]) -> list[tuple[bytes] | None]:
        """What the file answers to a statement with each of the rows, all or none; nothing where it cannot be used."""
        if not self._usable or not rows:
            return []
        try:
            if self._file is None:
                self._file = self._open()
            with self._file:  # a transaction
                return [self._file.execute(statement, row).fetchone() for row in rows]
        except (sqlite3.Error, OSError) as error:
            self._usable = False
            log.warning(
                "training.reference_cache: %s cannot be used (%s): the reference's log-probs are computed without it. "
                "If it is damaged, delete it",
                *(self.path, error),
            )
            return []

    def _open(self) -> sqlite3.Connection:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        # The default journal, since write-ahead logs do not work on network drives.
        made = sqlite3.connect(self.path, timeout=PATIENCE, check_same_thread=False)
        made.execute("CREATE TABLE IF NOT EXISTS logps (key BLOB PRIMARY KEY, logp BLOB NOT NULL) WITHOUT ROWID")
        return made


def cache_of(
    reference: Reference | None, folder: str | Path | None, precision: str, processes: Processes
) -> ReferenceCache | None:
    """Where what a reference says of the data is kept for other runs; None without a reference or a folder.

    Args:
        precision: of the run, by name.
    """
    if reference is None or folder is None:
        return None
    known = identity(reference, 1.0, precision) if processes.is_main else ""
    return ReferenceCache(Path(folder), processes.gather(known)[0])


def wants_reference(algorithm: Algorithm, source: SourceSettings) -> bool:
    """Whether a run needs the policy as it was."""
    return "ref_logp" in algorithm.needs or (source.kind == "rollout" and source.policy == "reference")
