"""What people's records look like, and which of them cannot be used."""

import json
import math

import pytest

from alignlab.data.formats import BadRecord, detect, parse, parse_transcript
from alignlab.data.readers import Record

USER, ANSWER = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
HH = "\n\nHuman: hi\n\nAssistant: hello\n\nHuman: more?\n\nAssistant:"


def example(fields, format=None, mapping=None):
    return parse(Record("f:1", "f", fields), format or detect(fields), mapping)


@pytest.mark.parametrize(
    ("fields", "format", "prompt", "responses"),
    [
        ({"text": "t"}, "text", "", ["t"]),
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
    assert (read.format, read.prompt, read.responses) == (format, prompt, responses)


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


def test_what_the_reader_found_wrong_is_passed_on():
    with pytest.raises(BadRecord, match="invalid JSON"):
        parse(Record("f:1", "f", error="invalid JSON: …"), "text")


def test_fields_that_tell_nothing():
    with pytest.raises(BadRecord, match=r"its fields \(a, b\) fit no known format; name the format \(data.format\)"):
        detect({"a": 1, "b": 2})


def test_messages_in_a_csv_cell():
    assert example({"messages": json.dumps([USER, ANSWER])}).responses == [[ANSWER]]
