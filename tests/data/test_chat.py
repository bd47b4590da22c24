"""Chat templates: which tokens are the assistant's own."""

import pytest
from transformers.utils.chat_template_utils import render_jinja_template

from alignlab.core import BadRecord, ConfigError
from alignlab.data.chat import BUILTIN, ChatTemplate
from alignlab.data.fields import parse_transcript

MESSAGES = [
    {"role": "system", "content": "Be kind."},
    {"role": "user", "content": "One?"},
    {"role": "assistant", "content": "Yes."},
    {"role": "user", "content": "Two?"},
    {"role": "assistant", "content": "No."},
]

# What Mistral-like templates do: the end token only after answers, roles written as brackets, BOS by the template.
BRACKETS = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'assistant' %} {{ m['content'] }}{{ eos_token }}"
    "{% elif m['role'] == 'user' %}[Q]{{ m['content'] }}[/Q]"
    "{% else %}{{ raise_exception('only user and assistant') }}{% endif %}{% endfor %}"
)
# What reasoning models' templates do: they drop the thoughts of all answers but the last.
FORGETFUL = (
    "{% for m in messages %}{{ m['role'] }}:"
    "{{ m['content'] if loop.last or m['role'] != 'assistant' else m['content'].split('|')[-1] }};{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)


def test_chatml_is_as_published(tokenizer):
    template = ChatTemplate.choose(tokenizer, "chatml")
    prompt, segments = template.split(MESSAGES)
    assert prompt == "<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\nOne?<|im_end|>\n<|im_start|>assistant\n"
    assert segments == [
        ("Yes.<|im_end|>\n", True),
        ("<|im_start|>user\nTwo?<|im_end|>\n<|im_start|>assistant\n", False),
        ("No.<|im_end|>\n", True),
    ]


def test_plain_is_the_layout_of_hh_rlhf_with_end_tokens(tokenizer):
    prompt, segments = ChatTemplate.choose(tokenizer, "plain").split(MESSAGES[1:])
    assert prompt == "\n\nHuman: One?\n\nAssistant:"
    assert segments == [(" Yes.</s>", True), ("\n\nHuman: Two?\n\nAssistant:", False), (" No.</s>", True)]
    whole = prompt + "".join(text for text, _ in segments)
    assert parse_transcript(whole.replace("</s>", "")) == MESSAGES[1:]


@pytest.mark.parametrize("source", [*BUILTIN.values(), BRACKETS])
@pytest.mark.parametrize("loss_on", ["all_assistant", "last_assistant"])
def test_the_pieces_make_up_the_whole_rendering(make_tokenizer, source, loss_on):
    tokenizer = make_tokenizer(template=source)
    prompt, segments = ChatTemplate.choose(tokenizer, "auto").split(MESSAGES[1:], loss_on)
    names = {"bos_token": "<s>", "eos_token": "</s>"}
    whole, _ = render_jinja_template([MESSAGES[1:]], chat_template=source, **names)
    assert prompt + "".join(text for text, _ in segments) == whole[0]


def test_loss_on_the_last_answer_takes_all_before_it_as_the_prompt(tokenizer):
    prompt, segments = ChatTemplate.choose(tokenizer, "plain").split(MESSAGES[1:], "last_assistant")
    assert prompt == "\n\nHuman: One?\n\nAssistant: Yes.</s>\n\nHuman: Two?\n\nAssistant:"
    assert segments == [(" No.</s>", True)]


def test_a_template_that_rewrites_what_it_has_said_is_refused(make_tokenizer):
    template = ChatTemplate.choose(make_tokenizer(template=FORGETFUL), "tokenizer")
    messages = [dict(message) for message in MESSAGES]
    messages[2]["content"] = "thought|Yes."
    with pytest.raises(
        BadRecord, match=r"beginning differently when it goes on \(turn 5\).*data.loss_on=last_assistant"
    ):
        template.split(messages)
    assert template.split(messages, "last_assistant")[1] == [("No.;", True)]


def test_a_template_that_shows_the_answer_beforehand_is_refused(make_tokenizer):
    source = "{% for m in messages %}{{ loop.length }}{{ m['content'] }}{% endfor %}"
    with pytest.raises(BadRecord, match="differently"):
        ChatTemplate.choose(make_tokenizer(template=source), "auto").split(MESSAGES[1:3])


def test_what_a_template_itself_refuses_is_a_bad_record(make_tokenizer):
    template = ChatTemplate.choose(make_tokenizer(template=BRACKETS), "auto")
    with pytest.raises(BadRecord, match="the chat template refuses it: only user and assistant"):
        template.split(MESSAGES)


def test_which_template_is_chosen(make_tokenizer, tokenizer, tmp_path):
    own = make_tokenizer(template=BRACKETS)
    file = tmp_path / "t.jinja"
    file.write_text("{{ messages[0]['content'] }}")
    assert ChatTemplate.choose(own, "auto").source == BRACKETS
    assert ChatTemplate.choose(own, "tokenizer").source == BRACKETS
    assert ChatTemplate.choose(own, "chatml").source == BUILTIN["chatml"]
    assert ChatTemplate.choose(tokenizer, "auto").source == BUILTIN["plain"]
    assert ChatTemplate.choose(tokenizer, str(file)).prompt(MESSAGES) == "Be kind."
    with pytest.raises(ConfigError, match=r"data.chat_template=tokenizer: the tokenizer has none"):
        ChatTemplate.choose(tokenizer, "tokenizer")
    with pytest.raises(ConfigError, match=r"data.chat_template=chatlm: .* there is no such file"):
        ChatTemplate.choose(tokenizer, "chatlm")
