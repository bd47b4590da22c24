"""What people's records look like, and which of them cannot be used."""

import json
import math

import pytest

from alignlab.core import BadRecord, ConfigError, DataError, Example
from alignlab.data import DataSettings
from alignlab.data.fields import parse_transcript, rename
from alignlab.data.formats import FORMATS, detect, find_parser

USER, ANSWER = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
HH = "\n\nHuman: hi\n\nAssistant: hello\n\nHuman: more?\n\nAssistant:"


def example(fields, format=None, mapping=None):
    read = FORMATS[format or detect(fields)](rename(fields, mapping or {}))
    assert not read.fault()
    return read


@pytest.mark.parametrize(
    ("fields", "format", "prompt", "responses"),
    [
        ({"text": "t"}, "text", None, ["t"]),
        ({"prompt": "q", "completion": "a"}, "demonstrations", "q", ["a"]),
        ({"question": "q", "answer": "a"}, "demonstrations", "q", ["a"]),
        ({"instruction": "q", "input": "", "output": "a"}, "demonstrations", "q", ["a"]),
        ({"instruction": "q", "input": None, "output": "a"}, "demonstrations", "q", ["a"]),
        ({"instruction": "q", "input": "i", "output": "a"}, "demonstrations", "q\ni", ["a"]),
        ({"instruction": "q", "output": "a", "text": "whole"}, "demonstrations", "q", ["a"]),
        ({"prompt": [USER], "completion": [ANSWER]}, "demonstrations", [USER], ["a"]),
        ({"messages": [USER, ANSWER, USER, ANSWER]}, "chat", [USER], [[ANSWER, USER, ANSWER]]),
        ({"prompt": "q", "messages": [USER, ANSWER]}, "chat", [USER], [[ANSWER]]),
        (
            {
                "conversations": [
                    {"from": "system", "value": ""},
                    {"from": "human", "value": "q"},
                    {"from": "gpt", "value": "a"},
                ]
            },
            "chat",
            [USER],
            [[ANSWER]],
        ),
        ({"prompt": "q", "chosen": "a", "rejected": "b"}, "preferences", "q", ["a", "b"]),
        (
            {"instruction": "q", "input": "i", "output": "o", "chosen": "a", "rejected": "b"},
            "preferences",
            "q\ni",
            ["a", "b"],
        ),
        ({"prompt": [USER], "chosen": [ANSWER], "rejected": "b"}, "preferences", [USER], ["a", "b"]),
        (
            {"prompt": "q", "chosen": [USER, ANSWER], "rejected": [USER, {**ANSWER, "content": "b"}]},
            "preferences",
            [USER],
            ["a", "b"],
        ),
        ({"prompt": "q", "responses": ["a", "b", "c"], "scores": [1, 2.5, -1]}, "rankings", "q", ["a", "b", "c"]),
        ({"prompt": "q", "responses": '["a", "b"]', "scores": "[1, 2]"}, "rankings", "q", ["a", "b"]),
        ({"prompt": "q"}, "prompts", "q", []),
        ({"prompt": "q", "completion": None}, "prompts", "q", []),
        ({"question": "q"}, "prompts", "q", []),
        ({"messages": [USER, ANSWER, USER]}, "prompts", [USER, ANSWER, USER], []),
    ],
)
def test_the_fields_tell_the_format(fields, format, prompt, responses):
    assert detect(fields) == format
    read = example(fields)
    assert (read.prompt, read.responses) == (prompt, responses)


def test_the_layout_of_hh_rlhf():
    read = example({"chosen": HH + " good", "rejected": HH + " bad\n\nor so "})
    assert read.prompt == [
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": "hello"},
        {"role": "user", "content": "more?"},
    ]
    assert read.responses == ["good", "bad\n\nor so"]
    assert read.columns == [{"score": 1.0}, {"score": 0.0}]


def test_a_transcript_may_also_be_learned_as_a_chat_or_be_prompts():
    chat = example({"chosen": HH + " good", "rejected": "x"}, "chat", {"messages": "chosen"})
    assert [message["content"] for message in chat.responses[0]] == ["hello", "more?", "good"]
    assert chat.extra == {"rejected": "x"}
    prompts = example({"messages": HH + " good"}, "prompts")
    assert prompts.prompt[-1] == {"role": "user", "content": "more?"}
    assert prompts.extra == {"completion": "good"}


def test_a_marker_inside_a_line_is_no_turn():
    assert parse_transcript("\n\nHuman: who is Human: or \nAssistant: ?\n\nAssistant: me") == [
        {"role": "user", "content": "who is Human: or \nAssistant: ?"},
        {"role": "assistant", "content": "me"},
    ]


PAIR = {"prompt": "q", "chosen": "a", "rejected": "b"}


@pytest.mark.parametrize(
    ("more", "columns"),
    [
        ({}, [{"score": 1.0}, {"score": 0.0}]),
        ({"margin": 2.5}, [{"score": 2.5}, {"score": 0.0}]),
        ({"margin": "0.5"}, [{"score": 0.5}, {"score": 0.0}]),
        ({"margin": "", "preference": None}, [{"score": 1.0}, {"score": 0.0}]),
        ({"preference": 0.75}, [{"preference": 0.75}, {"preference": 0.25}]),
        ({"preference": 0.25}, [{"preference": 0.25}, {"preference": 0.75}]),
        ({"preference": 0.75, "margin": 3}, [{"score": 3.0, "preference": 0.75}, {"score": 0.0, "preference": 0.25}]),
    ],
)
def test_labels_of_a_pair(more, columns):
    read = example({**PAIR, **more})
    assert read.columns == columns
    assert read.extra == {}


def test_scores_of_a_ranking_may_be_left_to_a_scorer():
    assert example({"prompt": "q", "responses": ["a", "b"], "scores": [1, 2]}).columns == [
        {"score": 1.0},
        {"score": 2.0},
    ]
    assert example({"prompt": "q", "responses": ["a", "b"]}).columns == [{}, {}]


def test_what_the_model_does_not_see_is_kept_for_scorers():
    assert example({"question": "q", "answer": "a", "level": 3, "none": None}).extra == {"level": 3, "none": None}
    assert example({"question": "q", "answer": "a"}, "prompts").extra == {"answer": "a"}
    assert example({"instruction": "q", "output": "o", "chosen": "a", "rejected": "b"}).extra == {"output": "o"}


def test_fields_can_be_renamed():
    fields = {"query": "q", "reply": "a", "prompt": "something else"}
    read = example(fields, "demonstrations", {"prompt": "query", "completion": "reply"})
    assert (read.prompt, read.responses, read.extra) == ("q", ["a"], {})
    with pytest.raises(
        BadRecord, match=r"no field 'answr' \(data.fields.completion=answr\); there are: prompt, query, reply"
    ):
        example(fields, "demonstrations", {"completion": "answr"})


def chat(*turns):
    return {"messages": [{"role": role, "content": content} for role, content in turns]}


@pytest.mark.parametrize(
    ("fields", "format", "reason"),
    [
        ({"prompt": "q"}, "demonstrations", "no field 'completion' or 'answer' or 'output'; there are: prompt"),
        ({"completion": "a"}, "demonstrations", "no field 'prompt' or 'question' or 'instruction'"),
        ({"prompt": "q", "completion": 3}, "demonstrations", "'completion' must be a text, not int"),
        ({"prompt": "q", "completion": " \n"}, "demonstrations", "'completion' is empty"),
        ({"prompt": "", "completion": "a"}, "demonstrations", "'prompt' is empty"),
        ({"prompt": [USER, ANSWER], "completion": "a"}, "demonstrations", "'prompt' ends with a turn of the assistant"),
        ({"text": ""}, "text", "'text' is empty"),
        ({"text": ["t"]}, "text", "'text' must be a text, not list"),
        ({**PAIR, "rejected": "a "}, "preferences", "chosen and rejected are the same"),
        ({"chosen": HH + " a", "rejected": HH + " a"}, "preferences", "chosen and rejected are the same"),
        ({"chosen": HH + " a", "rejected": HH.replace("hi", "ho") + " b"}, "preferences", "prompts of .* differ"),
        ({"chosen": HH + " a", "rejected": HH + " "}, "preferences", "'rejected, turn 4' is empty"),
        ({"chosen": HH + " a\n\nHuman: b", "rejected": HH + " b"}, "preferences", "ends with a turn of the user, not"),
        ({"chosen": HH + " a", "rejected": "b", "prompt": "q"}, "preferences", "the other only an answer"),
        ({"chosen": "a", "rejected": "b"}, "preferences", "no field 'prompt' or"),
        ({**PAIR, "chosen": 1}, "preferences", "'chosen' must be a text or messages, not int"),
        ({**PAIR, "margin": 0}, "preferences", "margin=0: .* > 0"),
        ({**PAIR, "margin": math.nan}, "preferences", "margin=nan: must be finite"),
        ({**PAIR, "margin": "much"}, "preferences", "margin must be a number, not 'much'"),
        ({**PAIR, "preference": 1.5}, "preferences", r"preference=1.5: .* in \[0, 1\]"),
        ({**PAIR, "preference": 0.2, "margin": 1}, "preferences", "preference=0.2 says that rejected is better"),
        ({"prompt": "q", "responses": ["a", "b"], "scores": [1]}, "rankings", "2 responses but 1 scores"),
        ({"prompt": "q", "responses": ["a", "b"], "scores": [1, math.inf]}, "rankings", r"scores\[1\]=inf"),
        ({"prompt": "q", "responses": ["a", "b"], "scores": [1, True]}, "rankings", "must be a number, not True"),
        ({"prompt": "q", "responses": ["a", ""], "scores": [1, 2]}, "rankings", r"'responses\[1\]' is empty"),
        ({"prompt": "q", "responses": []}, "rankings", "'responses' must be a list with something in it"),
        ({"prompt": "q", "responses": "a"}, "rankings", "'responses' must be a list"),
        (chat(("user", "q")), "chat", "ends with a turn of the user"),
        (chat(("assistant", "a")), "chat", "begins with a turn of the assistant"),
        (chat(("user", "q"), ("assistant", "")), "chat", r"'messages\[1\].content' is empty"),
        (chat(("user", "q"), ("robot", "a")), "chat", r"messages\[1\] has the role 'robot'; known: assistant, system"),
        (chat(("user", None), ("assistant", "a")), "chat", r"'messages\[0\].content' must be a text, not NoneType"),
        ({"messages": ["q", "a"]}, "chat", r"messages\[0\] must be an object with role and content"),
        ({"messages": []}, "chat", "must be a list with something in it"),
        (chat(("assistant", "a")), "prompts", "has no turn of a user to answer"),
    ],
)  # fmt: skip
def test_records_that_cannot_be_used(fields, format, reason):
    with pytest.raises(BadRecord, match=reason):
        example(fields, format)


def test_fields_that_tell_nothing():
    with pytest.raises(BadRecord, match=r"its fields \(a, b\) fit no known format; name the format \(data.parser\)"):
        detect({"a": 1, "b": 2})


def test_messages_in_a_csv_cell():
    assert example({"messages": json.dumps([USER, ANSWER])}).responses == [[ANSWER]]


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
    assert loaded([record], tokenizer, parser="unpaired").train[0].responses[0].columns == {"desirable": 0.0}


@pytest.mark.parametrize("label", ["yes", 2, 0.5, [1]])
def test_labels_that_say_nothing(loaded, tokenizer, label) -> None:
    good = {"prompt": "q", "completion": "a", "label": True}
    with pytest.raises(DataError, match=r"records.jsonl:2: label=.*: must be true \(a good answer\) or false"):
        loaded([good, {**good, "label": label}], tokenizer)
    with pytest.raises(DataError, match=r"records.jsonl:2: no field 'label'"):
        loaded([good, {"prompt": "q", "completion": "a"}], tokenizer)


# Which parser


def twice(record, field="q"):
    return Example(record[field] * 2)


def test_a_parser_by_its_name(monkeypatch, tmp_path):
    (tmp_path / "my_parsers.py").write_text(
        "from alignlab.core import Example\n"
        "def twice(record, field='q'):\n    return Example(record[field] * 2)\n"
        "class Joined:\n"
        "    def __init__(self, by: str = ' '):\n        self.by = by\n"
        "    def __call__(self, record):\n        return Example(self.by.join(record['words']))\n"
        "class Mute:\n    pass\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    assert find_parser("chat") == ("chat", FORMATS["chat"])
    for named in ("my_parsers.twice", "my_parsers:twice", {"_target_": "my_parsers.twice"}):
        name, parser = find_parser(named)
        assert (name, parser({"q": "ab"})) == ("my_parsers.twice", Example("abab"))
    assert find_parser({"_target_": "my_parsers.twice", "field": "r"})[1]({"r": "c"}) == Example("cc")
    assert find_parser({"_target_": "hydra.utils.get_method", "path": "my_parsers.twice"})[1]({"q": "d"}).prompt == "dd"
    assert find_parser("my_parsers.Joined")[1]({"words": ["a", "b"]}) == Example("a b")
    assert find_parser({"_target_": "my_parsers.Joined", "by": "-"})[1]({"words": ["a", "b"]}) == Example("a-b")
    assert find_parser(twice) == (f"{__name__}.twice", twice)
    for named, reason in (
        ("preference", r"data.parser=preference: is no format; did you mean 'preferences'\?; a parser of your own is"),
        ("my_parsers.tvice", r"data.parser=my_parsers.tvice: my_parsers has no 'tvice'; did you mean 'twice'"),
        ("my_parsrs.twice", r"data.parser=my_parsrs.twice: there is no module 'my_parsrs'"),
        ("my_parsers.Mute", r"data.parser=my_parsers.Mute: cannot be called with a record"),
        ({"_target_": "my_parsers.Mute"}, r"data.parser._target_=my_parsers.Mute: cannot be called"),
        ({"_target_": "my_parsers.Joined", "bye": "-"}, r"data.parser.bye: unknown key; did you mean 'by'"),
        ({"by": "-"}, r"data.parser._target_=: is no format"),
    ):
        with pytest.raises(ConfigError, match=reason):
            find_parser(named)
        with pytest.raises(ConfigError, match=reason):
            DataSettings(parser=named)


def test_fields_of_any_name_are_renamed_for_a_parser_of_the_users(loaded, tokenizer):
    splits = loaded([{"frage": "q"}], tokenizer, parser=twice, fields={"q": "frage"})
    assert splits.train[0].prompt == "qq"
    with pytest.raises(ValueError, match="'q' is none of alignlab's"):
        DataSettings(fields={"q": "frage"})


def test_a_parser_may_stand_on_one_of_ours(loaded, tokenizer):
    def mine(record):
        return FORMATS["preferences"]({"prompt": record["q"], "chosen": record["good"], "rejected": record["bad"]})

    pair = {"q": "q", "good": "a", "bad": "b"}
    (group,) = loaded([pair], tokenizer, parser=mine).train
    assert [(r.text, r.columns) for r in group.responses] == [("a", {"score": 1.0}), ("b", {"score": 0.0})]
    with pytest.raises(DataError, match=r"records.jsonl:2: chosen and rejected are the same; mend it"):
        loaded([pair, {**pair, "bad": "a"}], tokenizer, parser=mine)


@pytest.mark.parametrize(
    ("parser", "reason"),
    [
        (
            lambda record: Example(record["p"]),
            r"data.parser=.*<lambda>: KeyError: 'p' \(test_formats.py:\d+\); mend it",
        ),
        (lambda record: record, r"data.parser=.*<lambda>: TypeError: it returned dict, not an Example"),
        (lambda record: None, "it returned NoneType, not an Example"),
        (lambda record: Example(" "), "data.parser=.*: prompt is empty"),
        (lambda record: Example(3), "prompt must be a text or a list of messages, not int"),
        (lambda record: Example([{"role": "human", "content": "q"}]), "it needs content and a role: user, assistant"),
        (lambda record: Example("q", ["a", ""]), r"responses\[1\] is empty"),
        (lambda record: Example("q", ["a"], [{}, {}]), "1 responses but 2 columns"),
        (lambda record: Example("q", ["a"], [{"score": math.nan}]), r"responses\[0\]: score=nan must be finite"),
        (lambda record: Example("q", ["a"], [{"score": [1.0]}]), r"responses\[0\] has 0 steps but 1 values of score"),
        (lambda record: Example("q", ["a"], [{"score": "good"}]), r"responses\[0\]: score='good' must be a number"),
        (lambda record: Example("q", ["a", "a"], pair=True), "two responses, and they must differ"),
        (lambda record: Example("q", ["a"], pair=True), "two responses, and they must differ"),
        (lambda record: Example(None, ["a", "b"]), "raw text .prompt=None. is one response, not 2"),
    ],
)
def test_what_a_parser_of_the_user_does_wrong_is_named_with_file_and_line(loaded, tokenizer, parser, reason):
    with pytest.raises(DataError, match=rf"records.jsonl:1: .*{reason}") as error:
        loaded([{"q": "q"}], tokenizer, parser=parser)
    assert "\n" not in str(error.value)
    with pytest.raises(DataError, match=r"no usable record for train; records: 1 read, 1 bad"):
        loaded([{"q": "q"}], tokenizer, parser=parser, on_bad_record="skip")


def test_a_parser_of_the_user_makes_groups_and_its_answers_can_be_merged(loaded, tokenizer):
    splits = loaded([{"q": "q", "n": i} for i in range(3)], tokenizer, parser=lambda r: Example(r["q"], [f"a{r['n']}"]))
    assert [g.responses[0].text for g in splits.train] == ["a0", "a1", "a2"]
    merged = loaded(
        [{"q": "q", "n": i} for i in range(3)],
        tokenizer,
        merge=True,
        parser=lambda r: Example(r["q"], [f"a{r['n']}"], [{"score": r["n"]}]),
    )
    assert [(r.text, r.columns) for r in merged.train[0].responses] == [
        (f"a{i}", {"score": float(i)}) for i in range(3)
    ]
