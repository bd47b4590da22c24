"""From a path to splits: fractions, leaks, duplicates, merging, bad records, and the report about them."""

import json

import pytest

from alignlab.core import ConfigError, DataError, Group, Response
from alignlab.data import DataSettings, group_to_record, load, write_jsonl


def records(count, start=0):
    return [{"prompt": f"question {i}", "completion": f"answer {i}"} for i in range(start, start + count)]


def prompts(groups):
    return [group.prompt for group in groups]


def test_fractions_are_of_prompts(loaded, tokenizer):
    rows = [{"prompt": f"q{i % 500}", "completion": f"a{i}"} for i in range(2000)]  # each prompt four times
    splits = loaded(rows, tokenizer, validation=0.2, test=0.1)
    train, validation, test = (set(prompts(part)) for part in (splits.train, splits.validation, splits.test))
    assert not train & validation and not train & test and not validation & test
    assert len(splits.train) + len(splits.validation) + len(splits.test) == 2000
    # Binomial with n = 500: four standard deviations are 36 and 27 prompts.
    assert abs(len(validation) - 100) < 36 and abs(len(test) - 50) < 27
    assert splits.report.leaks == {}
    assert splits.report.splits == {
        "train": len(splits.train),
        "validation": len(splits.validation),
        "test": len(splits.test),
    }


def test_a_record_stays_in_its_split(loaded, tokenizer):
    few = loaded(records(100), tokenizer, validation=0.3)
    again = loaded(records(100), tokenizer, validation=0.3)
    many = loaded([*records(300, start=100), *reversed(records(100))], tokenizer, validation=0.3)
    other = loaded(records(100), tokenizer, validation=0.3, seed=1)
    assert prompts(few.validation) == prompts(again.validation)
    assert set(prompts(few.validation)) == set(prompts(many.validation)) & {row["prompt"] for row in records(100)}
    assert prompts(few.validation) != prompts(other.validation)
    assert few.report.fingerprint == again.report.fingerprint != many.report.fingerprint


def test_the_turns_of_one_conversation_stay_together(loaded, tokenizer):
    rows = []
    for i in range(40):
        prompt = f"\n\nHuman: topic {i}"
        for j in range(3):
            rows.append({"chosen": f"{prompt}\n\nAssistant: yes", "rejected": f"{prompt}\n\nAssistant: no"})
            prompt += f"\n\nAssistant: fine\n\nHuman: more {j}"
    splits = loaded(rows, tokenizer, validation=0.5)
    topics = [{prompt.split("\n\n")[1] for prompt in prompts(part)} for part in (splits.train, splits.validation)]
    assert topics[0] and topics[1] and not topics[0] & topics[1]


def test_splits_of_their_own_and_what_leaks_between_them(tmp_path, tokenizer):
    write_jsonl(tmp_path / "a.jsonl", records(10))
    write_jsonl(tmp_path / "b.jsonl", [*records(3), *records(5, start=10), *records(1)])  # 3 prompts of a, one twice
    write_jsonl(tmp_path / "c.jsonl", records(4, start=100))
    settings = DataSettings(
        path=str(tmp_path / "a.jsonl"), validation=str(tmp_path / "b.jsonl"), test=str(tmp_path / "c.jsonl")
    )
    splits = load(settings, tokenizer)
    assert [len(part) for part in (splits.train, splits.validation, splits.test)] == [10, 9, 4]
    assert splits.report.leaks == {"validation are also in train": 3}
    assert "warning: 3 prompts of validation are also in train: the split is leaking" in splits.report.lines()


def test_splits_by_name(tmp_path, tokenizer, monkeypatch):
    write_jsonl(tmp_path / "d" / "train.jsonl", records(3))
    write_jsonl(tmp_path / "d" / "test.jsonl", records(2, start=3))
    (tmp_path / "test").mkdir()  # a folder of that name is not meant
    monkeypatch.chdir(tmp_path)
    splits = load(DataSettings(path="d", validation="test"), tokenizer)
    assert [len(part) for part in (splits.train, splits.validation, splits.test)] == [3, 2, 0]
    only = load(DataSettings(path="d", split="test"), tokenizer)
    assert prompts(only.train) == ["question 3", "question 4"]
    with pytest.raises(DataError, match="d: has no split 'validation'"):
        load(DataSettings(path="d", validation="validation"), tokenizer)


def test_several_files_one_after_the_other(tmp_path, tokenizer):
    write_jsonl(tmp_path / "a.jsonl", records(2))
    (tmp_path / "b.json").write_text(json.dumps([{"question": "q", "answer": "a"}]))
    splits = load(DataSettings(path=[str(tmp_path / "b.json"), str(tmp_path / "a.jsonl")]), tokenizer)
    assert prompts(splits.train) == ["q", "question 0", "question 1"]
    assert [group.origin.rpartition("/")[2] for group in splits.train] == ["b.json:0", "a.jsonl:1", "a.jsonl:2"]


def test_max_records_are_the_first_usable_ones(loaded, tokenizer):
    rows = [{"prompt": "q"}, *records(10)]
    splits = loaded(rows, tokenizer, parser="demonstrations", max_records=4, on_bad_record="skip")
    assert prompts(splits.train) == [f"question {i}" for i in range(4)]
    assert (splits.report.read, splits.report.bad) == (5, 1)
    assert any("data.max_records" in note for note in splits.report.notes)
    assert loaded(records(4), tokenizer, max_records=4).report.notes == []


def test_the_first_bad_record_stops_the_run(loaded, tokenizer):
    rows = [*records(2), {"prompt": "q", "completion": ""}, *records(1)]
    with pytest.raises(DataError, match=r"/records\.jsonl:3: 'completion' is empty; .*data\.on_bad_record=skip"):
        loaded(rows, tokenizer)


def test_skipped_records_are_counted_and_the_first_listed(tmp_path, tokenizer):
    path = tmp_path / "a.jsonl"
    good, bad = json.dumps(records(1)[0]), json.dumps({"prompt": "q", "completion": None})
    path.write_text("\n".join([good, "{broken", *[bad] * 20, "[]", good]))
    splits = load(DataSettings(path=str(path), on_bad_record="skip"), tokenizer)
    report = splits.report
    assert (report.read, report.bad, report.used, report.duplicates) == (24, 22, 2, 1)
    assert len(report.bad_records) == 10
    assert report.bad_records[0].startswith(f"{path}:2: invalid JSON")
    assert report.bad_records[1] == f"{path}:3: field 'completion' is null"
    assert "bad: … and 12 more" in report.lines()


def test_a_record_of_another_format_is_bad_not_of_another_format(loaded, tokenizer):
    """A pair without `rejected` must not become something else unnoticed."""
    rows = [{"prompt": "q", "chosen": "a", "rejected": "b"}, {"prompt": "r", "chosen": "a"}]
    with pytest.raises(DataError, match=r"records\.jsonl:2: no field 'rejected'"):
        loaded(rows, tokenizer)


def test_duplicates_are_equal_in_everything(loaded, tokenizer):
    pair = {"prompt": "q", "chosen": "a", "rejected": "b"}
    rows = [pair, {**pair, "id": 2}, {**pair, "chosen": "c"}, {**pair, "margin": 2}, {**pair, "prompt": "r"}]
    assert loaded(rows, tokenizer).report.duplicates == 1  # the second: `id` is not something that is learned


def test_nothing_to_train_on(tmp_path, tokenizer, loaded):
    with pytest.raises(ConfigError, match=r"data\.path: is not set"):
        load(DataSettings(), tokenizer)
    with pytest.raises(DataError, match="no usable record for train"):
        loaded([], tokenizer)
    with pytest.raises(
        DataError, match=r"no usable record for train; records: 1 read, 1 bad.*records\.jsonl:1: 'text' is empty"
    ):
        loaded([{"text": ""}], tokenizer, parser="text", on_bad_record="skip")
    few = loaded(records(1), tokenizer, validation=0.001)
    assert few.report.notes == ["there are too few records for validation=0.001: it is empty"]


def test_the_report_measures(loaded, tokenizer):
    rows = [
        {"prompt": "ab", "completion": "abc"},
        {"prompt": "abcd", "completion": "a"},
        {"prompt": "a", "completion": "abcdef"},
    ]
    report = loaded(rows, tokenizer).report
    assert report.prompt_tokens == (2, 4)
    assert report.response_tokens == (4, 7)  # with the end token: 4, 2, 7
    assert report.loss_tokens == 13
    assert report.formats == {"demonstrations": 3}


def test_a_tokenizer_that_does_not_know_the_characters_is_told_of(loaded, stories_tokenizer, tokenizer):
    row = [{"prompt": "Once upon a time ", "completion": "there was Zoë ☃."}]
    assert any(
        "does not know every character of 1 of the first 1" in n for n in loaded(row, stories_tokenizer).report.notes
    )
    assert loaded(row, tokenizer).report.notes == []


def test_conversations_without_a_template_are_told_of(loaded, tokenizer):
    row = [{"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}]
    assert any("data.chat_template=plain" in note for note in loaded(row, tokenizer).report.notes)
    assert loaded(row, tokenizer, chat_template="plain").report.notes == []


# Merging


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
    assert [(r.predicted, list(r.columns["step_label"])) for r in group.responses] == [
        ([1, 4], [1.0, 1.0]),
        ([3], [-1.0]),
    ]


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
