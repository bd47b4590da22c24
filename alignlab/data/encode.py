"""Examples to groups: texts to token ids, and which of them bear loss.

Prompt and response are tokenised apart, so that all responses of a group, and the rollout, share one prompt token by
token. A response is tokenised as the continuation it is: where a tokenizer puts a space before the first word of any
text (as SentencePiece ones do), a response gets none but its own.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import cached_property
from typing import TYPE_CHECKING

from alignlab.core.errors import ConfigError, DataError
from alignlab.core.example import BadRecord, Example, Messages
from alignlab.core.group import Group, Response, is_per_token, numbers
from alignlab.core.progress import progress
from alignlab.data.chat import ChatTemplate
from alignlab.data.lengths import cut_prompt, fit, pieces
from alignlab.data.report import DataReport
from alignlab.data.settings import DataSettings
from alignlab.data.steps import Steps

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

BATCH = 512
"""Examples tokenised at a time."""

ALPACA = (
    "Below is an instruction that describes a task{paired}. Write a response that appropriately completes the request."
    "\n\n### Instruction:\n{instruction}{input}\n\n### Response:"
)


def fill_template(template: str, prompt: str, instruction: str = "", input: str = "") -> str:
    """The setting `prompt_template` with {prompt}, {instruction} and {input} filled in; "alpaca" is Alpaca's own
    (Taori et al. 2023), whose input section is left out where there is no input."""
    instruction = instruction or prompt
    if template == "alpaca":
        return ALPACA.format(
            paired=", paired with an input that provides further context" if input else "",
            instruction=instruction,
            input=f"\n\n### Input:\n{input}" if input else "",
        )
    values = {"prompt": prompt, "instruction": instruction, "input": input}
    return re.sub(r"\{(prompt|instruction|input)\}", lambda match: values[match[1]], template)


def _bare(text: str) -> str:
    return "".join(text.split()).lower()


class Encoder:
    """Examples to groups, with one tokenizer and one set of settings."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, settings: DataSettings) -> None:
        self.tokenizer, self.settings = tokenizer, settings
        self.bos: int | None = tokenizer.bos_token_id
        self.eos: int | None = tokenizer.eos_token_id
        if settings.add_bos is True and self.bos is None:
            raise ConfigError("data.add_bos=true: the tokenizer has no beginning-of-sequence token; use auto or false")

    @cached_property
    def template(self) -> ChatTemplate:
        return ChatTemplate.choose(self.tokenizer, self.settings.chat_template)

    @cached_property
    def steps(self) -> Steps:
        return Steps(self.tokenizer, self.settings.step_separator, self.settings.step_token)

    def render(self, example: Example) -> Example:
        """Put an example's texts into their templates: fills in `prompt_text`, `has_special_tokens` and `pieces`.

        Raises:
            BadRecord: the chat template cannot render it, or a step holds what parts the steps.
        """
        if example.steps:
            example.responses = [self.steps.join(steps) for steps in example.steps]
        messages = self._messages(example)
        if messages is None:
            raw = example.prompt is None or example.group is not None
            separator = "" if raw else self.settings.response_separator
            example.prompt_text = str(example.prompt or "") if raw else self._filled(example)
            example.pieces = [[(f"{separator}{text}", True)] for text in example.responses]
            return example
        example.has_special_tokens, example.pieces = not self.template.builtin, []
        for response in example.responses:
            turns = [{"role": "assistant", "content": response}] if isinstance(response, str) else response
            loss_on = "last_assistant" if isinstance(response, str) else self.settings.loss_on
            example.prompt_text, parts = self.template.split([*messages, *turns], loss_on)
            example.pieces.append(parts)
        if not example.responses:
            example.prompt_text = self.template.prompt(messages)
        return example

    def prompt_ids(self, prompts: Sequence[tuple[str, bool]]) -> list[list[int]]:
        """Token ids of prompts, given as (text, whether the special tokens are in it already)."""
        plain = self._tokenize([text for text, _ in prompts])
        result = []
        for (_, complete), ids in zip(prompts, plain, strict=True):
            head = [] if complete and self.settings.add_bos == "auto" else self._head
            result.append(ids if ids[: len(head)] == head else head + ids)
        return result

    def groups(self, examples: Sequence[Example], report: DataReport, label: str = "tokenising") -> list[Group]:
        """Groups of tokens of rendered examples, in order; what does not fit or does not tokenise is counted.

        Raises:
            DataError: a record has no tokens and `on_bad_record` is "stop", or is too long and `too_long` is "error".
        """
        result: list[Group] = []
        starts = range(0, len(examples), BATCH)
        for start in progress(starts, label, len(starts)):
            batch = examples[start : start + BATCH]
            # Prompts and pieces that several examples share are tokenised once.
            written = [e for e in batch if e.prompt is not None and e.group is None]
            prompts = list(dict.fromkeys((e.prompt_text, e.has_special_tokens) for e in written))
            prompt_ids = dict(zip(prompts, self.prompt_ids(prompts), strict=True))
            texts = list(dict.fromkeys(text for e in written for response in e.pieces for text, _ in response))
            piece_ids = dict(zip(texts, self.continuations(texts), strict=True))
            documents = iter(self._documents([str(e.responses[0]) for e in batch if e.prompt is None]))
            for example in batch:
                try:
                    if example.group is not None:
                        made = [example.group]
                    elif example.prompt is None:
                        made = self._document_groups(example, next(documents))
                    else:
                        made = [self._group(example, prompt_ids, piece_ids)]
                except BadRecord as error:
                    report.reject(example.origin, str(error), self.settings.on_bad_record == "stop")
                    continue
                if len(made) > 1:
                    report.cut["text split into several pieces"] += 1
                result += self._fitted(made, report, example.pair)
        return result

    def unwritable(self, examples: Sequence[Example]) -> int:
        """How many of some examples have a text that does not survive tokenising, spaces and case apart: the tokenizer
        does not know all of its characters."""
        lost = 0
        for example in examples:
            texts = [example.prompt_text, *(text for response in example.pieces for text, _ in response)]
            # Special tokens stay in: a text may name one, and <unk> must show.
            back = [self.tokenizer.decode(ids) for ids in self._tokenize(texts)]
            lost += any(_bare(a) != _bare(b) for a, b in zip(texts, back, strict=True))
        return lost

    def _messages(self, example: Example) -> Messages | None:
        """The prompt as messages, or None if it is to be a plain text."""
        if isinstance(example.prompt, list):
            return example.prompt
        if self.settings.chat_template == "auto" or example.prompt is None or example.group is not None:
            return None
        return [{"role": "user", "content": self._filled(example)}]

    def _filled(self, example: Example) -> str:
        return fill_template(self.settings.prompt_template, str(example.prompt), example.instruction, example.input)

    @cached_property
    def _head(self) -> list[int]:
        """The tokens that go before a plain text: what the tokenizer itself puts there, unless told otherwise."""
        if self.settings.add_bos is True:
            return [self.bos] if self.bos is not None else []
        if self.settings.add_bos is False:
            return []
        with_special = self.tokenizer("a")["input_ids"]
        plain = self.tokenizer("a", add_special_tokens=False)["input_ids"]
        for i in range(len(with_special) - len(plain) + 1):
            if with_special[i : i + len(plain)] == plain:
                return list(with_special[:i])
        return []

    @cached_property
    def _anchor(self) -> tuple[str, int] | None:
        """A text and its number of tokens, after which a text is tokenised as a continuation; None if none is needed.

        Needed is one where the tokenizer treats the beginning of a text unlike its middle.
        """
        alone = self.tokenizer("a", add_special_tokens=False)["input_ids"]
        for anchor in (self.tokenizer.eos_token, self.tokenizer.bos_token, "\n"):
            if anchor:
                ahead, after = self._tokenize([anchor, anchor + "a"])
                if after[: len(ahead)] == ahead and after[len(ahead) :] != alone:
                    return anchor, len(ahead)
        return None

    def _tokenize(self, texts: list[str]) -> list[list[int]]:
        if not texts:
            return []
        return self.tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]

    def continuations(self, texts: list[str]) -> list[list[int]]:
        """Token ids of texts that stand behind others."""
        if self._anchor is None:
            return self._tokenize(texts)
        anchor, length = self._anchor
        ahead = self._tokenize([anchor])[0]
        anchored = self._tokenize([anchor + text for text in texts])
        return [
            ids[length:] if ids[:length] == ahead else self._tokenize([text])[0]  # the anchor has merged with the text
            for text, ids in zip(texts, anchored, strict=True)
        ]

    def _documents(self, texts: list[str]) -> list[list[int]]:
        """Token ids of raw texts, with the beginning-of-sequence token at their head if there is to be one."""
        bos = self.tokenizer.bos_token
        if self.settings.add_bos is False or bos is None:
            return self._tokenize(texts)
        every = self._tokenize([text if text.startswith(bos) else bos + text for text in texts])
        return [ids if ids[:1] == [self.bos] else [self.tokenizer.bos_token_id, *ids] for ids in every]

    def _ended(self, ids: list[int]) -> list[int]:
        """With the end token at its end, once."""
        if not self.settings.append_eos or (ids and ids[-1] == self.eos):
            return ids
        if self.eos is None:
            raise ConfigError("data.append_eos=true: the tokenizer has no end-of-sequence token; give it one")
        return [*ids, self.eos]

    def _document_groups(self, example: Example, ids: list[int]) -> list[Group]:
        ids = self._ended(ids)
        bos = ids[0] if ids and ids[0] == self.bos and self.settings.add_bos is not False else None
        parts = list(pieces(ids, bos, self.settings))
        if not parts:
            raise BadRecord("the text has too few tokens to predict one from another")
        texts = [str(example.responses[0])] if len(parts) == 1 else [self._decode(response) for _, response in parts]
        made = [
            Group(prompt, [Response(response, finished=False, text=text)], example.origin, extra=example.extra)
            for (prompt, response), text in zip(parts, texts, strict=True)
        ]
        made[-1].responses[0].finished = True
        return made

    def _group(
        self, example: Example, prompt_ids: dict[tuple[str, bool], list[int]], piece_ids: dict[str, list[int]]
    ) -> Group:
        prompt = prompt_ids[example.prompt_text, example.has_special_tokens]
        if not prompt:
            raise BadRecord("the prompt has no tokens: the tokenizer knows none of its characters")
        extra = dict(example.extra)
        if example.is_conversation:
            extra.setdefault("messages", example.prompt)
        group = Group(list(prompt), [], example.origin, example.prompt_text, extra=extra)
        for k, (response, parts) in enumerate(zip(example.responses, example.pieces, strict=True)):
            ids, mask = self._joined(parts, piece_ids)
            if example.steps:
                mask = self._step_ends(ids, len(example.steps[k]))
            text = response if isinstance(response, str) else "".join(text for text, _ in parts)
            if not any(mask):
                raise BadRecord("a response has no tokens: the tokenizer knows none of its characters")
            columns = {name: numbers(v) if is_per_token(v) else v for name, v in example.columns[k].items()}  # type: ignore[arg-type]
            group.responses.append(Response(ids, None if all(mask) else mask, columns, text=text))
        return group

    def _step_ends(self, ids: list[int], count: int) -> list[bool]:
        """Which tokens bear loss, where the model judges steps: the ends of these."""
        ends = self.steps.ends(ids)
        if len(ends) != count:
            raise BadRecord(
                f"it has {count} steps, but its tokens show {len(ends)}: the tokenizer does not know their characters, "
                "or does not keep what parts them (data.step_separator, data.step_token)"
            )
        chosen = set(ends)
        return [i in chosen for i in range(len(ids))]

    def _joined(self, parts: list[tuple[str, bool]], piece_ids: dict[str, list[int]]) -> tuple[list[int], list[bool]]:
        """The pieces of a response as one, ending with the end token. After the end token of an answer the assistant
        has stopped: what a template puts there (a newline, mostly) bears no loss, and at the very end goes."""
        ids: list[int] = []
        mask: list[bool] = []
        for i, (text, bears) in enumerate(parts):
            piece = piece_ids[text]
            own = len(piece) if bears else 0
            if bears and self.eos in piece:
                own = len(piece) - piece[::-1].index(self.eos)
            if i == len(parts) - 1:
                if not piece:
                    raise BadRecord("a response has no tokens: the tokenizer knows none of its characters")
                piece = self._ended(piece[:own])
                own = len(piece)
            ids += piece
            mask += [True] * own + [False] * (len(piece) - own)
        return ids, mask

    def _fitted(self, groups: list[Group], report: DataReport, pair: bool) -> list[Group]:
        """Those of the groups of one record that are left after the length limits, cut to them."""
        done: list[str] = []
        left = []
        for group in groups:
            before = [response.finished for response in group.responses]
            actions = fit(group, self.settings, self.bos)
            done += actions
            if actions and self.settings.too_long == "drop":
                done = ["dropped as too long"]
            elif any(response.loss_tokens == 0 for response in group.responses):
                done.append("dropped, since nothing that bears loss was left")
            elif pair and group.responses[0].token_ids == group.responses[1].token_ids:
                done.append("dropped, since nothing in which chosen and rejected differ was left")
            else:
                left.append(group)
                for response, was in zip(group.responses, before, strict=True):
                    if was and not response.finished:
                        report.unfinished += 1
                        response.text = self._decode(response.token_ids)
        report.cut.update(dict.fromkeys(done, 1))
        return left

    def _decode(self, ids: list[int]) -> str:
        return str(self.tokenizer.decode(ids, skip_special_tokens=True))


def encode_prompt(
    text_or_messages: str | Messages, tokenizer: PreTrainedTokenizerBase, settings: DataSettings
) -> list[int]:
    """The one way in which prompts become token ids, whoever needs them.

    Args:
        text_or_messages: a prompt as a record has it, before its template; or messages that end before the
            assistant's turn.
        tokenizer: as for `load`.
        settings: template, beginning-of-sequence token and `max_prompt_length` are used.

    Returns:
        At least one token.

    Raises:
        DataError: the prompt has no tokens, the chat template refuses it, or it is longer than `max_prompt_length`
            and `too_long` is not "truncate".
    """
    encoder = Encoder(tokenizer, settings)
    try:
        example = encoder.render(Example(text_or_messages))
    except BadRecord as error:
        raise DataError(f"a prompt cannot be used: {error}") from error
    ids = encoder.prompt_ids([(example.prompt_text, example.has_special_tokens)])[0]
    if not ids:
        raise DataError(
            f"the prompt {example.prompt_text!r} has no tokens: it is empty, or the tokenizer knows none of it"
        )
    limit = settings.max_prompt_length or len(ids)
    if len(ids) > limit and settings.too_long != "truncate":
        raise DataError(f"a prompt of {len(ids)} tokens is longer than data.max_prompt_length={limit}")
    return cut_prompt(ids, limit, settings, encoder.bos)
