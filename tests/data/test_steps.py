"""Where steps end, by hand and on real tokenizers; solutions with labels as records and as groups."""

from __future__ import annotations

import itertools
import json
import random
import re

import numpy as np
import pytest
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from alignlab.core import BadRecord, ConfigError, DataError, Response
from alignlab.data import DataSettings, load, write_jsonl
from alignlab.data.groups import group_to_record
from alignlab.data.steps import Steps, label_steps
from tests.tiny import listed

EOS = 257

PIECES = ["<eos>", "<step>", "a", "b", " ", ".", "\n", ".\n", "\na", "\n\n", "\n\n\n", "a\nb\n", "-", "->", ">"]


def pieces() -> PreTrainedTokenizerFast:
    """A tokenizer whose tokens are these pieces, the longest first."""
    backend = Tokenizer(models.WordLevel({piece: i for i, piece in enumerate(PIECES)}))
    longest = sorted(PIECES, key=len, reverse=True)
    backend.pre_tokenizer = pre_tokenizers.Split(Regex("|".join(re.escape(p) for p in longest)), "isolated")
    backend.decoder = decoders.Fuse()
    backend.add_special_tokens([AddedToken("<step>", special=True)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>", pad_token="<eos>")


def ids(text: str) -> list[int]:
    return [PIECES.index(piece) for piece in text.split("|")]


@pytest.mark.parametrize(
    ("written", "ends"),
    [
        ("a|\n|b|<eos>", [1, 3]),  # the separator's token; the last token, which is the end token
        ("a|\n|b", [1, 2]),  # cut short: the last token all the same
        ("a|.\n|b|.\n|a", [1, 3, 4]),  # a token that holds the separator and more before it
        ("a|\na|b|\n|b", [1, 3, 4]),  # … and the beginning of the next step
        ("a|\n|\n|b", [1, 3]),  # a blank line is no step
        ("a|\n\n|b|\n\n\n|a", [1, 3, 4]),
        ("\n|a|\n|b", [2, 3]),  # nor is one before the first
        ("a|\n|b|\n|<eos>", [1, 3]),  # after the last separator nothing is left to judge
        ("a|\n| |<eos>", [1]),
        ("a\nb\n|a", [0, 1]),  # two steps that end in one token are one
        ("b|a\nb\n|a", [1, 2]),
        ("<eos>", [0]),
        ("a", [0]),
        ("\n", [0]),
    ],
)
def test_ends_by_hand(written: str, ends: list[int]) -> None:
    assert Steps(pieces()).ends(ids(written)) == ends


@pytest.mark.parametrize(
    ("separator", "written", "ends"),
    [
        ("\n\n", "a|\n|b|\n\n|a", [3, 4]),  # a single newline does not part steps
        ("\n\n", "a|\n|\n|b", [2, 3]),  # made of two tokens: the one that completes it
        ("\n\n", "a|\n\n\n|b", [1, 2]),
        ("->", "a|-|b|-|>|a|->|b", [4, 6, 7]),
        ("", "a|.|b|<eos>", [0, 1, 2]),  # every token is a step, the end token none
        ("", "<eos>", [0]),
        (".", "a|.|b|.|<eos>", [1, 3]),
    ],
)
def test_other_separators(separator: str, written: str, ends: list[int]) -> None:
    assert Steps(pieces(), separator).ends(ids(written)) == ends


def test_a_step_token_ends_a_step_and_nothing_else_does() -> None:
    steps = Steps(pieces(), "\n", "<step>")
    assert steps.ends(ids("a|<step>|\n|b|\n|a|<step>|<eos>")) == [1, 6]
    assert steps.ends(ids("a|\n|b")) == [2]
    assert steps.join(["a", "b"]) == "a<step>\nb<step>"
    assert steps.split(ids("a|<step>|\n|b|<step>|<eos>")) == ["a", "b"]
    with pytest.raises(ConfigError, match="step_token='ab': is no single token"):
        Steps(pieces(), "\n", "ab")


def test_texts_of_steps() -> None:
    steps = Steps(pieces())
    for parts in (["a", "b.", " a b"], ["a"], ["b.", "a.", "b."]):
        text = steps.join(parts)
        tokens = pieces()(text)["input_ids"]
        assert steps.split([*tokens, 0]) == steps.split(tokens) == parts, text
    assert steps.join(["a\n", "\n\nb"]) == "a\nb", "separators around a step are not doubled"
    with pytest.raises(BadRecord, match=r"steps\[1\] has '\\n' in it"):
        steps.join(["a", "b\na"])
    assert Steps(pieces(), "\n", "<step>").join(["a\nb", "a"]) == "a\nb<step>\na<step>"
    assert Steps(pieces(), "").join(["a", " b"]) == "a b"


@pytest.mark.parametrize("separator", ["\n", "\n\n", "->", "."])
def test_ends_on_random_texts(separator: str) -> None:
    """Of tokens that hold at most one separator: cut behind every token, as many ends as separators are whole."""
    rng = random.Random(0)
    whole = [i for i, p in enumerate(PIECES) if i > 1 and p.count(separator) <= 1 and p not in ("\n\n\n", "a\nb\n")]
    steps = Steps(pieces(), separator)
    for _ in range(300):
        tokens = [rng.choice(whole) for _ in range(rng.randrange(1, 40))]
        text = "".join(PIECES[i] for i in tokens)
        expected, done = [], 0
        for i in range(len(tokens)):
            seen = "".join(PIECES[t] for t in tokens[: i + 1])
            while (cut := text.find(separator, done)) >= 0 and len(seen) >= cut + len(separator):
                if text[done:cut].strip():
                    expected.append(i)
                done = cut + len(separator)
        if text[done:].strip() or not expected:
            expected.append(len(tokens) - 1)
        assert steps.ends(tokens) == sorted(set(expected)), tokens


def paused(steps: Steps, tokens: list[int]) -> list[int]:
    """Where a search that draws token by token would stop for a step, and at the end."""
    found, start = [], 0
    for i in range(len(tokens)):
        if steps.completes(tokens[: i + 1], start):
            found.append(i)
            start = i + 1
    return found


def test_a_search_pauses_where_steps_end(stories_tokenizer) -> None:
    text = "We start.\nOne and two\n\nmake  three.\n \nSo: 3.\nThe end"
    for tokenizer, separator in itertools.product((pieces(), stories_tokenizer), ("\n", "\n\n", ".", "")):
        tokens = tokenizer("a.\nb\n\n.a b" if tokenizer is not stories_tokenizer else text)["input_ids"]
        steps = Steps(tokenizer, separator)
        ends = steps.ends(tokens)
        assert paused(steps, tokens) == [e for e in ends if e < len(tokens) - 1 or separator == ""]
    steps = Steps(pieces(), "\n", "<step>")
    assert paused(steps, ids("a|<step>|\n|b|<step>")) == [1, 4]


@pytest.mark.parametrize("separator", ["\n", ". ", " and ", ""])
def test_ends_on_a_real_tokenizer(stories_tokenizer, separator: str) -> None:
    """Each end is the first token up to which the text holds the separator, whatever tokens it is made of."""
    text = "Tom and Lily ran.\nThey saw a dog. It was big.\n\nLily and Tom smiled. And so\nthe day ended. The end"
    tokens = stories_tokenizer(text)["input_ids"]
    steps = Steps(stories_tokenizer, separator)
    ends = steps.ends(tokens)
    if not separator:
        assert ends == list(range(len(tokens)))[len(tokens) - len(ends) :]
        return
    full = stories_tokenizer.decode(tokens)
    cuts = [m.end() for m in re.finditer(re.escape(separator), full)]
    cuts = [c for c, before in zip(cuts, [0, *cuts], strict=False) if full[before : c - len(separator)].strip()]
    assert len(ends) == len(cuts) + 1
    assert ends[-1] == len(tokens) - 1
    for end, cut in zip(ends, cuts, strict=False):
        assert len(stories_tokenizer.decode(tokens[: end + 1])) >= cut > len(stories_tokenizer.decode(tokens[:end]))


def test_a_long_response_takes_no_time(stories_tokenizer) -> None:
    """The tokens since the last step are looked at, not all of them."""
    tokens = stories_tokenizer("one two three four five.\n" * 2000)["input_ids"]
    asked = []
    steps = Steps(stories_tokenizer)
    decode = steps._text
    steps._text = lambda some: (asked.append(len(some)), decode(some))[1]  # type: ignore[method-assign]
    assert len(steps.ends(tokens)) == 2000
    assert sum(asked) < 100 * len(tokens)


def test_labels_for_a_sampled_response() -> None:
    response = Response([5, 6, 7, 8], None, {"behaviour_logp": [-1.0, -2.0, -3.0, -4.0], "reward": 1.0})
    label_steps(response, [1, 3], [1, -0.5])
    assert response.loss_mask == [False, True, False, True]
    assert listed(response) == {"behaviour_logp": [-2.0, -4.0], "reward": 1.0, "step_label": [1.0, -0.5]}
    label_steps(response, [0, 3], [1, 1])
    assert listed(response) == {"reward": 1.0, "step_label": [1.0, 1.0]}, "no value is known of the first token"
    response = Response([5, 6, 7, 8], None, {"behaviour_logp": np.array([-1.0, -2.0, -3.0, -4.0])})
    label_steps(response, [1, 3], [1, -0.5])
    assert listed(response) == {"behaviour_logp": [-2.0, -4.0], "step_label": [1.0, -0.5]}, "an array is as good"


# Records

SOLUTION = {"prompt": "1+1+1=", "steps": ["1+1=2", "2+1=4"], "labels": [1, -1]}


def only(groups):
    assert len(groups) == 1
    return groups[0]


def test_a_solution_as_tokens(loaded, tokenizer) -> None:
    """One token a byte: the label of the first step is on the newline, the last one's on the end token."""
    response = only(loaded([SOLUTION], tokenizer).train).responses[0]
    assert response.text == "1+1=2\n2+1=4"
    assert response.token_ids == [*b"1+1=2\n2+1=4", EOS]
    assert response.predicted == [5, 11]
    assert listed(response) == {"step_label": [1.0, -1.0]}
    splits = loaded([SOLUTION], tokenizer, append_eos=False)
    assert only(splits.train).responses[0].predicted == [5, 10]
    assert splits.report.step_labels == (1, 0, 1)
    assert "steps in train: 1 right, 1 wrong, 0 neither" in splits.report.lines()


def test_a_step_token_bears_the_label(loaded, tokenizer) -> None:
    response = only(loaded([SOLUTION], tokenizer, step_token="<|im_end|>", step_separator=" ").train).responses[0]
    assert response.text == "1+1=2<|im_end|> 2+1=4<|im_end|>"
    assert response.token_ids == [*b"1+1=2", 259, *b" 2+1=4", 259, EOS]
    assert response.predicted == [5, 12]
    with pytest.raises(ConfigError, match="step_token='§§': is no single token of this tokenizer"):
        loaded([SOLUTION], tokenizer, step_token="§§")


def test_a_solution_in_a_chat(loaded, make_tokenizer) -> None:
    from alignlab.data.chat import CHATML

    record = {**SOLUTION, "prompt": [{"role": "user", "content": "q"}]}
    response = only(loaded([record], make_tokenizer(template=CHATML, eos="<|im_end|>")).train).responses[0]
    assert response.token_ids == [*b"1+1=2\n2+1=4", 259]
    assert response.predicted == [5, 11]


@pytest.mark.parametrize(
    ("given", "labels"),
    [
        ({"labels": [1, 0, -1]}, [1.0, 0.0, -1.0]),
        ({"labels": ["1", "0", "-1"]}, [1.0, 0.0, -1.0]),
        ({"soft_labels": [1, 0.5, 0.25]}, [1.0, 0.0, -0.5]),
        ({"mistake_index": None}, [1.0, 1.0, 1.0]),
        ({"mistake_index": ""}, [1.0, 1.0, 1.0]),
        ({"mistake_index": 0}, [-1.0, -1.0, -1.0]),
        ({"mistake_index": 1}, [1.0, -1.0, -1.0]),
        ({"mistake_index": 2}, [1.0, 1.0, -1.0]),
        ({"mistake_index": None, "labels": [1, 1, -1]}, [1.0, 1.0, -1.0]),
        ({"mistake_index": 2, "labels": None, "soft_labels": None}, [1.0, 1.0, -1.0]),
        ({}, None),
    ],
)
def test_labels_of_steps(loaded, tokenizer, given, labels) -> None:
    record = {"input": "q", "steps": ["a", "b", "c"], **given}
    group = only(loaded([record], tokenizer, parser="steps").train)
    assert group.prompt == "q"
    assert listed(group.responses[0]) == ({} if labels is None else {"step_label": labels})
    assert group.responses[0].predicted == [1, 3, 5]


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"labels": [1]}, "2 steps but 1 labels"),
        ({"labels": [1, 2]}, r"labels\[1\]=2: must be -1 \(wrong\), 0 \(neutral\) or 1 \(right\)"),
        ({"labels": [1, 0.5]}, r"labels\[1\]=0.5: must be -1"),
        ({"labels": [1, True]}, r"labels\[1\] must be a number, not True"),
        ({"soft_labels": [1, 1.5]}, r"soft_labels\[1\]=1.5: .* must be in \[0, 1\]"),
        ({"soft_labels": [1, -1]}, r"soft_labels\[1\]=-1: "),
        ({"soft_labels": "high"}, "'soft_labels' must be a list"),
        ({"mistake_index": 2}, "mistake_index=2: must be the index of a step, 0 to 1, or null"),
        ({"mistake_index": -1}, "mistake_index=-1: must be"),
        ({"mistake_index": 0.5}, "mistake_index=0.5: must be"),
        ({"labels": [1, 1], "mistake_index": 1}, "'labels' and 'mistake_index': one of .* is enough"),
        ({"labels": [1, 1], "steps": ["a", " "]}, r"'steps\[1\]' is empty"),
        ({"labels": [1], "steps": []}, "'steps' must be a list with something in it"),
        ({"labels": [1, 1], "steps": ["a\nb", "c"]}, r"steps\[0\] has '\\n' in it, which parts the steps"),
    ],
)
def test_solutions_that_cannot_be_used_are_named(loaded, tokenizer, fields, reason) -> None:
    bad = {"prompt": "q", "steps": ["a", "b"], **fields}
    with pytest.raises(DataError, match=rf"records.jsonl:2: {reason}"):
        loaded([SOLUTION, bad], tokenizer)
    splits = loaded([SOLUTION, bad], tokenizer, on_bad_record="skip")
    assert (len(splits.train), splits.report.bad) == (1, 1)


def test_a_tokenizer_that_loses_the_separator(loaded) -> None:
    backend = Tokenizer(models.WordLevel({"<eos>": 0, "a": 1, "b": 2, "q": 3, "?": 4}, unk_token="?"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    words = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>")
    record = {"prompt": "q", "steps": ["a", "b"], "labels": [1, 1]}
    with pytest.raises(DataError, match=r"records.jsonl:1: it has 2 steps, but its tokens show 1: .*step_separator"):
        loaded([record], words)


def test_without_labels_steps_are_no_format_of_their_own(loaded, tokenizer) -> None:
    record = {"question": "q", "steps": ["a"], "answer": "42"}
    assert dict(loaded([record], tokenizer).report.formats) == {"demonstrations": 1}


def test_truncation_cuts_the_labels_too(loaded, tokenizer) -> None:
    record = {"prompt": "q", "steps": ["aaa", "bbb", "ccc"], "labels": [1, 0, -1]}
    splits = loaded([record], tokenizer, max_response_length=9)
    response = only(splits.train).responses[0]
    assert response.token_ids == [*b"aaa\nbbb\nc"]
    assert response.predicted == [3, 7]
    assert listed(response) == {"step_label": [1.0, 0.0]}
    assert not response.finished
    with pytest.raises(DataError, match="no usable record"):
        loaded([record], tokenizer, max_response_length=3)


def test_labels_survive_the_disk(loaded, tokenizer, tmp_path) -> None:
    groups = loaded([SOLUTION], tokenizer).train
    groups[0].responses[0].columns |= {"behaviour_logp": [-1.0, -2.0], "reward": 0.5}
    write_jsonl(tmp_path / "groups.jsonl", [group_to_record(g) for g in groups])
    back = only(load(DataSettings(path=str(tmp_path / "groups.jsonl")), tokenizer).train).responses[0]
    assert listed(back) == {"step_label": [1.0, -1.0], "reward": 0.5}, "log-probs are another policy's"
    assert (back.token_ids, back.loss_mask) == (groups[0].responses[0].token_ids, groups[0].responses[0].loss_mask)
    record = json.loads((tmp_path / "groups.jsonl").read_text())
    record["responses"][0]["columns"]["step_label"] = [1.0]
    (tmp_path / "bad.jsonl").write_text(json.dumps(record))
    with pytest.raises(DataError, match=r"bad.jsonl:1: step_label has 1 values for 2 loss-bearing tokens"):
        load(DataSettings(path=str(tmp_path / "bad.jsonl")), tokenizer)


def test_big_bench_mistake(shared, real_tokenizer) -> None:
    folder = shared / "data" / "bigbench-mistake"
    settings = DataSettings(path=str(folder / "multistep_arithmetic.jsonl"))
    splits = load(settings, real_tokenizer)
    records = [json.loads(line) for line in (folder / "multistep_arithmetic.jsonl").open() if line.strip()]
    assert len(splits.train) == len(records) == 300
    for group, record in zip(splits.train, records, strict=True):
        labels = group.responses[0].columns["step_label"]
        first = record["mistake_index"]
        assert len(labels) == len(record["steps"]) == group.responses[0].loss_tokens
        assert list(labels) == [1.0 if first is None or i < first else -1.0 for i in range(len(labels))]
        assert group.extra["target"] == record["target"]
        texts = Steps(real_tokenizer).split(group.responses[0].token_ids)
        assert len(texts) == len(record["steps"])
