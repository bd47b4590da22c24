"""Texts to token ids, against ids written down by hand (one token per byte) and against transformers' own."""

import pytest
from tokenizers import Tokenizer, models, normalizers
from transformers import PreTrainedTokenizerFast

from alignlab.core import ConfigError, DataError
from alignlab.data import DataSettings, encode_prompt
from alignlab.data.chat import CHATML
from alignlab.data.encode import fill_template

BOS, EOS, IM_START, IM_END = 256, 257, 258, 259
USER, ANSWER = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
TURNS = [USER, {**ANSWER, "content": "Yes."}, {**USER, "content": "Sure?"}, {**ANSWER, "content": "No."}]


def ids(text):
    """One token per byte."""
    return list(text.encode())


def only(groups):
    (group,) = groups
    return group


def test_a_demonstration(loaded, tokenizer):
    group = only(loaded([{"prompt": "Hé", "completion": "yo", "id": 7}], tokenizer).train)
    assert group.prompt_ids == [72, 0xC3, 0xA9]
    assert group.responses[0].token_ids == [121, 111, EOS]
    assert group.responses[0].loss_mask is None
    assert group.responses[0].finished
    assert (group.prompt, group.responses[0].text, group.extra) == ("Hé", "yo", {"id": 7})
    assert group.origin.endswith("records.jsonl:1")


def test_a_preference_pair_shares_its_prompt(loaded, tokenizer):
    record = {"prompt": "q", "chosen": "a", "rejected": "b", "margin": 2}
    group = only(loaded([record], tokenizer, response_separator=" ").train)
    assert group.prompt_ids == ids("q")
    assert [r.token_ids for r in group.responses] == [[*ids(" a"), EOS], [*ids(" b"), EOS]]
    assert [r.columns for r in group.responses] == [{"score": 2.0}, {"score": 0.0}]
    assert [r.text for r in group.responses] == ["a", "b"]


def test_rankings_and_prompts(loaded, tokenizer):
    ranked = only(loaded([{"prompt": "q", "responses": ["a", "b", "c"], "scores": [1, 3, 2]}], tokenizer).train)
    assert [r.token_ids for r in ranked.responses] == [[*ids(letter), EOS] for letter in "abc"]
    assert [r.columns["score"] for r in ranked.responses] == [1.0, 3.0, 2.0]
    prompts = only(loaded([{"question": "q", "answer": "42"}], tokenizer, parser="prompts").train)
    assert (prompts.prompt_ids, prompts.responses, prompts.extra) == (ids("q"), [], {"answer": "42"})


@pytest.mark.parametrize(
    ("adds", "setting", "text", "expected"),
    [
        (False, "auto", "q", ids("q")),
        (True, "auto", "q", [BOS, *ids("q")]),
        (True, "auto", "<s>q", [BOS, *ids("q")]),
        (False, True, "q", [BOS, *ids("q")]),
        (False, True, "<s>q", [BOS, *ids("q")]),
        (True, False, "q", ids("q")),
    ],
)
def test_the_beginning_of_a_prompt(loaded, make_tokenizer, adds, setting, text, expected):
    tokenizer = make_tokenizer(adds_bos=adds)
    group = only(loaded([{"prompt": text, "completion": "a"}], tokenizer, add_bos=setting).train)
    assert group.prompt_ids == expected
    assert group.responses[0].token_ids == [*ids("a"), EOS]  # and never one within
    if setting == "auto" and not text.startswith("<s>"):
        assert group.prompt_ids == tokenizer(text)["input_ids"]


def test_the_end_of_a_response(loaded, make_tokenizer, tokenizer):
    record = [{"prompt": "q", "completion": "a"}]
    assert only(loaded(record, tokenizer, append_eos=False).train).responses[0].token_ids == ids("a")
    written = [{"prompt": "q", "completion": "a</s>"}]
    assert only(loaded(written, tokenizer).train).responses[0].token_ids == [*ids("a"), EOS]
    with pytest.raises(ConfigError, match="append_eos=true: the tokenizer has no end-of-sequence token"):
        loaded(record, make_tokenizer(eos=None))
    with pytest.raises(ConfigError, match="add_bos=true: the tokenizer has no beginning-of-sequence token"):
        loaded(record, make_tokenizer(bos=None), add_bos=True)


def test_raw_text_begins_with_bos_or_with_its_own_first_token(loaded, make_tokenizer, tokenizer):
    record = [{"text": "abc"}]
    for group in (
        only(loaded(record, tokenizer).train),
        only(loaded(record, make_tokenizer(adds_bos=True)).train),
        only(loaded([{"text": "<s>abc"}], tokenizer).train),
    ):
        assert (group.prompt_ids, group.responses[0].token_ids) == ([BOS], [*ids("abc"), EOS])
    for group in (
        only(loaded(record, make_tokenizer(bos=None)).train),
        only(loaded(record, tokenizer, add_bos=False).train),
    ):
        assert (group.prompt_ids, group.responses[0].token_ids) == (ids("a"), [*ids("bc"), EOS])


@pytest.mark.parametrize("bos", ["<s>", None])
@pytest.mark.parametrize("length", [2, 3, 5, 12, 13, 14, 100])
def test_the_pieces_of_a_text_hold_each_token_once(loaded, make_tokenizer, bos, length):
    text = "abcdefghijklm"
    splits = loaded([{"text": text}], make_tokenizer(bos=bos), max_length=length)
    responses = [group.responses[0] for group in splits.train]
    start = [] if bos else [ord("a")]
    assert start + [token for response in responses for token in response.token_ids] == [*ids(text), EOS]
    assert all(group.packed_length <= length for group in splits.train)
    assert [r.finished for r in responses] == [False] * (len(responses) - 1) + [True]
    assert "".join(r.text for r in responses).endswith("m")
    assert (splits.report.cut["text split into several pieces"] == 1) == (len(responses) > 1)
    assert splits.report.unfinished == 0  # the end token is there, in the last piece
    if bos is None:  # a piece is predicted from the token before it
        for before, group in zip(splits.train, splits.train[1:], strict=False):
            assert group.prompt_ids == before.responses[0].token_ids[-1:]
    else:
        assert all(group.prompt_ids == [BOS] for group in splits.train)


def test_a_text_of_one_token_has_nothing_to_predict(loaded, make_tokenizer):
    tokenizer = make_tokenizer(bos=None)
    with pytest.raises(DataError, match=r"records.jsonl:2: the text has too few tokens"):
        loaded([{"text": "ab"}, {"text": "a"}], tokenizer, append_eos=False)


def test_chat_bears_loss_on_the_assistants_turns(loaded, make_tokenizer):
    tokenizer = make_tokenizer(eos="<|im_end|>", template=CHATML)
    group = only(loaded([{"messages": TURNS}], tokenizer).train)
    assert group.prompt_ids == [IM_START, *ids("user\nq"), IM_END, *ids("\n"), IM_START, *ids("assistant\n")]
    response = group.responses[0]
    turn_1 = [*ids("Yes."), IM_END]
    between = [*ids("\n"), IM_START, *ids("user\nSure?"), IM_END, *ids("\n"), IM_START, *ids("assistant\n")]
    turn_2 = [*ids("No."), IM_END]
    assert response.token_ids == turn_1 + between + turn_2
    assert response.loss_mask == [True] * 5 + [False] * len(between) + [True] * 4
    assert group.extra["messages"] == TURNS[:1]


def test_chat_mask_is_that_of_transformers(loaded, make_tokenizer):
    generation = (
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% if m['role'] == 'assistant' %}"
        "{% generation %}{{ m['content'] }}<|im_end|>{% endgeneration %}"
        "{% else %}{{ m['content'] }}<|im_end|>{% endif %}"
        "{{ '\n' }}{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    tokenizer = make_tokenizer(eos="<|im_end|>", template=generation)
    turns = [
        {"role": "system", "content": "Be kind."},
        *TURNS,
        {**USER, "content": "Then?"},
        {**ANSWER, "content": "…"},
    ]
    group = only(loaded([{"messages": turns}], tokenizer).train)
    theirs = tokenizer.apply_chat_template(turns, return_dict=True, return_assistant_tokens_mask=True)
    response = group.responses[0]
    expected = len(theirs["input_ids"]) - 1  # the newline after the last end token is never generated
    assert group.prompt_ids + response.token_ids == theirs["input_ids"][:expected]
    mask = [False] * len(group.prompt_ids) + response.loss_mask
    assert mask == [bool(bears) for bears in theirs["assistant_masks"][:expected]]


@pytest.mark.parametrize("template", ["plain", "chatml"])
def test_what_bears_loss_decodes_to_what_the_assistant_said(loaded, tokenizer, template):
    splits = loaded([{"messages": TURNS}, {"messages": TURNS[:2]}], tokenizer, chat_template=template)
    for group, said in zip(splits.train, ["Yes.No.", "Yes."], strict=True):
        response = group.responses[0]
        text = tokenizer.decode([response.token_ids[i] for i in response.predicted], skip_special_tokens=True)
        assert text.replace("\n", "").replace(" ", "") == said
        assert response.token_ids[-1] == EOS
        assert response.token_ids.count(EOS) == (2 if template == "plain" and said == "Yes.No." else 1)


def test_loss_on_the_last_answer_only(loaded, tokenizer):
    group = only(loaded([{"messages": TURNS}], tokenizer, loss_on="last_assistant").train)
    expected = "\n\nHuman: q\n\nAssistant: Yes.</s>\n\nHuman: Sure?\n\nAssistant:"
    assert tokenizer.decode(group.prompt_ids) == group.prompt == expected
    assert group.responses[0].token_ids == [*ids(" No."), EOS]
    assert group.responses[0].loss_mask is None


def test_a_bos_that_the_template_writes_is_not_doubled_and_one_it_leaves_out_not_added(loaded, make_tokenizer):
    for template in ("<s>{{ messages[0]['content'] }}:", "{{ messages[0]['content'] }}:"):
        for adds in (False, True):
            tokenizer = make_tokenizer(adds_bos=adds, template=template)
            group = only(loaded([{"messages": [USER]}], tokenizer).train)
            assert group.prompt_ids == tokenizer.apply_chat_template([USER], return_dict=False)
    own = only(loaded([{"messages": [USER]}], make_tokenizer(adds_bos=True), chat_template="plain").train)
    assert own.prompt_ids == [BOS, *ids("\n\nHuman: q\n\nAssistant:")]


def test_text_prompts_are_turns_of_a_user_where_a_template_is_named(loaded, make_tokenizer):
    tokenizer = make_tokenizer(eos="<|im_end|>", template=CHATML)
    record = [{"prompt": "q", "chosen": "a", "rejected": "b"}]
    plain = only(loaded(record, tokenizer).train)
    assert (plain.prompt_ids, plain.responses[0].token_ids) == (ids("q"), [*ids("a"), IM_END])
    chat = only(loaded(record, tokenizer, chat_template="tokenizer", prompt_template="{prompt}!").train)
    wanted = [{**USER, "content": "q!"}]
    assert chat.prompt_ids == tokenizer.apply_chat_template(wanted, add_generation_prompt=True, return_dict=False)
    assert [r.token_ids for r in chat.responses] == [[*ids("a"), IM_END], [*ids("b"), IM_END]]


def test_one_way_from_prompts_to_ids(loaded, make_tokenizer):
    """Whatever trains on a prompt and whatever answers it see the same tokens."""
    tokenizer = make_tokenizer(adds_bos=True, eos="<|im_end|>", template=CHATML)
    cases = [
        ({"prompt": "a longer prompt", "completion": "a"}, "a longer prompt", {}),
        ({"prompt": "q", "chosen": "a", "rejected": "b"}, "q", {"prompt_template": "Q: {prompt}\nA:"}),
        ({"prompt": "q", "completion": "a"}, "q", {"prompt_template": "alpaca"}),
        ({"prompt": "q", "completion": "a"}, "q", {"chat_template": "chatml"}),
        ({"messages": TURNS}, TURNS[:1], {}),
        ({"messages": TURNS}, TURNS[:3], {"loss_on": "last_assistant", "chat_template": "plain"}),
        ({"messages": TURNS[:3]}, TURNS[:3], {"max_prompt_length": 20}),
        ({"prompt": "a longer prompt"}, "a longer prompt", {"max_prompt_length": 5}),
    ]
    for record, prompt, settings in cases:
        group = only(loaded([record], tokenizer, **settings).train)
        assert encode_prompt(prompt, tokenizer, DataSettings(**settings)) == group.prompt_ids, settings


def test_prompts_that_cannot_be_encoded(tokenizer):
    with pytest.raises(DataError, match="has no tokens"):
        encode_prompt("", tokenizer, DataSettings())
    with pytest.raises(DataError, match="a prompt of 3 tokens is longer than data"):
        encode_prompt("abc", tokenizer, DataSettings(max_prompt_length=2, too_long="error"))


def test_prompt_templates(loaded, tokenizer):
    record = {"instruction": "Add {input}.", "input": "2", "output": "4"}
    group = only(loaded([record], tokenizer, prompt_template="I: {instruction}\nX: {input}\nO:").train)
    assert group.prompt == "I: Add {input}.\nX: 2\nO:"
    assert fill_template("{prompt} {other} {", "p") == "p {other} {"


def test_the_alpaca_template_is_as_published():
    """https://github.com/tatsu-lab/stanford_alpaca, PROMPT_DICT in train.py."""
    with_input = (
        "Below is an instruction that describes a task, paired with an input that provides further context. "
        "Write a response that appropriately completes the request.\n\n"
        "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:"
    )
    without = (
        "Below is an instruction that describes a task. "
        "Write a response that appropriately completes the request.\n\n"
        "### Instruction:\n{instruction}\n\n### Response:"
    )
    assert fill_template("alpaca", "Do {x}\n1", "Do {x}", "1") == with_input.format(instruction="Do {x}", input="1")
    assert fill_template("alpaca", "Do") == without.format(instruction="Do")


@pytest.mark.parametrize(
    ("setting", "reason"),
    [
        ({"prompt_template": "{promt}"}, r"must be 'alpaca' or a text with \{prompt\}"),
        ({"fields": {"promt": "q"}}, "'promt' is none of alignlab's; did you mean 'prompt'"),
        ({"validation": 1.0}, r"must be a fraction in \[0, 1\)"),
        ({"validation": 0.5, "test": 0.5}, "leave nothing to train on"),
        ({"max_length": 1}, "greater than or equal to 2"),
        ({"max_lenght": 3}, "max_lenght"),
    ],
)
def test_settings_that_are_impossible(setting, reason):
    with pytest.raises(ValueError, match=reason):
        DataSettings(path="a.jsonl", **setting)


@pytest.mark.parametrize("eos", ["</s>", None])
def test_a_continuation_gets_no_space_of_its_own(loaded, eos):
    """As Llama 2 has it: a space before every text, and before every text behind a special token."""
    vocabulary = {character: i for i, character in enumerate("▁abc\n")}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.add_special_tokens(["<s>", "</s>"])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token=eos)
    assert tokenizer("a")["input_ids"] == tokenizer("<s>a")["input_ids"][1:] == [0, 1]  # that is what it does
    records = [{"prompt": "a", "completion": "b c"}, {"prompt": "a", "completion": " b"}]
    groups = loaded(records, tokenizer, append_eos=eos is not None).train
    end = [6] if eos else []
    assert [group.prompt_ids for group in groups] == [[0, 1], [0, 1]]
    assert [group.responses[0].token_ids for group in groups] == [[2, 0, 3, *end], [0, 2, *end]]
