"""The files in which wandb keeps, on this machine, what it was told: read to learn how far they go.

A process that is killed takes wandb's own process with it, and what that had not yet written. So a run that goes on
offline, where no server can be asked, must look what there is.
"""

from __future__ import annotations

import os
import shutil
import struct
from pathlib import Path

BLOCK, HEADER = 32768, struct.Struct("<IHB")
"""Of LevelDB's log format: bytes of a block; checksum, length and kind of a chunk, which lies within one block."""

FILE_HEADER = 7
"""Bytes with which such a file begins, before the first block's first chunk but counted in it."""

WHOLE, LAST = 1, 4
"""Kinds of chunks that end a record; 2 and 3 begin one and go on with it."""


def recorded(folder: Path, run: str, but: Path) -> int:
    """How many lines of metrics the earlier sessions of a run have left in wandb's folder.

    Logs of sessions that were killed are put in order, for `wandb sync` stumbles over them, and then uploads nothing of
    what comes after: a record that was not written whole is cut off, and a log that does not even name its run, and so
    holds nothing, is removed.

    Args:
        folder: wandb's folder, with one for each session.
        run: the run's id.
        but: the folder of this session.
    """
    lines = 0
    for log in sorted(folder.glob(f"*run-*-{run}/*.wandb")):
        if log.parent == but:
            continue
        kinds, end = _records(log)
        lines += kinds.count("history")
        if not log.parent.name.startswith("offline-"):
            continue
        if "run" not in kinds:
            shutil.rmtree(log.parent, ignore_errors=True)
        elif end < log.stat().st_size:
            os.truncate(log, end)
    return lines


def _records(log: Path) -> tuple[list[str], int]:
    """The kinds of the records of a log, and where the last whole one ends, in bytes."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, at, end = log.read_bytes(), FILE_HEADER, FILE_HEADER
    kinds, text = [], b""
    while at + HEADER.size <= len(data):
        if BLOCK - at % BLOCK < HEADER.size:  # too little is left of the block for a chunk
            at += BLOCK - at % BLOCK
            continue
        _, length, place = HEADER.unpack_from(data, at)
        at += HEADER.size + length
        if at > len(data):
            break
        text += data[at - length : at]
        if place in (WHOLE, LAST):
            record = Record()
            record.ParseFromString(text)
            kinds.append(str(record.WhichOneof("record_type")))
            text, end = b"", at
    return kinds, end
