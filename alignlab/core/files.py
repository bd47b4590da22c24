"""Files that are written whole or not at all, even if the process is killed while it writes; and how they are read
back: what was damaged since, or came from someone else, is told by its name, with what to do."""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
from collections.abc import Iterable, Mapping
from contextlib import suppress
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


def write_text(path: Path, text: str, as_it_is: bool = False) -> None:
    """Replace a file in one step: readers find the old or the new contents, never a part, even after a crash.

    Args:
        as_it_is: what looks like a secret is not taken out of it: it is someone's data.

    Raises:
        AlignlabError: it cannot be written; the old file is unchanged.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    with storage_errors(path.parent, f"{path.name} could not be written"):
        try:
            temporary.write_text(text if as_it_is else hide(text), encoding="utf-8")
            sync(temporary)
            os.replace(temporary, path)
        except BaseException:
            with suppress(OSError):
                temporary.unlink()
            raise
        sync(path.parent)


def write_config(path: Path, config: Any) -> None:
    """`write_text` of a config as YAML, without its secrets."""
    import yaml

    write_text(path, yaml.safe_dump(without_secrets(config), sort_keys=False, allow_unicode=True))


def write_json(path: Path, value: Any) -> None:
    """`write_text` of a value as indented JSON."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


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
