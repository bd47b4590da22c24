"""The same records out of every kind of file, each with the place it came from."""

import csv
import gzip
import io
import json
import re

import pytest

from alignlab.core import DataError
from alignlab.data.sources import read

ROWS = [
    {"prompt": "a", "completion": "b"},
    {"prompt": 'é, "q"', "completion": "x\ny"},
    {"prompt": "e", "completion": "f"},
]


def jsonl(rows):
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def as_csv(rows, delimiter=","):
    stream = io.StringIO(newline="")
    writer = csv.DictWriter(stream, fieldnames=list(rows[0]), delimiter=delimiter)
    writer.writeheader()
    writer.writerows(rows)
    return stream.getvalue()


def write(path, text):
    if path.suffix == ".gz":
        path.write_bytes(gzip.compress(text.encode()))
    else:
        path.write_bytes(text.encode())
    return path


def found(path, **options):
    return [(record.origin.removeprefix(f"{path}:"), record.fields) for record in read(str(path), **options)]


@pytest.mark.parametrize("name", ["a.jsonl", "a.ndjson", "a.jsonl.gz", "A.JSONL"])
def test_jsonl_counts_lines_from_one_and_passes_over_blank_ones(tmp_path, name):
    path = write(tmp_path / name, jsonl(ROWS[:1]) + "\n  \n" + jsonl(ROWS[1:]))
    assert found(path) == [("1", ROWS[0]), ("4", ROWS[1]), ("5", ROWS[2])]


def test_only_a_newline_ends_a_line_of_jsonl(tmp_path):
    rows = [{"text": "a\u2028b\x85c"}, {"text": "d"}]
    assert found(write(tmp_path / "a.jsonl", jsonl(rows))) == [("1", rows[0]), ("2", rows[1])]


@pytest.mark.parametrize("name", ["a.csv", "a.tsv", "a.csv.gz", "a.tsv.gz"])
def test_csv_counts_the_line_a_record_begins_on(tmp_path, name):
    path = write(tmp_path / name, as_csv(ROWS, "\t" if ".tsv" in name else ","))
    assert found(path) == [("2", ROWS[0]), ("3", ROWS[1]), ("5", ROWS[2])]  # the second record takes two lines


def test_a_line_separator_within_a_csv_cell_does_not_end_the_record(tmp_path):
    path = write(tmp_path / "a.csv", "prompt,completion\na\u2028b,c\n")
    assert found(path) == [("2", {"prompt": "a\u2028b", "completion": "c"})]


@pytest.mark.parametrize("name", ["a.json", "a.json.gz"])
def test_json_counts_from_zero(tmp_path, name):
    assert found(write(tmp_path / name, json.dumps(ROWS))) == list(zip("012", ROWS, strict=True))


def test_parquet(tmp_path):
    import pyarrow
    from pyarrow import parquet

    rows = [{"messages": [{"role": "user", "content": "q"}], "score": None}, {"messages": [], "score": 2.5}]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    assert found(tmp_path / "a.parquet") == list(zip("01", rows, strict=True))


def test_a_saved_dataset_with_and_without_splits(tmp_path):
    datasets = pytest.importorskip("datasets")
    whole = datasets.Dataset.from_list(ROWS)
    whole.save_to_disk(tmp_path / "one")
    datasets.DatasetDict(train=whole, test=whole.select([2])).save_to_disk(tmp_path / "many")
    assert found(tmp_path / "one") == list(zip("012", ROWS, strict=True))
    assert [record.origin for record in read(str(tmp_path / "many"), "test")] == [f"{tmp_path}/many/test:0"]
    assert [record.fields for record in read(str(tmp_path / "many"))] == ROWS  # train by default
    with pytest.raises(DataError, match="no split 'dev'; it has: train, test"):
        found(tmp_path / "many", split="dev")
    with pytest.raises(DataError, match="single dataset and has no split 'test'"):
        found(tmp_path / "one", split="test")


def test_a_hub_dataset_is_asked_for_by_name_subset_and_split(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    asked = []

    def load_dataset(path, subset, split):
        asked.append((path, subset, split))
        return datasets.Dataset.from_list(ROWS)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.chdir(tmp_path)
    records = list(read("owner/name", "test", subset="main"))
    assert asked == [("owner/name", "main", "test")]
    assert [record.fields for record in records] == ROWS
    assert records[2].origin == "owner/name/test:2"


def test_a_hub_dataset_that_is_not_there(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")

    def load_dataset(*_, **__):
        raise FileNotFoundError("no network\nand more")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match=r"^owner/name: no such file here, and the hub .*: no network$"):
        list(read("owner/name"))


def test_a_text_file_is_one_document_or_several(tmp_path):
    path = write(tmp_path / "a.txt", "\n\none\ntwo\n\n\nthree\n")
    assert found(path) == [("3", {"text": "\n\none\ntwo\n\n\nthree\n"})]
    assert found(path, separator="\n\n") == [("3", {"text": "one\ntwo"}), ("7", {"text": "three"})]


def test_a_folder_is_its_files_in_order(tmp_path):
    for name, row in (("b.jsonl", ROWS[1]), ("a.jsonl.gz", ROWS[0]), ("c.jsonl", ROWS[2])):
        write(tmp_path / name, jsonl([row]))
    write(tmp_path / "README.md", "not data")
    write(tmp_path / ".hidden.jsonl", "not data")
    records = list(read(str(tmp_path)))
    assert [record.fields for record in records] == ROWS
    assert records[0].origin == f"{tmp_path / 'a.jsonl.gz'}:1"


def test_a_folder_with_files_named_after_splits(tmp_path):
    names = ("train-00000-of-00002.jsonl", "train-00001-of-00002.jsonl", "dev.jsonl")
    for name, row in zip(names, ROWS, strict=True):
        write(tmp_path / name, jsonl([row]))
    write(tmp_path / "notes.txt", "belongs to no split")
    assert [record.fields for record in read(str(tmp_path))] == ROWS[:2]
    assert [record.fields for record in read(str(tmp_path), "validation")] == ROWS[2:]
    with pytest.raises(DataError, match="no split 'test'; it has: train, validation"):
        list(read(str(tmp_path), "test"))


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b'{"prompt": "a",}', "invalid JSON: .* at column"),
        (b'{"prompt": "a"', "invalid JSON"),
        (b"[1, 2]", "must be a JSON object, not a list"),
        (b"3", "must be a JSON object, not a number"),
        (b'{"prompt": "\xff"}', "not UTF-8"),
    ],
)
def test_a_broken_line_is_one_bad_record(tmp_path, line, reason):
    (tmp_path / "a.jsonl").write_bytes(b'{"prompt": "fine"}\n' + line + b'\n{"prompt": "fine too"}\n')
    records = list(read(str(tmp_path / "a.jsonl")))
    assert [bool(record.error) for record in records] == [False, True, False]
    assert records[1].origin.endswith("a.jsonl:2")
    assert re.search(reason, records[1].error)


def test_a_csv_record_with_too_few_cells_is_bad(tmp_path):
    path = write(tmp_path / "a.csv", "prompt,completion\na,b\nc\nd,e\n")
    records = list(read(str(path)))
    assert [(record.origin[-1], record.error) for record in records] == [
        ("2", ""),
        ("3", "1 cells under 2 columns"),
        ("4", ""),
    ]


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("a.json", b'[{"a": 1},\n {"a": }]', r"a\.json:2: invalid JSON"),
        ("a.json", b'{"a": 1}\n{"a": 2}\n', r"one JSON object a line is \.jsonl"),
        ("a.json", b'{"a": 1}', "must hold a list of records, not an object"),
        ("a.csv", b'a,b\n1,2\n"3"x,4\n', r"a\.csv:3: invalid CSV"),
        ("a.csv", b"a,a\n1,2\n", r"a\.csv:1: the header has the column 'a' more than once"),
        ("a.txt", b"fine\n\xff", r"a\.txt:2: not UTF-8"),
        ("a.jsonl.gz", b"not gzip", r"a\.jsonl\.gz: cannot be read"),
        ("a.jsonl.gz", gzip.compress(b'{"a": 1}\n' * 99, mtime=0)[:-9], r"a\.jsonl\.gz: cannot be read"),
        ("a.parquet", b"not parquet", r"a\.parquet: cannot be read"),
        ("a.xml", b"<a/>", r"a\.xml: unknown kind of file"),
    ],
)
def test_a_file_that_cannot_be_read_at_all(tmp_path, name, content, reason):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=reason):
        list(read(str(tmp_path / name)))


def test_no_such_file_suggests_a_near_one(tmp_path):
    write(tmp_path / "train.jsonl", "")
    with pytest.raises(DataError, match=r"trian\.jsonl: no such file or folder; did you mean 'train\.jsonl'"):
        list(read(str(tmp_path / "trian.jsonl")))


def test_a_folder_without_data_and_a_file_without_splits(tmp_path):
    with pytest.raises(DataError, match="holds no data files"):
        list(read(str(tmp_path)))
    path = write(tmp_path / "a.jsonl", jsonl(ROWS))
    with pytest.raises(DataError, match="single file and has no split 'test'"):
        list(read(str(path), "test"))
