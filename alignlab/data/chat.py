"""Conversations to text, through a chat template, in pieces of which it is known who wrote them.

The pieces come from rendering ever longer beginnings of the conversation: what the template adds when an answer is
asked for is the model's input, what it then adds for the answer is the model's own. That is exact for every template
under which a longer conversation begins as the shorter one did, and this is checked: where it does not hold, there is
no telling which tokens the model should learn, and no example is made.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Literal

from alignlab.core.errors import ConfigError, shorten
from alignlab.core.example import BadRecord, Messages

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PLAIN = """\
{%- for message in messages -%}
{{ '\\n\\n' + {'user': 'Human', 'assistant': 'Assistant', 'system': 'System', 'tool': 'Tool'}[message['role']] + ': ' }}
{{- message['content'] }}
{%- if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}
{%- endfor -%}
{%- if add_generation_prompt %}{{ '\\n\\nAssistant:' }}{% endif %}"""

CHATML = """\
{%- for message in messages -%}
{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}
{%- endfor -%}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""

BUILTIN = {"plain": PLAIN, "chatml": CHATML}


class ChatTemplate:
    """A chat template and the tokenizer whose special tokens it uses.

    Attributes:
        builtin: whether it is one of ours. Those leave the beginning-of-sequence token to the tokenizer; any other
            writes it where it wants one, as `apply_chat_template(tokenize=True)` has it.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, source: str, builtin: bool) -> None:
        self.tokenizer, self.source, self.builtin = tokenizer, source, builtin

    @classmethod
    def choose(cls, tokenizer: PreTrainedTokenizerBase, name: str) -> ChatTemplate:
        """The template that the setting `chat_template` names.

        Args:
            name: "auto" (the tokenizer's own, or "plain" if it has none), "tokenizer", "plain", "chatml", or the
                path of a Jinja file.

        Raises:
            ConfigError: the tokenizer has none of its own, or there is no such file.
        """
        if name in BUILTIN:
            return cls(tokenizer, BUILTIN[name], builtin=True)
        if name in ("auto", "tokenizer"):
            if tokenizer.chat_template:
                return cls(tokenizer, tokenizer.get_chat_template(), builtin=False)
            if name == "auto":
                return cls(tokenizer, PLAIN, builtin=True)
            raise ConfigError("data.chat_template=tokenizer: the tokenizer has none; use plain, chatml or a Jinja file")
        file = Path(name).expanduser()
        if not file.is_file():
            raise ConfigError(
                f"data.chat_template={name}: must be auto, tokenizer, plain, chatml or the path of a Jinja file; "
                "there is no such file"
            )
        try:
            source = file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"data.chat_template={name}: cannot be read: {error}") from error
        return cls(tokenizer, source, builtin=False)

    def prompt(self, messages: Messages) -> str:
        """The conversation so far, up to where the assistant's answer begins."""
        return self._render(messages, answer=True)

    def split(
        self, messages: Messages, loss_on: Literal["all_assistant", "last_assistant"] = "all_assistant"
    ) -> tuple[str, list[tuple[str, bool]]]:
        """A conversation that ends with an answer, as (prompt, the pieces after it).

        Args:
            messages: at least one turn before the first of the assistant's.
            loss_on: "all_assistant" puts the prompt's end before the first answer, "last_assistant" before the last.

        Returns:
            The prompt, which is `self.prompt` of the turns in it, and the pieces that follow, each with whether the
            assistant wrote it: answers, and between them what the others said.

        Raises:
            BadRecord: the template refuses the conversation, or renders its beginning differently when it goes on.
        """
        answers = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
        if loss_on == "last_assistant":
            answers = answers[-1:]
        prompt = self.prompt(messages[: answers[0]])
        seen = prompt
        pieces: list[tuple[str, bool]] = []
        for i in answers:
            asked = prompt if i == answers[0] else self.prompt(messages[:i])
            answered = self._render(messages[: i + 1], answer=False)
            if not asked.startswith(seen) or not answered.startswith(asked):
                raise BadRecord(
                    f"the chat template renders a conversation's beginning differently when it goes on (turn {i + 1}), "
                    "so which tokens are the assistant's cannot be told; try data.loss_on=last_assistant or another "
                    "data.chat_template"
                )
            if asked != seen:
                pieces.append((asked[len(seen) :], False))
            pieces.append((answered[len(asked) :], True))
            seen = answered
        return prompt, pieces

    def _render(self, messages: Messages, answer: bool) -> str:
        import jinja2

        try:
            text = self.tokenizer.apply_chat_template(
                messages, chat_template=self.source, tokenize=False, add_generation_prompt=answer
            )
        except jinja2.TemplateSyntaxError as error:
            raise ConfigError(f"data.chat_template: line {error.lineno} is no Jinja: {error.message}") from error
        except Exception as error:  # of the template, which is a program
            raise BadRecord(f"the chat template refuses it: {shorten(error)}") from error
        if not isinstance(text, str):
            raise TypeError("apply_chat_template(tokenize=False) did not return a text")
        return text
