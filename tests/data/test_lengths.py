"""Length limits: what is kept, what is said about it."""

import pytest

from alignlab.core import DataError

EOS = 257
PROMPT, ANSWER, OTHER = "abcdefgh", "1234567", "xyz"  # 8 tokens; 7 and 3, and the end token
PAIR = [{"prompt": PROMPT, "chosen": ANSWER, "rejected": OTHER}]


def ids(text):
    return list(text.encode())


def shape(splits):
    (group,) = splits.train
    return group.prompt_ids, [r.token_ids for r in group.responses], [r.finished for r in group.responses]


def test_what_fits_is_left_alone(loaded, tokenizer):
    splits = loaded(PAIR, tokenizer, max_prompt_length=8, max_response_length=8, max_length=16)
    assert shape(splits) == (ids(PROMPT), [[*ids(ANSWER), EOS], [*ids(OTHER), EOS]], [True, True])
    assert (splits.report.cut, splits.report.unfinished) == ({}, 0)


@pytest.mark.parametrize(("keep", "kept"), [("end", "fgh"), ("start", "abc")])
def test_a_prompt_that_is_too_long(loaded, tokenizer, keep, kept):
    splits = loaded(PAIR, tokenizer, max_prompt_length=3, keep_prompt=keep)
    assert shape(splits)[0] == ids(kept)
    assert splits.report.cut == {f"prompt cut to max_prompt_length ({keep} kept)": 1}


def test_the_first_token_stays_if_it_is_bos(loaded, bos_tokenizer):
    assert shape(loaded(PAIR, bos_tokenizer, max_prompt_length=3))[0] == [256, *ids("gh")]
    assert shape(loaded(PAIR, bos_tokenizer, max_prompt_length=1))[0] == ids("h")


def test_a_response_that_loses_its_end_token_is_unfinished(loaded, tokenizer):
    splits = loaded(PAIR, tokenizer, max_response_length=7)  # the end token alone is lost
    assert shape(splits) == (ids(PROMPT), [ids(ANSWER), [*ids(OTHER), EOS]], [False, True])
    assert splits.report.cut == {"response cut to max_response_length": 1}
    assert splits.report.unfinished == 1
    assert any("1 responses lost their end token" in line for line in splits.report.lines())


def test_the_text_of_a_cut_response_is_what_is_left(loaded, tokenizer):
    (group,) = loaded(PAIR, tokenizer, max_response_length=2).train
    assert [r.text for r in group.responses] == ["12", "xy"]


@pytest.mark.parametrize(
    ("total", "prompt", "answer"),
    [
        (15, "bcdefgh", [*ids(ANSWER), EOS]),  # the prompt makes room: it has more than half
        (12, "cdefgh", ids("123456")),  # 12 - 8 would leave it 4, but half is 6: so 6 each
        (9, "efgh", ids("12345")),  # each keeps at least half: 9 // 2 = 4 and 5
        (2, "h", ids("1")),
    ],
)
def test_prompt_and_response_together(loaded, tokenizer, total, prompt, answer):
    kept, responses, finished = shape(loaded(PAIR, tokenizer, max_length=total))
    assert (kept, responses[0]) == (ids(prompt), answer)
    assert finished[0] == (answer[-1] == EOS)
    assert len(kept) + max(map(len, responses)) <= total


def test_a_short_prompt_leaves_its_share_to_the_response(loaded, tokenizer):
    splits = loaded([{"prompt": "ab", "completion": ANSWER}], tokenizer, max_length=7)
    assert shape(splits) == (ids("ab"), [ids("12345")], [False])
    assert splits.report.cut == {"response cut to fit max_length": 1}


def test_each_record_is_counted_once(loaded, tokenizer):
    splits = loaded(PAIR * 3, tokenizer, max_prompt_length=4, max_response_length=2)
    cut = {"prompt cut to max_prompt_length (end kept)": 3, "response cut to max_response_length": 3}
    assert splits.report.cut == cut
    assert splits.report.unfinished == 6
    assert splits.report.duplicates == 2


def test_drop_and_error(loaded, tokenizer):
    short = {"prompt": "q", "chosen": "a", "rejected": "b"}
    splits = loaded([*PAIR, short], tokenizer, max_length=10, too_long="drop")
    assert [group.prompt for group in splits.train] == ["q"]
    assert splits.report.cut == {"dropped as too long": 1}
    with pytest.raises(
        DataError, match=r"records.jsonl:2: the prompt has 8 tokens, the longest response 8, .*max_length"
    ):
        loaded([short, *PAIR], tokenizer, max_length=10, too_long="error")


def test_a_pair_that_cutting_has_made_equal_is_dropped(loaded, tokenizer):
    records = [{"prompt": "q", "chosen": "same and a", "rejected": "same and b"}, *PAIR]
    splits = loaded(records, tokenizer, max_response_length=4)
    assert [group.prompt for group in splits.train] == [PROMPT]
    assert splits.report.cut["dropped, since nothing in which chosen and rejected differ was left"] == 1


def test_the_mask_is_cut_with_the_response(loaded, tokenizer):
    turns = [
        {"role": "user", "content": "q"},
        {"role": "assistant", "content": "a"},
        {"role": "user", "content": "r"},
        {"role": "assistant", "content": "b"},
    ]
    response = loaded([{"messages": turns}], tokenizer, max_response_length=5).train[0].responses[0]
    assert response.token_ids == [*ids(" a"), EOS, *ids("\n\n")]
    assert response.loss_mask == [True, True, True, False, False]
    assert not response.finished


def test_raw_text_is_cut_where_it_is_not_to_be_split(loaded, tokenizer):
    splits = loaded([{"text": "abcdef"}], tokenizer, max_length=4, chunk=False)
    assert shape(splits) == ([256], [ids("abc")], [False])
    assert splits.report.unfinished == 1


def test_prompts_alone_are_cut_too(loaded, tokenizer):
    (group,) = loaded([{"prompt": PROMPT}], tokenizer, max_length=4).train
    assert group.prompt_ids == ids("efgh")
