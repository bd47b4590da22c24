"""Files and folders that are written whole or not at all, even if the process is killed or the machine loses its power
meanwhile. All that a run or a comparison leaves is written by these functions, whose errors are those of `storage`, and
read back by others: what was damaged since, or came from someone else, is told by its name, with what to do."""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from alignlab.core.errors import AlignlabError, shorten
from alignlab.core.secrets import hide, without_secrets
from alignlab.core.storage import storage_errors

logger = logging.getLogger(__name__)

NAMES = {dict: "an object", list: "a list", str: "a text", int: "a whole number", float: "a number"}


def read_text(path: Path, advice: str) -> str:
    """A text file of ours.

    Args:
        advice: what to do where it cannot be read, as in "delete it".

    Raises:
        AlignlabError: it is not there, or cannot be read.
    """
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:  # UnicodeDecodeError is a ValueError
        what = error.strerror if isinstance(error, OSError) and error.strerror else shorten(error)
        raise AlignlabError(f"{path}: cannot be read: {what}: {advice}") from error


def read_json(
    path: Path, advice: str, shape: Mapping[str, type] | None = None, absent: dict[str, Any] | None = None
) -> dict[str, Any]:
    """A JSON object of ours.

    Args:
        advice: what to do where it is damaged, as in "delete it".
        shape: keys that it must have, and of which type; a whole number is a float, too.
        absent: what is returned where there is no such file; None: that is an error.

    Raises:
        AlignlabError: it is damaged, with what was expected.
    """
    if absent is not None and not path.exists():
        return absent
    return _object(read_text(path, advice), str(path), advice, shape or {})


def _object(text: str, where: str, advice: str, shape: Mapping[str, type]) -> dict[str, Any]:
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        what = "is empty" if not text.strip() else f"not JSON: {shorten(error)}"
        raise AlignlabError(f"{where}: damaged: {what}: {advice}") from error
    if not isinstance(found, dict):
        raise AlignlabError(f"{where}: damaged: must hold an object, not {NAMES.get(type(found), 'this')}: {advice}")
    for key, kind in shape.items():
        value = found.get(key)
        if not isinstance(value, (int, float) if kind is float else kind) or isinstance(value, bool):
            raise AlignlabError(f"{where}: damaged: {key} must be {NAMES[kind]}: {advice}")
    return found


def read_lines(path: Path, shape: Mapping[str, type]) -> list[tuple[str, dict[str, Any]]]:
    """The lines of a file of JSON objects, as text and as values; none where there is no such file. What is no such
    line, as the last one of a process that was killed, is left out, and said.

    Args:
        shape: as in `read_json`.

    Raises:
        AlignlabError: it cannot be read.
    """
    if not path.exists():
        return []
    found, wrong = [], []
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        raise AlignlabError(f"{path}: cannot be read: {error.strerror}: move it away") from error
    for number, line in enumerate(text.split("\n"), start=1):
        if line:
            try:
                found.append((line, _object(line, f"{path}:{number}", "left out", shape)))
            except AlignlabError as error:
                wrong.append(str(error))
    if wrong:
        logger.warning("%s%s", wrong[0], f", and {len(wrong) - 1} more lines" if wrong[1:] else "")
    return found


def checksums(folder: Path, names: Iterable[str]) -> dict[str, str]:
    """SHA-256, in hexadecimal digits, of those of these files that are there."""
    return {n: hashlib.sha256((folder / n).read_bytes()).hexdigest() for n in names if (folder / n).is_file()}


def write_bytes(path: Path, content: bytes) -> None:
    """Replace a file in one step: readers find the old or the new contents, never a part, even after a crash. Its
    folder is made where there is none.

    Raises:
        StorageError: it cannot be written; the old file is unchanged.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    with storage_errors(path.parent, f"{path.name} could not be written"):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary.write_bytes(content)
            sync(temporary)
            os.replace(temporary, path)
        except BaseException:
            with suppress(OSError):
                temporary.unlink()
            raise
        sync(path.parent)


def write_text(path: Path, text: str, as_it_is: bool = False) -> None:
    """`write_bytes` of a text, in UTF-8; surrogates, which it has not, as in JSON (`\\ud800`).

    Args:
        as_it_is: what looks like a secret is not taken out of it: it is someone's data.
    """
    write_bytes(path, (text if as_it_is else hide(text)).encode("utf-8", "backslashreplace"))


def write_config(path: Path, config: Any) -> None:
    """`write_text` of a config as YAML, without its secrets."""
    import yaml

    write_text(path, yaml.safe_dump(without_secrets(config), sort_keys=False, allow_unicode=True))


def write_json(path: Path, value: Any) -> None:
    """`write_text` of a value as indented JSON."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


@contextmanager
def replacing(folder: Path) -> Iterator[Path]:
    """A temporary folder to be filled; at the end of the block it takes the place of `folder`.

    No system call does that to a folder which is not empty. A crash between the two that are needed leaves the old one
    under a temporary name, from which `restore` brings it back.

    Raises:
        StorageError: it cannot be written; the old folder is unchanged, and the temporary one gone. Any other exception
            from the block leaves things alike and passes through.
    """
    temporary, former = folder.with_name(f".{folder.name}.tmp"), _former(folder)
    with storage_errors(folder.parent, f"{folder.name} could not be saved"):
        try:
            restore(folder)
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)
            yield temporary
            sync_below(temporary)
            if folder.exists():
                os.rename(folder, former)
            os.rename(temporary, folder)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            with suppress(OSError):
                restore(folder)
            raise
        sync(folder.parent)
        shutil.rmtree(former, ignore_errors=True)


def restore(folder: Path) -> None:
    """Bring back a folder that was about to be replaced when the process was killed."""
    former = _former(folder)
    if former.exists() and folder.exists():
        shutil.rmtree(former)
    elif former.exists():
        os.rename(former, folder)


def discard(folder: Path) -> None:
    """Remove a folder: whenever the process is killed, it is there whole or not at all."""
    trash = folder.with_name(f".trash-{folder.name}")
    shutil.rmtree(trash, ignore_errors=True)
    if folder.exists():
        os.rename(folder, trash)
        shutil.rmtree(trash, ignore_errors=True)


def sync(path: Path) -> None:
    """Wait until the kernel has written a file's contents, or a folder's list of names, to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP) or not path.is_dir():  # some network file systems
            raise
    finally:
        os.close(handle)


def sync_below(folder: Path) -> None:
    """`sync` of all files and folders in a folder, and of itself, the deepest first."""
    for path in sorted([folder, *folder.rglob("*")], reverse=True):
        sync(path)


def _former(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.old")
