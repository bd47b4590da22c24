"""Checkpoints that are either whole or not there, whatever kills the process that writes them.

A checkpoint is a folder `step-00000020/`. It is filled under the name `.tmp-step-00000020`; then `manifest.json`, with
size and SHA-256 of every file, is added, everything is synced to the disk, and the folder gets its name in one atomic
rename. Deletion goes the other way: first the rename, to `.trash-…`. So every folder with a proper name is complete,
and whether it still is can be checked.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from alignlab.core import AlignlabError, PeerLost, require
from alignlab.core.files import read_json, sync, sync_below, write_json
from alignlab.core.storage import storage_errors
from alignlab.training.checkpoints.hashing import files_below, sha256_each

logger = logging.getLogger(__name__)

MANIFEST = "manifest.json"
TEMPORARY, TRASH = ".tmp-", ".trash-"
NAME = re.compile(r"step-(\d{8,})")
VISIBLE_WITHIN = 30.0
"""Seconds after which a folder made on one node must be seen on another; network file systems lag by a few."""


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a checkpoint: `step`, `metric` (a float or None), `time` (ISO 8601, UTC) and `files`, from path
    within the folder to `bytes` and `sha256`.

    Raises:
        AlignlabError: it is missing or damaged.
    """
    path = folder / MANIFEST
    if not path.exists():
        raise AlignlabError(f"{folder}: no {MANIFEST}")
    manifest = read_json(path, "not used", {"step": int, "files": dict})
    if manifest.pop("sha256", None) != _seal(manifest):
        raise AlignlabError(f"{path}: damaged: its contents do not have the checksum it bears")
    return manifest


def verify(folder: Path, contents: bool = True) -> list[str]:
    """What is wrong with a checkpoint; empty where nothing is.

    Args:
        contents: also read every file and compare its SHA-256; otherwise sizes alone are compared.
    """
    problems: list[str] = []
    try:
        manifest = read_manifest(folder)
        if manifest["step"] != _step(folder):
            problems.append(f"{folder}: its manifest is of step {manifest['step']}")
        present = {}
        for name, expected in manifest["files"].items():
            path = folder / name
            if not path.is_file():
                problems.append(f"{path}: missing")
            elif (size := path.stat().st_size) != expected["bytes"]:
                problems.append(f"{path}: {size} bytes instead of {expected['bytes']}")
            else:
                present[path] = expected["sha256"]
        if contents and not problems:
            digests = sha256_each(present, f"checking {folder.name}")
            problems += [f"{path}: the contents changed" for path in present if digests[path] != present[path]]
    except AlignlabError as error:
        problems.append(str(error))
    except OSError as error:
        problems.append(f"{folder}: cannot be read ({error})")
    return problems


class Checkpoints:
    """The checkpoints of one run: written atomically, verified when read, pruned.

    In a run of several processes each makes one of these, and the folder lies on a file system that all share.

    Args:
        folder: where they lie; made when the first is written.
        keep_last: how many of the newest to keep, >= 1.
        keep_best: whether to keep, besides, the one with the best metric.
        mode: whether the lowest ("min") or the highest ("max") metric is best.
        is_main: whether this is the main process of a training run: it deletes what a killed process left behind.
            False for the other processes, and for whoever only reads, which change nothing when made.
        agree: given whether all went well in this process, whether it did so in all of them; must wait for all
            (a logical-and all-reduce). The default is right for a single process.
        guard: called before anything is written; raises where this process may not write.

    Attributes:
        at: step of the checkpoint that was last written, or gone on from; None before.
        took: seconds that the last one took to write.
        problems: what was found wrong with checkpoints so far, for people; each is logged as an error once, too.
    """

    def __init__(
        self,
        folder: Path,
        keep_last: int = 2,
        keep_best: bool = True,
        mode: Literal["min", "max"] = "min",
        is_main: bool = True,
        agree: Callable[[bool], bool] = bool,
        guard: Callable[[], None] | None = None,
    ) -> None:
        require(keep_last >= 1, "keep_last", keep_last, "must be >= 1: the newest checkpoint is always kept")
        require(mode in ("min", "max"), "mode", mode, "must be 'min' or 'max'")
        self.folder, self.keep_last, self.keep_best, self.mode = Path(folder), keep_last, keep_best, mode
        self.is_main, self.agree, self.guard = is_main, agree, guard
        self.at: int | None = None
        self.took = 0.0
        self.problems: list[str] = []
        self._damaged: set[Path] = set()
        if is_main:
            self._clean()

    def folders(self) -> list[Path]:
        """All checkpoints, by step, the oldest first; unverified."""
        if not self.folder.is_dir():
            return []
        return sorted((p for p in self.folder.iterdir() if NAME.fullmatch(p.name) and p.is_dir()), key=_step)

    def latest(self) -> Path | None:
        """The newest checkpoint whose checksums are right, or None. The damaged ones met on the way are left where
        they are, logged as errors and listed in `problems`: look there before taking None for a fresh start."""
        return next((path for path in reversed(self.folders()) if self._good(path)), None)

    def best(self) -> Path | None:
        """The checkpoint with the best metric whose checksums are right, or None; the earliest of equally good ones."""
        return next((path for path in self._ranked(self.folders()) if self._good(path)), None)

    @contextmanager
    def write(self, step: int, metric: float | None = None) -> Iterator[Path]:
        """A temporary folder to be filled; at the end of the block it becomes the checkpoint of `step`.

        Called by all processes, which get the same folder and may each put files there. Where the step has a whole
        checkpoint already, that one stays: it is of the same state. Then older ones are pruned.

        Args:
            metric: what `best` goes by; None or a non-finite one is never the best.

        Raises:
            AlignlabError: the disk is full, over quota, read-only…; or another process failed. Earlier checkpoints
                are as they were, and the temporary folder is gone if it could be deleted. Any other exception from
                the block leaves things alike and passes through.
        """
        temporary, began = self.folder / f"{TEMPORARY}{_name(step)}", time.monotonic()
        with self._stage(step):
            if self.guard is not None:
                self.guard()
            if self.is_main:
                with self._storage_errors(step):
                    _remove(temporary)
                    temporary.mkdir(parents=True)
        with self._stage(step), self._storage_errors(step):
            _await(temporary)
            yield temporary
        with self._stage(step):
            if self.is_main:
                self._commit(temporary, step, metric)
        self.at, self.took = step, time.monotonic() - began

    def _commit(self, temporary: Path, step: int, metric: float | None) -> None:
        """Make the filled temporary folder the checkpoint of `step`, and prune."""
        final = self.folder / _name(step)
        with self._storage_errors(step):
            _write_manifest(temporary, step, metric)
            sync_below(temporary)
            if final.exists() and not verify(final):
                _remove(temporary)
            else:
                self._delete(final)
                os.rename(temporary, final)
                self._damaged.discard(final)
            sync(self.folder)
            sync(self.folder.parent)
        self._prune(final)

    def discard_after(self, step: int) -> None:
        """Delete the checkpoints of later steps: those of a future that a run resumed at `step` will not have; and
        what a process that was killed has not pruned."""
        self.at = step
        if self.is_main:
            for path in self.folders():
                if _step(path) > step:
                    self._delete(path)
            self._prune(self.folder / _name(step))

    def _good(self, path: Path) -> bool:
        problems = verify(path)
        self._report(path, problems)
        return not problems

    def _report(self, path: Path, problems: list[str]) -> None:
        for problem in problems:
            self._damaged.add(path)
            if problem not in self.problems:
                self.problems.append(problem)
                logger.error("damaged checkpoint, not used: %s. Delete %s if you have no use for it", problem, path)

    def _ranked(self, paths: list[Path]) -> list[Path]:
        """Those with a metric, the best first; of equal ones the earliest first."""
        metrics: list[tuple[float, Path]] = []
        for path in paths:
            try:
                metric = read_manifest(path)["metric"]
            except AlignlabError as error:
                self._report(path, [str(error)])
                continue
            if metric is not None:
                metrics.append((metric if self.mode == "min" else -metric, path))
        return [path for _, path in sorted(metrics, key=lambda pair: pair[0])]

    def _prune(self, written: Path) -> None:
        """Delete all but the newest, the best and the one just written. What is damaged neither counts nor is
        deleted: it would take the place of a good one, and is not known to be ours."""
        good = [path for path in self.folders() if path not in self._damaged and not verify(path, contents=False)]
        keep = {written, *good[-self.keep_last :]}
        if self.keep_best:
            keep.update(self._ranked(good)[:1])
        for path in good:
            if path not in keep:
                self._delete(path)

    def _delete(self, path: Path) -> None:
        """Atomically: a half-deleted checkpoint never bears a proper name. Failing costs space, so only warns."""
        if not path.exists():
            return
        trash = path.with_name(f"{TRASH}{path.name}")
        try:
            _remove(trash)
            os.rename(path, trash)
            _remove(trash)
        except OSError as error:
            logger.warning("an old checkpoint could not be deleted, and takes up space: %s", error)

    def _clean(self) -> None:
        """Remove what a killed process left half-written or half-deleted."""
        for path in sorted(self.folder.iterdir()) if self.folder.is_dir() else ():
            if path.name.startswith((TEMPORARY, TRASH)):
                try:
                    _remove(path)
                except OSError as error:
                    logger.warning("left-overs of an earlier process could not be cleared away: %s", error)

    @contextmanager
    def _stage(self, step: int) -> Iterator[None]:
        """What all processes do before they meet again. If it fails in one, it raises in all: none waits for ever."""
        failure: Exception | None = None
        try:
            yield
        except Exception as error:
            failure = error
        except BaseException:  # Ctrl-C: the others may not come to the meeting
            self._abandon(step)
            raise
        try:
            if self.agree(failure is None):
                return
        except AlignlabError as silent:  # the others may be waiting for what this process failed to take part in
            self._abandon(step)
            raise failure or silent from silent
        self._abandon(step)
        if failure is not None:
            raise failure
        raise PeerLost(f"{self.folder}: the checkpoint of step {step} failed in another process; see its message")

    def _abandon(self, step: int) -> None:
        if self.is_main:
            shutil.rmtree(self.folder / f"{TEMPORARY}{_name(step)}", ignore_errors=True)

    def _storage_errors(self, step: int) -> AbstractContextManager[None]:
        there = [path.name for path in self.folders()]
        intact = f"earlier checkpoints are intact, the latest is {there[-1]}" if there else "there is no earlier one"
        return storage_errors(self.folder, f"the checkpoint of step {step} could not be written ({intact})")


def _name(step: int) -> str:
    require(step >= 0, "step", step, "must be >= 0")
    return f"step-{step:08}"


def _step(path: Path) -> int:
    return int(path.name.removeprefix("step-"))


def _seal(manifest: dict[str, Any]) -> str:
    """SHA-256 of the manifest's contents, so that a changed metric or checksum is noticed too."""
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def _write_manifest(folder: Path, step: int, metric: float | None) -> None:
    if (folder / MANIFEST).exists():
        raise AlignlabError(f"{folder / MANIFEST}: this name is kept for the list of files; save under another")
    paths = files_below(folder)
    digests = sha256_each(paths, f"checksums of step {step}")
    manifest: dict[str, Any] = {
        "step": step,
        "metric": float(metric) if metric is not None and math.isfinite(metric) else None,
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "files": {
            path.relative_to(folder).as_posix(): {"bytes": path.stat().st_size, "sha256": digests[path]}
            for path in paths
        },
    }
    write_json(folder / MANIFEST, manifest | {"sha256": _seal(manifest)})


def _remove(path: Path) -> None:
    if path.exists():
        shutil.rmtree(path)


def _await(folder: Path) -> None:
    """Wait until a folder that another node made is seen here."""
    deadline = time.monotonic() + VISIBLE_WITHIN
    while not folder.is_dir():
        if time.monotonic() > deadline:
            raise AlignlabError(
                f"{folder}: made by the main process but not seen here: all nodes must share the run's file system. "
                "Choose a shared folder with out=DIR"
            )
        time.sleep(0.1)
