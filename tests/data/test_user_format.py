"""A new data format is one parser of the user's, anywhere on the path, and one config. No file of ours is touched."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from alignlab.cli import main
from tests.training import runs

PARSER = '''
"""Debates: a question, and what two sides said; the audience's votes tell who was better."""

from alignlab.core import BadRecord, Example


def debate(record):
    """An even vote tells nothing, so such a record is refused."""
    (first, votes), (second, other) = ((side["said"], side["votes"]) for side in record["sides"])
    if votes == other:
        raise BadRecord(f"{votes} votes on each side: nobody is preferred")
    answers = [first, second] if votes > other else [second, first]
    columns = [{"score": float(abs(votes - other))}, {"score": 0.0}]
    return Example(record["question"], answers, columns, pair=True, extra={"topic": record["topic"]})
'''

CONFIG = """
defaults:
  - base                       # all other settings of the data, with their defaults
  - _self_

parser: debates.debate         # module.function; a class with settings: {_target_: debates.Debate, setting: value}
"""


def as_debate(pair: dict[str, str], turned: bool) -> dict[str, object]:
    sides = [{"said": pair["chosen"], "votes": 2}, {"said": pair["rejected"], "votes": 1}]
    return {"topic": "t", "question": pair["prompt"], "sides": sides[::-1] if turned else sides}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A model, pairs in a layout of ours, and the same pairs as debates, with parser and config."""
    runs.prepare(tmp_path)
    pairs = [json.loads(line) for line in (tmp_path / "preferences.jsonl").read_text().splitlines()]
    debates = [json.dumps(as_debate(pair, turned=i % 2 == 1)) for i, pair in enumerate(pairs)]
    (tmp_path / "debates.jsonl").write_text("\n".join(debates) + "\n")
    (tmp_path / "debates.py").write_text(PARSER)
    (tmp_path / "configs/data").mkdir(parents=True)
    (tmp_path / "configs/data/debates.yaml").write_text(CONFIG)
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path


def train(folder: Path, *words: str, out: str = "own") -> int:
    common = [f"model={folder}/base", "algorithm=dpo", "training.steps=3", "training.epochs=null", *runs.SGD]
    return main(["train", *common, "training.batch_size=5", "training.progress=off", f"out={folder}/{out}", *words])


def test_a_run_on_a_layout_of_the_users_is_one_on_the_same_pairs_in_ours(
    folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert train(folder, f"--config-dir={folder}/configs", "data=debates", f"data.path={folder}/debates.jsonl") == 0
    assert "records: 12 read, 0 bad; debates.debate 12" in capfd.readouterr().out
    assert train(folder, "data=preferences", f"data.path={folder}/preferences.jsonl", out="ours") == 0
    own, ours = ([line["loss"] for line in runs.metrics(folder, out)] for out in ("own", "ours"))
    assert own == ours
    assert runs.identical(runs.weights(folder, "own"), runs.weights(folder, "ours"))


@pytest.mark.parametrize(
    ("broken", "said"),
    [
        (
            {"sides": [{"said": "a"}]},
            "debates.jsonl:13: data.parser=debates.debate: KeyError: 'votes' (debates.py:9); ",
        ),
        (
            as_debate({"prompt": "a", "chosen": "b", "rejected": " "}, False),
            "debates.jsonl:13: data.parser=debates.debate: responses[1] is empty; mend it, ",
        ),
        (
            {"question": "a", "sides": [{"said": "a", "votes": 1}, {"said": "b", "votes": 1}]},
            "debates.jsonl:13: 1 votes on each side: nobody is preferred; mend it, or leave such records out with ",
        ),
    ],
)
def test_what_goes_wrong_in_it_is_one_line_with_parser_file_and_line(
    folder: Path, capfd: pytest.CaptureFixture[str], broken: dict[str, object], said: str
) -> None:
    with (folder / "debates.jsonl").open("a") as file:
        file.write(json.dumps(broken) + "\n")
    capfd.readouterr()
    assert train(folder, "data=base", "data.parser=debates:debate", f"data.path={folder}/debates.jsonl") == 2
    line = capfd.readouterr().err.splitlines()[-1]
    assert line.startswith(f"alignlab: {folder}/{said}")


def test_a_parser_that_is_not_there_is_told_before_anything_is_loaded(
    folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert train(folder, "model=nowhere", "data.parser=debates.debat", "data.path=nowhere.jsonl") == 2
    assert capfd.readouterr().err == (
        "alignlab: data.parser=debates.debat: debates has no 'debat'; did you mean 'debate'?\n"
    )
