"""Records to examples: what people's files look like, and the one shape that everything after this deals with.

| format         | fields of a record                                                                                |
|----------------|---------------------------------------------------------------------------------------------------|
| text           | text                                                                                              |
| demonstrations | prompt, completion · question, answer · instruction, [input], output (Alpaca)                     |
| chat           | messages: [{role, content}…] ending with the assistant · conversations: [{from, value}…] (ShareGPT) |
| preferences    | prompt, chosen, rejected · chosen and rejected as whole conversations; [margin], [preference]     |
| rankings       | prompt, responses: [text…], [scores: [number…]]                                                   |
| groups         | prompt_ids, responses: [{token_ids, …}…], as `alignlab sample` writes them                      |
| prompts        | prompt · question · instruction, [input] · messages                                               |

Wherever a prompt stands, so may question, or instruction with input; a prompt and a response may be message lists.
A conversation is a message list, or a transcript in the layout of Anthropic's HH-RLHF:
"\\n\\nHuman: …\\n\\nAssistant: …".
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from alignlab.core import Group
from alignlab.data.groups import record_to_group
from alignlab.data.readers import Record
from alignlab.data.settings import Format

Message = dict[str, str]
Messages = list[Message]

PROMPTS = ("prompt", "question", "instruction")
COMPLETIONS = ("completion", "answer", "output")
CONVERSATIONS = ("messages", "conversations")
ROLES = {
    **dict.fromkeys(("user", "human", "prompter"), "user"),
    **dict.fromkeys(("assistant", "gpt", "chatgpt", "bing", "bard", "model"), "assistant"),
    **dict.fromkeys(("system", "developer"), "system"),
    **dict.fromkeys(("tool", "function", "observation"), "tool"),
}
TURN = re.compile(r"\n\n(Human|Assistant):")


class BadRecord(Exception):
    """A record that cannot be used, and why. Whoever reads the records decides whether to stop or to skip it."""


@dataclass(slots=True)
class Example:
    """A group before it is tokenised: a prompt and the responses to it.

    Attributes:
        format: which format it was read as.
        prompt: text, or messages that end before the assistant's turn; "" for raw text.
        responses: texts; for a chat of several turns, the messages from the first of the assistant's on.
        columns: what is known of each response (`score`, `preference`), one dict for each.
        instruction, input: the two parts of an Alpaca-style prompt, for templates; `instruction` is the prompt itself
            where there are no such parts.
        group: the group itself, where the record holds its tokens.
        extra: the other fields of the record.
        origin: "file:line".
    """

    format: Format
    prompt: str | Messages
    responses: list[str | Messages]
    columns: list[dict[str, float]]
    group: Group | None = None
    instruction: str = ""
    input: str = ""
    extra: dict[str, object] = field(default_factory=dict)
    origin: str = ""

    @property
    def conversation(self) -> bool:
        """Whether it consists of messages."""
        return not isinstance(self.prompt, str)


def detect(fields: Mapping[str, object]) -> Format:
    """The format that a record's fields tell.

    Raises:
        BadRecord: they tell none.
    """
    present = {name for name, value in fields.items() if value is not None}
    asks = bool(present.intersection(PROMPTS))
    if {"prompt_ids", "responses"} <= present:
        return "groups"
    if {"chosen", "rejected"} <= present:
        return "preferences"
    if asks and "responses" in present:
        return "rankings"
    for name in CONVERSATIONS:
        if name in present:
            return "chat" if _messages(fields[name], name)[-1]["role"] == "assistant" else "prompts"
    if asks:
        return "demonstrations" if present.intersection(COMPLETIONS) else "prompts"
    if "text" in present:
        return "text"
    names = ", ".join(sorted(fields)) or "none"
    raise BadRecord(
        f"its fields ({names}) fit no known format; name the format (data.format) and map them (data.fields)"
    )


def rename(fields: Mapping[str, object], mapping: Mapping[str, str]) -> dict[str, object]:
    """The fields under alignlab's names; `mapping` is from alignlab's name to the user's."""
    result = {name: value for name, value in fields.items() if name not in mapping.values()}
    for ours, theirs in mapping.items():
        if theirs not in fields:
            raise BadRecord(
                f"no field '{theirs}' (data.fields.{ours}={theirs}); there are: {', '.join(sorted(fields))}"
            )
        result[ours] = fields[theirs]
    return result


def parse(record: Record, format: Format, mapping: Mapping[str, str] | None = None) -> Example:
    """A record as an example.

    Raises:
        BadRecord: it does not fit the format: a missing field, a wrong type, an empty text, equal or ill-matched
            answers, a score that is not a number…
    """
    if record.error:
        raise BadRecord(record.error)
    if format == "groups":
        return _tokenised(record)
    fields = _Fields(rename(record.fields, mapping or {}))
    example = PARSERS[format](fields)
    example.origin = record.origin
    example.extra = {**fields.rest(), **example.extra}
    return example


def _tokenised(record: Record) -> Example:
    """A group as `alignlab sample` writes it."""
    try:
        group = record_to_group(record.fields, record.origin)
    except ValueError as error:
        raise BadRecord(str(error)) from None
    columns = [{k: v for k, v in r.columns.items() if not isinstance(v, list)} for r in group.responses]
    texts: list[str | Messages] = [r.text for r in group.responses]
    return Example("groups", group.prompt, texts, columns, group, extra=group.extra, origin=record.origin)


class _Fields:
    """The fields of a record; remembers which were used."""

    def __init__(self, values: dict[str, object]) -> None:
        self.values = values
        self.used: set[str] = set()

    def first(self, names: tuple[str, ...]) -> str:
        """The first of the names that the record has."""
        for name in names:
            if self.values.get(name) is not None:
                return name
        have = ", ".join(sorted(self.values)) or "none"
        wanted = "' or '".join(names)
        raise BadRecord(f"no field '{wanted}'; there are: {have}")

    def take(self, *names: str) -> object:
        name = self.first(names)
        self.used.add(name)
        return self.values[name]

    def optional(self, name: str) -> object:
        """None also for an empty cell, which is all a CSV file has to say so."""
        self.used.add(name)
        value = self.values.get(name)
        return None if value == "" else value

    def rest(self) -> dict[str, object]:
        return {name: value for name, value in self.values.items() if name not in self.used}


def _prompt(fields: _Fields) -> dict[str, Any]:
    """The prompt as arguments of `Example`."""
    name = fields.first(PROMPTS)
    value = fields.take(name)
    if isinstance(value, list):
        messages = _messages(value, name)
        if messages[-1]["role"] == "assistant":
            raise BadRecord(f"'{name}' ends with a turn of the assistant")
        return {"prompt": messages}
    text = _text(value, name)
    extra = fields.optional("input") if name == "instruction" else None
    if extra is None or (isinstance(extra, str) and not extra.strip()):
        return {"prompt": text, "instruction": text}
    return {"prompt": f"{text}\n{_text(extra, 'input')}", "instruction": text, "input": extra}


def _raw_text(fields: _Fields) -> Example:
    return Example("text", "", [_text(fields.take("text"), "text")], [{}])


def _demonstration(fields: _Fields) -> Example:
    name = fields.first(COMPLETIONS)
    return Example("demonstrations", responses=[_answer(fields.take(name), name)], columns=[{}], **_prompt(fields))


def _chat(fields: _Fields) -> Example:
    name = fields.first(CONVERSATIONS)
    messages = _messages(fields.take(name), name)
    if messages[-1]["role"] != "assistant":
        raise BadRecord(f"'{name}' ends with a turn of the {messages[-1]['role']}, so there is nothing to learn from")
    start = next(i for i, message in enumerate(messages) if message["role"] == "assistant")
    if start == 0:
        raise BadRecord(f"'{name}' begins with a turn of the assistant, so there is no prompt")
    return Example("chat", messages[:start], [messages[start:]], [{}])


def _preference(fields: _Fields) -> Example:
    chosen, rejected = fields.take("chosen"), fields.take("rejected")
    contexts = [_context(chosen, "chosen"), _context(rejected, "rejected")]
    if all(contexts):
        for name in PROMPTS:  # such files often repeat the first question: it is no further information
            fields.optional(name)
        (prompt, good), (other_prompt, bad) = contexts  # type: ignore[misc]
        if chosen == rejected:
            raise BadRecord("chosen and rejected are the same")
        if prompt != other_prompt:
            raise BadRecord("the prompts of chosen and rejected differ: they must be alike up to the last answer")
        arguments: dict[str, Any] = {"prompt": prompt}
    elif any(contexts):
        raise BadRecord("one of chosen and rejected is a whole conversation, the other only an answer")
    else:
        good, bad = _answer(chosen, "chosen"), _answer(rejected, "rejected")
        arguments = _prompt(fields)
    if good.strip() == bad.strip():
        raise BadRecord("chosen and rejected are the same")
    return Example("preferences", responses=[good, bad], columns=_labels(fields), **arguments)


def _labels(fields: _Fields) -> list[dict[str, float]]:
    margin, preference = fields.optional("margin"), fields.optional("preference")
    columns: list[dict[str, float]] = [{}, {}]
    if margin is not None or preference is None:
        gap = 1.0 if margin is None else _number(margin, "margin")
        if gap <= 0:
            raise BadRecord(f"margin={gap:g}: chosen must be better than rejected, so it must be > 0")
        columns[0]["score"], columns[1]["score"] = gap, 0.0
    if preference is not None:
        probability = _number(preference, "preference")
        if not 0 <= probability <= 1:
            raise BadRecord(f"preference={probability:g}: the probability that chosen is better must be in [0, 1]")
        if margin is not None and probability < 0.5:
            raise BadRecord(f"preference={probability:g} says that rejected is better, margin={gap:g} that chosen is")
        columns[0]["preference"], columns[1]["preference"] = probability, 1 - probability
    return columns


def _ranking(fields: _Fields) -> Example:
    responses = [
        _answer(value, f"responses[{i}]") for i, value in enumerate(_list(fields.take("responses"), "responses"))
    ]
    scores = fields.optional("scores")
    columns: list[dict[str, float]] = [{} for _ in responses]
    if scores is not None:
        numbers = [_number(value, f"scores[{i}]") for i, value in enumerate(_list(scores, "scores"))]
        if len(numbers) != len(responses):
            raise BadRecord(f"{len(responses)} responses but {len(numbers)} scores")
        columns = [{"score": number} for number in numbers]
    return Example("rankings", responses=[*responses], columns=columns, **_prompt(fields))


def _only_prompt(fields: _Fields) -> Example:
    if any(fields.values.get(name) is not None for name in PROMPTS):
        return Example("prompts", responses=[], columns=[], **_prompt(fields))
    name = fields.first((*CONVERSATIONS, "prompt"))
    messages = _messages(fields.take(name), name)
    extra: dict[str, object] = {}
    if messages[-1]["role"] == "assistant":  # asked for as prompts: the answer at the end is the gold one
        extra["completion"] = messages.pop()["content"]
    if not messages or messages[-1]["role"] == "assistant":
        raise BadRecord(f"'{name}' has no turn of a user to answer")
    return Example("prompts", messages, [], [], extra=extra)


PARSERS: dict[Format, Callable[[_Fields], Example]] = {
    "text": _raw_text,
    "demonstrations": _demonstration,
    "chat": _chat,
    "preferences": _preference,
    "rankings": _ranking,
    "prompts": _only_prompt,
}


def _text(value: object, name: str) -> str:
    if not isinstance(value, str):
        raise BadRecord(f"'{name}' must be a text, not {type(value).__name__}")
    if not value.strip():
        raise BadRecord(f"'{name}' is empty")
    return value


def _number(value: object, name: str) -> float:
    try:
        if isinstance(value, bool):
            raise TypeError
        number = float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        raise BadRecord(f"{name} must be a number, not {value!r}") from None
    if not math.isfinite(number):
        raise BadRecord(f"{name}={number}: must be finite")
    return number


def _list(value: object, name: str) -> list:
    if isinstance(value, str):  # a cell of a CSV file
        try:
            value = json.loads(value)
        except json.JSONDecodeError:
            raise BadRecord(f"'{name}' must be a list") from None
    if not isinstance(value, list) or not value:
        raise BadRecord(f"'{name}' must be a list with something in it")
    return value


def _answer(value: object, name: str) -> str:
    """A response: a text, or the assistant's one message."""
    if not isinstance(value, list):
        return _text(value, name)
    messages = _messages(value, name)
    if len(messages) != 1 or messages[0]["role"] != "assistant":
        raise BadRecord(f"'{name}' must be a text or one message of the assistant")
    return messages[0]["content"]


def _context(value: object, name: str) -> tuple[Messages, str] | None:
    """A whole conversation as (what goes before the last answer, that answer); None if it is an answer alone."""
    if isinstance(value, str) and not value.startswith("\n\nHuman:"):
        return None
    if not isinstance(value, str | list):
        raise BadRecord(f"'{name}' must be a text or messages, not {type(value).__name__}")
    messages = _messages(value, name)
    if messages[-1]["role"] != "assistant":
        raise BadRecord(f"'{name}' ends with a turn of the {messages[-1]['role']}, not with an answer")
    return (messages[:-1], messages[-1]["content"]) if len(messages) > 1 else None


def _messages(value: object, name: str) -> Messages:
    if isinstance(value, str) and value.startswith("\n\nHuman:"):
        return parse_transcript(value, name)
    messages = []
    for i, item in enumerate(_list(value, name)):
        if not isinstance(item, Mapping):
            raise BadRecord(f"{name}[{i}] must be an object with role and content")
        role = item.get("role", item.get("from"))
        if not isinstance(role, str) or role not in ROLES:
            raise BadRecord(f"{name}[{i}] has the role {role!r}; known: {', '.join(sorted(set(ROLES.values())))}")
        content = item.get("content", item.get("value"))
        if ROLES[role] == "system" and content == "":
            continue  # ShareGPT has many of these; they say nothing
        messages.append({"role": ROLES[role], "content": _text(content, f"{name}[{i}].content")})
    if not messages:
        raise BadRecord(f"'{name}' has no turns")
    return messages


def parse_transcript(text: str, name: str = "transcript") -> Messages:
    """A transcript in HH-RLHF's layout as messages, without the spaces around each turn.

    Raises:
        BadRecord: a turn is empty.
    """
    pieces = TURN.split(text)
    turns = zip(pieces[1::2], pieces[2::2], strict=True)
    return [
        {"role": ROLES[speaker.lower()], "content": _text(words, f"{name}, turn {i}").strip()}
        for i, (speaker, words) in enumerate(turns, 1)
    ]
