"""Where records come from: files, folders, `datasets`. Each record keeps its origin, "file:line", for messages.

| what                                    | N in the origin "file:N"                                   |
|-----------------------------------------|------------------------------------------------------------|
| .jsonl .ndjson .csv .tsv (and .gz)      | the line it begins on, from 1                              |
| .txt (and .gz)                          | likewise; one document a file, unless a `separator` is set |
| .json (and .gz) holding a list, .parquet, a `datasets` folder or hub id | its index, from 0          |

A folder stands for all its files of these kinds, in sorted order; one with files named after splits (`train.jsonl`,
`test-00000.parquet`, `val.csv.gz`) for the split asked for.

`datasets` reads its own folders and the hub, `pyarrow` Parquet. Text files are read by the standard library: through
`datasets` a record would lose its line and gain the fields of its neighbours, and one broken record would end the file.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import re
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, cast

from alignlab.core.errors import DataError, did_you_mean
from alignlab.core.example import BadRecord

KINDS = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "json",
    ".csv": "csv",
    ".tsv": "csv",
    ".parquet": "parquet",
    ".txt": "text",
}
SPLITS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("validation", "valid", "val", "dev", "eval"), "validation"),
    "test": "test",
}
"""What files and splits are called → which split they are."""

HUB_ID = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")


@dataclass(slots=True)
class Record:
    """A record as it was read.

    Attributes:
        origin: "file:line" (see the head of this module).
        fields: its fields by name.
        error: why it could not be read; "" if it could.
    """

    origin: str
    fields: dict[str, Any] = field(default_factory=dict)
    error: str = ""

    @property
    def file(self) -> str:
        """The file it came from, or the dataset's name."""
        return self.origin.rpartition(":")[0]


def read(
    path: str, split: str | None = None, subset: str | None = None, separator: str | None = None
) -> Iterator[Record]:
    """The records of a file, a folder, a `datasets` folder (save_to_disk) or a dataset of the Hugging Face hub.

    Args:
        path: where; a hub id ("owner/name") is anything that has the form of one and does not exist on disk.
        split: which of its splits. None is "train" where there are splits, and everything where there are none.
        subset: the configuration of a hub dataset that has several.
        separator: what stands between the documents of a .txt file; None if each file is one document.

    Raises:
        DataError: there is no such file or split, or it cannot be read at all. What is wrong with a single record
            is told in that record's `error` instead.
    """
    try:
        yield from _read(path, split, subset, separator)
    except OSError as error:  # a name that is too long, a folder that may not be read, a link to itself
        raise DataError(f"{path}: cannot be read: {error.strerror or error}") from error


def _read(path: str, split: str | None, subset: str | None, separator: str | None) -> Iterator[Record]:
    place = Path(path).expanduser()
    if place.is_dir():
        if (place / "dataset_dict.json").exists() or (place / "state.json").exists():
            yield from _read_saved(place, split)
        else:
            for file in _folder_files(place, split):
                yield from _read_file(file, separator)
    elif place.exists():
        if split is not None:
            raise DataError(f"{path}: is a single file and has no split '{split}'")
        yield from _read_file(place, separator)
    elif HUB_ID.fullmatch(path) and _kind(place) is None:
        yield from _read_hub(path, split or "train", subset)
    else:
        names = [p.name for p in place.parent.iterdir()] if place.parent.is_dir() else []
        raise DataError(f"{path}: no such file or folder{did_you_mean(place.name, names) if len(names) < 50 else ''}")


def _kind(path: Path) -> str | None:
    return KINDS.get(Path(path.name.lower().removesuffix(".gz")).suffix)


def _folder_files(folder: Path, split: str | None) -> list[Path]:
    files = sorted(p for p in folder.iterdir() if p.is_file() and _kind(p) and not p.name.startswith("."))
    if not files:
        raise DataError(f"{folder}: holds no data files; known kinds: {', '.join(KINDS)}, and .gz of the text ones")
    splits: dict[str, list[Path]] = {}
    for file in files:
        name = SPLITS.get(re.split(r"[-_.]", file.name.lower())[0])
        if name:
            splits.setdefault(name, []).append(file)
    if not splits and split is None:
        return files
    wanted = SPLITS.get(split or "train", split or "train")
    if wanted not in splits:
        have = f"it has: {', '.join(sorted(splits))}; see data.split" if splits else "its files are not named by split"
        raise DataError(f"{folder}: has no split '{wanted}'; {have}")
    return splits[wanted]


def _read_file(path: Path, separator: str | None) -> Iterator[Record]:
    kind = _kind(path)
    if kind is None:
        raise DataError(f"{path}: unknown kind of file; known: {', '.join(KINDS)}, and .gz of the text ones")
    if not path.is_file():
        raise DataError(f"{path}: is no file but a folder, a pipe or a device: name a file of records")
    if kind == "parquet":
        yield from _read_parquet(path)
        return
    try:
        with gzip.open(path) if path.suffix.lower() == ".gz" else open(path, "rb") as opened:
            stream = cast(BinaryIO, opened)
            if kind == "jsonl":
                yield from _read_jsonl(path, stream)
            elif kind == "json":
                yield from _read_json(path, stream)
            elif kind == "csv":
                yield from _read_csv(path, stream)
            else:
                yield from _read_text(path, stream, separator)
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path}: cannot be read: {error}") from error


def _read_jsonl(path: Path, stream: BinaryIO) -> Iterator[Record]:
    # Binary lines: a broken byte is then one bad record with its line, and only \n ends a line, as JSONL has it.
    for number, line in enumerate(stream, 1):
        if not line.strip():
            continue
        origin = f"{path}:{number}"
        try:
            value = _json(line.decode("utf-8-sig" if number == 1 else "utf-8"))
        except BadRecord as error:
            yield Record(origin, error=str(error))
        except UnicodeDecodeError as error:
            yield Record(origin, error=f"not UTF-8 (byte {error.start + 1} of the line)")
        except json.JSONDecodeError as error:
            yield Record(origin, error=f"invalid JSON: {error.msg} at column {error.colno}")
        else:
            yield _record(origin, value)


def _json(text: str) -> Any:
    """A JSON value.

    Raises:
        JSONDecodeError: it is not JSON.
        BadRecord: it is, and cannot be held.
    """
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        raise
    except RecursionError as error:
        raise BadRecord("lists or objects in it are nested too deeply") from error
    except ValueError as error:  # Python's limit
        raise BadRecord("a number in it has more than 4,300 digits") from error


def _read_json(path: Path, stream: BinaryIO) -> Iterator[Record]:
    try:
        values = _json(_decode(path, stream))
    except BadRecord as error:
        raise DataError(f"{path}: {error}") from error
    except json.JSONDecodeError as error:
        hint = "; one JSON object a line is .jsonl" if error.msg == "Extra data" else ""
        raise DataError(f"{path}:{error.lineno}: invalid JSON: {error.msg} at column {error.colno}{hint}") from error
    if not isinstance(values, list):
        raise DataError(f"{path}:1: a .json file must hold a list of records, not {_name(values)}")
    for index, value in enumerate(values):
        yield _record(f"{path}:{index}", value)


def _read_csv(path: Path, stream: BinaryIO) -> Iterator[Record]:
    csv.field_size_limit(2**31 - 1)  # the default of 128 KiB is less than a long document
    text = _decode(path, stream)
    delimiter = "\t" if ".tsv" in path.suffixes else ","
    rows = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    header: list[str] | None = None
    start = 1
    try:
        for row in rows:
            origin, start = f"{path}:{start}", rows.line_num + 1
            if not row:
                continue
            if header is None:
                header = row
                twice = sorted({name for name in row if row.count(name) > 1})
                if twice:
                    raise DataError(f"{origin}: the header has the column '{twice[0]}' more than once")
            elif len(row) != len(header):
                yield Record(origin, error=f"{len(row)} cells under {len(header)} columns")
            else:
                yield Record(origin, dict(zip(header, row, strict=True)))
    except csv.Error as error:
        raise DataError(f"{path}:{start}: invalid CSV: {error}") from error


def _read_text(path: Path, stream: BinaryIO, separator: str | None) -> Iterator[Record]:
    text = _decode(path, stream)
    line = 1
    for piece in text.split(separator) if separator else [text]:
        if piece.strip() or not separator:
            start = line + piece[: len(piece) - len(piece.lstrip())].count("\n")
            yield Record(f"{path}:{start}", {"text": piece.strip() if separator else piece})
        line += (piece + (separator or "")).count("\n")


def _read_parquet(path: Path) -> Iterator[Record]:
    from pyarrow import ArrowException, parquet  # type: ignore[import-untyped]

    try:
        index = 0
        for batch in parquet.ParquetFile(path).iter_batches(batch_size=1024):
            for row in _parquet_rows(batch):
                yield Record(f"{path}:{index}", row) if isinstance(row, dict) else Record(f"{path}:{index}", error=row)
                index += 1
    except (ArrowException, OSError) as error:
        raise DataError(f"{path}: cannot be read as Parquet: {error}") from error


def _parquet_rows(batch: Any) -> Iterator[dict[str, Any] | str]:
    """The rows of a batch; for one that cannot be read, why."""
    try:
        yield from batch.to_pylist()
        return
    except UnicodeDecodeError:  # in one of them, before the first was given
        pass
    for i in range(len(batch)):
        try:
            yield batch.slice(i, 1).to_pylist()[0]
        except UnicodeDecodeError:
            yield "a text in it is not UTF-8"


def _read_saved(folder: Path, split: str | None) -> Iterator[Record]:
    import datasets

    try:
        data = datasets.load_from_disk(str(folder))
    except Exception as error:  # whatever `datasets` raises, the user needs the folder's name with it
        raise DataError(f"{folder}: cannot be read as a saved dataset: {error}") from error
    if not isinstance(data, datasets.DatasetDict):
        if split is not None:
            raise DataError(f"{folder}: is a single dataset and has no split '{split}'")
        yield from _rows(str(folder), data)
        return
    wanted = split or "train"
    if wanted not in data:
        raise DataError(f"{folder}: has no split '{wanted}'; it has: {', '.join(data)}; see data.split")
    yield from _rows(f"{folder}/{wanted}", data[wanted])


def _read_hub(path: str, split: str, subset: str | None) -> Iterator[Record]:
    import datasets

    try:
        data = datasets.load_dataset(path, subset, split=split)
    except Exception as error:  # network, authorisation, missing split: all of them are the user's to read
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise DataError(f"{path}: no such file here, and the hub does not give it as a dataset: {reason}") from error
    yield from _rows(f"{path}/{split}", data)


def _rows(name: str, data: Iterable[dict[str, Any]]) -> Iterator[Record]:
    for index, row in enumerate(data):
        yield Record(f"{name}:{index}", row)


def _decode(path: Path, stream: BinaryIO) -> str:
    raw = stream.read()
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise DataError(f"{path}:{line}: not UTF-8; convert the file first, e.g. with iconv") from error


def _record(origin: str, value: object) -> Record:
    if isinstance(value, dict):
        return Record(origin, value)
    return Record(origin, error=f"a record must be a JSON object, not {_name(value)}")


def _name(value: object) -> str:
    names = {dict: "an object", list: "a list", str: "a text", bool: "a truth value", type(None): "null"}
    return names.get(type(value), "a number")
