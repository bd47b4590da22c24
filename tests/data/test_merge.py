"""Answers to the same prompt as one group; answers that were liked or not."""

from __future__ import annotations

import json

import pytest

from alignlab.core import DataError, Group, Response
from alignlab.data import DataSettings, load, write_jsonl
from alignlab.data.groups import group_to_record


def answers(groups) -> list[tuple[str, list[str]]]:
    return [(g.prompt, [r.text for r in g.responses]) for g in groups]


def files(tmp_path, *contents) -> list[str]:
    paths = []
    for i, records in enumerate(contents):
        path = tmp_path / f"model{i}.jsonl"
        path.write_text("".join(json.dumps(r) + "\n" for r in records))
        paths.append(str(path))
    return paths


def test_several_models_answers_become_one_group(tmp_path, tokenizer) -> None:
    first = [{"prompt": "p", "completion": "1"}, {"prompt": "q", "completion": "2"}]
    second = [{"prompt": "q", "completion": "3"}, {"prompt": "r", "completion": "4"}]
    third = [{"prompt": "q", "responses": ["5", "6"], "scores": [1, 2]}]
    paths = files(tmp_path, first, second, third)
    merged = load(DataSettings(path=paths[:2], merge=True), tokenizer)
    assert answers(merged.train) == [("p", ["1"]), ("q", ["2", "3"]), ("r", ["4"])]
    assert merged.train[1].origin.endswith("model0.jsonl:2")
    assert merged.report.merged == 1
    assert "merged: 1 records went into the group of an earlier one with the same prompt" in merged.report.lines()
    apart = load(DataSettings(path=paths[:2]), tokenizer)
    assert answers(apart.train) == [("p", ["1"]), ("q", ["2"]), ("q", ["3"]), ("r", ["4"])]
    every = load(DataSettings(path=paths, merge=True), tokenizer)
    assert answers(every.train)[1] == ("q", ["2", "3"]), "a response with a score and one without cannot be compared"


def test_columns_go_with_their_responses(loaded, tokenizer) -> None:
    records = [
        {"prompt": "q", "responses": ["a", "b"], "scores": [1, 2]},
        {"prompt": "p", "responses": ["c"], "scores": [3]},
        {"prompt": "q", "responses": ["d"], "scores": [4]},
    ]
    groups = loaded(records, tokenizer, merge=True).train
    assert [[(r.text, r.columns["score"]) for r in g.responses] for g in groups] == [
        [("a", 1.0), ("b", 2.0), ("d", 4.0)],
        [("c", 3.0)],
    ]


def test_solutions_of_one_problem(loaded, tokenizer) -> None:
    records = [
        {"prompt": "q", "steps": ["a", "bb"], "labels": [1, 1]},
        {"prompt": "q", "steps": ["ccc"], "labels": [-1]},
    ]
    group = loaded(records, tokenizer, merge=True).train[0]
    assert [(r.predicted, r.columns["step_label"]) for r in group.responses] == [([1, 4], [1.0, 1.0]), ([3], [-1.0])]


def test_sampled_groups_with_the_same_prompt(tmp_path, tokenizer) -> None:
    def sampled(*tokens: int) -> Group:
        return Group([1, 2], [Response([t], columns={"reward": float(t)}) for t in tokens], "x:1", "q")

    other = Group([1, 3], [Response([9])], "x:1", "q")
    write_jsonl(tmp_path / "groups.jsonl", map(group_to_record, [sampled(5, 6), other, sampled(7)]))
    groups = load(DataSettings(path=str(tmp_path / "groups.jsonl"), merge=True), tokenizer).train
    assert [(g.prompt_ids, [r.token_ids for r in g.responses]) for g in groups] == [
        ([1, 2], [[5], [6], [7]]),
        ([1, 3], [[9]]),
    ]
    assert [r.columns["reward"] for r in groups[0].responses] == [5.0, 6.0, 7.0]


def test_pairs_and_chats_stay_as_they_are(loaded, tokenizer) -> None:
    pair = {"prompt": "q", "chosen": "a", "rejected": "b"}
    assert len(loaded([pair, {**pair, "chosen": "c"}], tokenizer, merge=True).train) == 2
    chat = {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}
    assert len(loaded([chat, chat], tokenizer, merge=True).train) == 2
    assert len(loaded([{"prompt": "q"}, {"prompt": "q"}], tokenizer, merge=True).train) == 2


def test_merging_does_not_cross_splits(loaded, tokenizer) -> None:
    records = [{"prompt": f"p{i % 20}", "completion": str(i)} for i in range(40)]
    splits = loaded(records, tokenizer, merge=True, validation=0.4)
    assert len(splits.train) + len(splits.validation) == 20
    assert splits.validation
    assert all(len(g.responses) == 2 for g in [*splits.train, *splits.validation])


# Liked or not


@pytest.mark.parametrize(
    ("label", "desirable"), [(True, 1.0), (False, 0.0), ("true", 1.0), ("False", 0.0), ("1", 1.0), ("0", 0.0)]
)
def test_unpaired(loaded, tokenizer, label, desirable) -> None:
    splits = loaded([{"prompt": "q", "completion": "a", "label": label}], tokenizer)
    assert dict(splits.report.formats) == {"unpaired": 1}
    assert splits.train[0].responses[0].columns == {"desirable": desirable}
    assert "label" not in splits.train[0].extra


def test_numbers_are_labels_where_the_format_is_named(loaded, tokenizer) -> None:
    record = {"prompt": "q", "completion": "a", "label": 0}
    assert dict(loaded([record], tokenizer).report.formats) == {"demonstrations": 1}, "it may be anything's class"
    assert loaded([record], tokenizer, format="unpaired").train[0].responses[0].columns == {"desirable": 0.0}


@pytest.mark.parametrize("label", ["yes", 2, 0.5, [1]])
def test_labels_that_say_nothing(loaded, tokenizer, label) -> None:
    good = {"prompt": "q", "completion": "a", "label": True}
    with pytest.raises(DataError, match=r"records.jsonl:2: label=.*: must be true \(a good answer\) or false"):
        loaded([good, {**good, "label": label}], tokenizer)
    with pytest.raises(DataError, match=r"records.jsonl:2: no field 'label'"):
        loaded([good, {"prompt": "q", "completion": "a"}], tokenizer)
