"""Groups on disk come back as they were, token by token."""

import copy

import pytest

from alignlab.core import DataError, Group, Response
from alignlab.data import DataSettings, load, write_jsonl
from alignlab.data.groups import group_to_record

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
