"""Examples to groups: texts to token ids, and which of them bear loss.

Prompt and response are tokenised apart, so that all responses of a group, and the rollout, share one prompt token by
token. A response is tokenised as the continuation it is: where a tokenizer puts a space before the first word of any
text (as SentencePiece ones do), a response gets none but its own.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from alignlab.core.errors import ConfigError, DataError
from alignlab.core.group import Group, Response
from alignlab.data.chat import ChatTemplate, Segment
from alignlab.data.example import BadRecord, Example, Messages
from alignlab.data.lengths import cut_prompt, fit, pieces
from alignlab.data.progress import progress
from alignlab.data.report import DataReport
from alignlab.data.settings import DataSettings, Format
from alignlab.data.steps import Steps

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

BATCH = 512
"""Examples tokenised at a time."""

ALPACA = (
    "Below is an instruction that describes a task{paired}. Write a response that appropriately completes the request."
    "\n\n### Instruction:\n{instruction}{input}\n\n### Response:"
)


@dataclass(slots=True)
class Draft:
    """An example as the texts that will be tokenised.

    Attributes:
        prompt: the prompt, from its template.
        complete: whether the template has written every special token the prompt is to have.
        responses: each as pieces of text, of which some bear loss.
    """

    example: Example
    prompt: str
    complete: bool
    responses: list[list[Segment]]


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

    def draft(self, example: Example) -> Draft:
        """The texts of an example.

        Raises:
            BadRecord: the chat template cannot render it, or a step holds what parts the steps.
        """
        if example.steps:
            example.responses = [self.steps.join(steps) for steps in example.steps]
        if example.group is not None:
            return Draft(example, str(example.prompt), True, [[(str(text), True)] for text in example.responses])
        if example.format == "text":
            return Draft(example, "", False, [[(str(text), True)] for text in example.responses])
        messages = self._messages(example)
        if messages is None:
            separator = self.settings.response_separator
            responses: list[list[Segment]] = [[(f"{separator}{text}", True)] for text in example.responses]
            return Draft(example, self._filled(example), False, responses)
        prompt, complete, responses = "", not self.template.builtin, []
        for response in example.responses:
            if isinstance(response, str):
                answer = {"role": "assistant", "content": response}
                prompt, segments = self.template.split([*messages, answer], "last_assistant")
            else:
                prompt, segments = self.template.split([*messages, *response], self.settings.loss_on)
            responses.append(segments)
        return Draft(example, prompt or self.template.prompt(messages), complete, responses)

    def prompt_ids(self, prompts: Sequence[tuple[str, bool]]) -> list[list[int]]:
        """Token ids of prompts, given as (text, whether the special tokens are in it already)."""
        plain = self._tokenize([text for text, _ in prompts])
        result = []
        for (_, complete), ids in zip(prompts, plain, strict=True):
            head = self._head
            if self.settings.add_bos == "auto" and complete:
                head = []
            result.append(ids if ids[: len(head)] == head else head + ids)
        return result

    def groups(self, drafts: Sequence[Draft], report: DataReport, label: str = "tokenising") -> list[Group]:
        """Groups of tokens, in order; what does not fit or does not tokenise is counted in the report.

        Raises:
            DataError: a record has no tokens and `on_bad_record` is "stop", or is too long and `too_long` is "error".
        """
        result: list[Group] = []
        starts = range(0, len(drafts), BATCH)
        for start in progress(starts, label, len(starts)):
            batch = drafts[start : start + BATCH]
            written = [d for d in batch if d.example.format not in ("text", "groups")]
            prompts = dict.fromkeys((d.prompt, d.complete) for d in written)
            prompt_ids = dict(zip(prompts, self.prompt_ids(list(prompts)), strict=True))
            texts = dict.fromkeys(text for d in written for response in d.responses for text, _ in response)
            segment_ids = dict(zip(texts, self.continuations(list(texts)), strict=True))
            documents = [d for d in batch if d.example.format == "text"]
            document_ids = iter(self._documents([d.responses[0][0][0] for d in documents]))
            for draft in batch:
                try:
                    if draft.example.group is not None:
                        made = [draft.example.group]
                    elif draft.example.format == "text":
                        made = self._document_groups(draft, next(document_ids))
                        if len(made) > 1:
                            report.cut["text split into several pieces"] += 1
                    else:
                        made = [self._group(draft, prompt_ids[draft.prompt, draft.complete], segment_ids)]
                except BadRecord as error:
                    report.reject(draft.example.origin, str(error), self.settings.on_bad_record == "stop")
                else:
                    result.extend(self._fitted(made, report, draft.example.format))
        return result

    def unwritable(self, drafts: Sequence[Draft]) -> int:
        """How many of some examples have a text that does not survive tokenising, spaces and case apart: the tokenizer
        does not know all of its characters."""
        lost = 0
        for draft in drafts:
            texts = [draft.prompt, *(text for response in draft.responses for text, _ in response)]
            # Special tokens stay in: a text may name one, and <unk> must show.
            back = [self.tokenizer.decode(ids) for ids in self._tokenize(texts)]
            lost += any(_bare(a) != _bare(b) for a, b in zip(texts, back, strict=True))
        return lost

    def _messages(self, example: Example) -> Messages | None:
        """The prompt as messages, or None if it is to be a plain text."""
        if not isinstance(example.prompt, str):
            return example.prompt
        if self.settings.chat_template == "auto":
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

    def _document_groups(self, draft: Draft, ids: list[int]) -> list[Group]:
        ids = self._ended(ids)
        bos = ids[0] if ids and ids[0] == self.bos and self.settings.add_bos is not False else None
        made = []
        parts = list(pieces(ids, bos, self.settings))
        if not parts:
            raise BadRecord("the text has too few tokens to predict one from another")
        for i, (prompt, response) in enumerate(parts):
            last = i == len(parts) - 1
            text = str(draft.example.responses[0]) if len(parts) == 1 else self._decode(response)
            made.append(
                Group(
                    prompt,
                    [Response(response, finished=last, text=text)],
                    draft.example.origin,
                    extra=draft.example.extra,
                )
            )
        return made

    def _group(self, draft: Draft, prompt_ids: list[int], segment_ids: dict[str, list[int]]) -> Group:
        example = draft.example
        if not prompt_ids:
            raise BadRecord("the prompt has no tokens: the tokenizer knows none of its characters")
        extra = dict(example.extra)
        if not isinstance(example.prompt, str):
            extra.setdefault("messages", example.prompt)
        group = Group(list(prompt_ids), [], example.origin, draft.prompt, extra=extra)
        for k, (response, segments) in enumerate(zip(example.responses, draft.responses, strict=True)):
            ids, mask = self._joined(segments, segment_ids)
            if example.steps:
                mask = self._step_ends(ids, len(example.steps[k]))
            text = response if isinstance(response, str) else "".join(text for text, _ in segments)
            if not any(mask):
                raise BadRecord("a response has no tokens: the tokenizer knows none of its characters")
            group.responses.append(Response(ids, None if all(mask) else mask, dict(example.columns[k]), text=text))
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

    def _joined(self, segments: list[Segment], segment_ids: dict[str, list[int]]) -> tuple[list[int], list[bool]]:
        """The pieces of a response as one, ending with the end token. After the end token of an answer the assistant
        has stopped: what a template puts there (a newline, mostly) bears no loss, and at the very end goes."""
        ids: list[int] = []
        mask: list[bool] = []
        for i, (text, bears) in enumerate(segments):
            piece = segment_ids[text]
            own = len(piece) if bears else 0
            if bears and self.eos in piece:
                own = len(piece) - piece[::-1].index(self.eos)
            if i == len(segments) - 1:
                if not piece:
                    raise BadRecord("a response has no tokens: the tokenizer knows none of its characters")
                piece = self._ended(piece[:own])
                own = len(piece)
            ids += piece
            mask += [True] * own + [False] * (len(piece) - own)
        return ids, mask

    def _fitted(self, groups: list[Group], report: DataReport, format: Format) -> list[Group]:
        """Those of the groups of one record that are left after the length limits, cut to them."""
        done: set[str] = set()
        left = []
        for group in groups:
            before = [response.finished for response in group.responses]
            actions = fit(group, self.settings, self.bos)
            done.update(actions)
            if actions and self.settings.too_long == "drop":
                done = {"dropped as too long"}
            elif any(response.loss_tokens == 0 for response in group.responses):
                done.add("dropped, since nothing that bears loss was left")
            elif format == "preferences" and group.responses[0].token_ids == group.responses[1].token_ids:
                done.add("dropped, since nothing in which chosen and rejected differ was left")
            else:
                left.append(group)
                for response, was in zip(group.responses, before, strict=True):
                    if was and not response.finished:
                        report.unfinished += 1
                        response.text = self._decode(response.token_ids)
        report.cut.update(done)
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
        draft = encoder.draft(Example("prompts", text_or_messages, [], []))
    except BadRecord as error:
        raise DataError(f"a prompt cannot be used: {error}") from error
    ids = encoder.prompt_ids([(draft.prompt, draft.complete)])[0]
    if not ids:
        raise DataError(f"the prompt {draft.prompt!r} has no tokens: it is empty, or the tokenizer knows none of it")
    limit = settings.max_prompt_length or len(ids)
    if len(ids) > limit and settings.too_long != "truncate":
        raise DataError(f"a prompt of {len(ids)} tokens is longer than data.max_prompt_length={limit}")
    return cut_prompt(ids, limit, settings, encoder.bos)
