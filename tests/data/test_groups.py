"""Groups and records on disk come back as they were, token by token."""

import copy
import json

import numpy as np
import pytest

from alignlab.core import DataError, Group, Response
from alignlab.data import DataSettings, group_to_record, load, write_jsonl
from tests.tiny import listed

# Ids that no tokenising of the texts gives: 104, 105 is "hi", but so are other ids in a vocabulary with longer tokens.
SAMPLED = Group(
    [1, 2],
    [
        Response([200, 201], None, {"score": 0.5, "behaviour_logp": [-1.0, -2.0]}, False, "hi", "policy"),
        Response([202, 203, 257], [True, False, True], {"score": 1.5}, True, "ho"),
    ],
    prompt="q",
    columns={"weight": 2.0},
    extra={"answer": "42"},
)


def test_tokens_are_not_made_anew(tmp_path, tokenizer):
    write_jsonl(tmp_path / "a.jsonl", [group_to_record(SAMPLED)])
    (group,) = load(DataSettings(path=str(tmp_path / "a.jsonl")), tokenizer).train
    expected = copy.deepcopy(SAMPLED)
    expected.origin = f"{tmp_path / 'a.jsonl'}:1"
    del expected.responses[0].columns["behaviour_logp"]  # per token: recomputed by whoever needs it
    assert group == expected


@pytest.mark.parametrize("broken", [{"prompt_ids": []}, {"responses": [{"token_ids": []}]}, {"responses": ["text"]}])
def test_what_is_no_such_group_is_a_bad_record(tmp_path, tokenizer, broken):
    write_jsonl(tmp_path / "a.jsonl", [{**group_to_record(SAMPLED), **broken}])
    with pytest.raises(DataError, match=r"a\.jsonl:1: "):
        load(DataSettings(path=str(tmp_path / "a.jsonl")), tokenizer)


def test_columns_may_be_arrays(tmp_path, tokenizer):
    response = Response([5, 6], columns={"step_label": np.array([1, -1], np.float32), "reward": np.float32(0.5)})
    response.columns["behaviour_logp"] = np.zeros(2)
    write_jsonl(tmp_path / "a.jsonl", [group_to_record(Group([1], [response]))])
    (group,) = load(DataSettings(path=str(tmp_path / "a.jsonl")), tokenizer).train
    assert listed(group.responses[0]) == {"step_label": [1.0, -1.0], "reward": 0.5}


def test_written_records_are_read_again_and_never_half_there(tmp_path):
    path = tmp_path / "new" / "a.jsonl"
    rows = [{"prompt": "é\u2028\n", "n": 1}, {"prompt": "b", "list": [1.5, None]}]
    write_jsonl(path, rows)
    assert [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n")[:-1]] == rows
    with pytest.raises(DataError, match=r"a\.jsonl:2: the record cannot be written as JSON"):
        write_jsonl(path, [{"a": 1}, {"a": float("nan")}])
    assert len(path.read_text(encoding="utf-8").split("\n")) == 3  # the old file is whole
    assert [p.name for p in path.parent.iterdir()] == ["a.jsonl"]
