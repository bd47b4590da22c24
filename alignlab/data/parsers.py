"""A parser for each format: the fields of a record, checked, as an example."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping
from typing import Any

from alignlab.core.group import Column
from alignlab.data.example import BadRecord, Example, Messages
from alignlab.data.settings import Format

PROMPTS = ("prompt", "question", "instruction")
COMPLETIONS = ("completion", "answer", "output")
CONVERSATIONS = ("messages", "conversations")
STEP_LABELS = ("labels", "soft_labels", "mistake_index")
ROLES = {
    **dict.fromkeys(("user", "human", "prompter"), "user"),
    **dict.fromkeys(("assistant", "gpt", "chatgpt", "bing", "bard", "model"), "assistant"),
    **dict.fromkeys(("system", "developer"), "system"),
    **dict.fromkeys(("tool", "function", "observation"), "tool"),
}
TURN = re.compile(r"\n\n(Human|Assistant):")


class Fields:
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

    def has(self, *names: str) -> bool:
        return any(self.values.get(name) is not None for name in names)

    def rest(self) -> dict[str, object]:
        return {name: value for name, value in self.values.items() if name not in self.used}


def _prompt(fields: Fields) -> dict[str, Any]:
    """The prompt as arguments of `Example`."""
    name = fields.first(PROMPTS)
    value = fields.take(name)
    if isinstance(value, list):
        messages = messages_of(value, name)
        if messages[-1]["role"] == "assistant":
            raise BadRecord(f"'{name}' ends with a turn of the assistant")
        return {"prompt": messages}
    text = _text(value, name)
    extra = fields.optional("input") if name == "instruction" else None
    if extra is None or (isinstance(extra, str) and not extra.strip()):
        return {"prompt": text, "instruction": text}
    return {"prompt": f"{text}\n{_text(extra, 'input')}", "instruction": text, "input": extra}


def _raw_text(fields: Fields) -> Example:
    return Example("text", "", [_text(fields.take("text"), "text")], [{}])


def _demonstration(fields: Fields) -> Example:
    name = fields.first(COMPLETIONS)
    return Example("demonstrations", responses=[_answer(fields.take(name), name)], columns=[{}], **_prompt(fields))


def _chat(fields: Fields) -> Example:
    name = fields.first(CONVERSATIONS)
    messages = messages_of(fields.take(name), name)
    if messages[-1]["role"] != "assistant":
        raise BadRecord(f"'{name}' ends with a turn of the {messages[-1]['role']}, so there is nothing to learn from")
    start = next(i for i, message in enumerate(messages) if message["role"] == "assistant")
    if start == 0:
        raise BadRecord(f"'{name}' begins with a turn of the assistant, so there is no prompt")
    return Example("chat", messages[:start], [messages[start:]], [{}])


def _preference(fields: Fields) -> Example:
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


def _labels(fields: Fields) -> list[dict[str, Column]]:
    margin, preference = fields.optional("margin"), fields.optional("preference")
    columns: list[dict[str, Column]] = [{}, {}]
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


def _ranking(fields: Fields) -> Example:
    responses = [
        _answer(value, f"responses[{i}]") for i, value in enumerate(_list(fields.take("responses"), "responses"))
    ]
    scores = fields.optional("scores")
    columns: list[dict[str, Column]] = [{} for _ in responses]
    if scores is not None:
        numbers = [_number(value, f"scores[{i}]") for i, value in enumerate(_list(scores, "scores"))]
        if len(numbers) != len(responses):
            raise BadRecord(f"{len(responses)} responses but {len(numbers)} scores")
        columns = [{"score": number} for number in numbers]
    return Example("rankings", responses=[*responses], columns=columns, **_prompt(fields))


def _steps(fields: Fields) -> Example:
    steps = [_text(value, f"steps[{i}]") for i, value in enumerate(_list(fields.take("steps"), "steps"))]
    labels = _step_labels(fields, len(steps))
    asked = _prompt(fields) if fields.has(*PROMPTS) else {"prompt": _text(fields.take(*PROMPTS, "input"), "input")}
    columns: list[dict[str, Column]] = [{} if labels is None else {"step_label": labels}]
    return Example("steps", responses=["\n".join(steps)], columns=columns, steps=[steps], **asked)


def _step_labels(fields: Fields, count: int) -> list[float] | None:
    """A label in [-1, 1] for each step: -1 wrong, 0 neutral, +1 right; a probability p of being right is 2p - 1.

    From the first wrong step on all are wrong: nothing that is built on an error is right. No annotator has looked at
    those after it, which is why `algorithm.supervise=first_error` leaves them out. None where there are no labels: a
    scorer makes them.
    """
    given = [name for name in STEP_LABELS if fields.has(name)]
    if not given and "mistake_index" in fields.values:
        given = ["mistake_index"]  # null: there is none
    if len(given) > 1:
        raise BadRecord(f"'{given[0]}' and '{given[1]}': one of {', '.join(STEP_LABELS)} is enough")
    if not given:
        return None
    name = given[0]
    if name == "mistake_index":
        first = fields.optional(name)
        if first is None:
            return [1.0] * count
        number = _number(first, name)
        if number != int(number) or not 0 <= number < count:
            raise BadRecord(f"mistake_index={first}: must be the index of a step, 0 to {count - 1}, or null")
        return [1.0] * int(number) + [-1.0] * (count - int(number))
    labels = [_number(value, f"{name}[{i}]") for i, value in enumerate(_list(fields.take(name), name))]
    if len(labels) != count:
        raise BadRecord(f"{count} steps but {len(labels)} {name}")
    for i, label in enumerate(labels):
        if name == "labels" and label not in (-1, 0, 1):
            raise BadRecord(f"labels[{i}]={label:g}: must be -1 (wrong), 0 (neutral) or 1 (right)")
        if name == "soft_labels" and not 0 <= label <= 1:
            raise BadRecord(f"soft_labels[{i}]={label:g}: the probability that a step is right must be in [0, 1]")
    return labels if name == "labels" else [2 * p - 1 for p in labels]


def _unpaired(fields: Fields) -> Example:
    name = fields.first(COMPLETIONS)
    answer, label = _answer(fields.take(name), name), truth(fields.take("label"))
    if label is None:
        raise BadRecord(f"label={fields.values['label']!r}: must be true (a good answer) or false")
    return Example("unpaired", responses=[answer], columns=[{"desirable": float(label)}], **_prompt(fields))


def truth(value: object) -> bool | None:
    """True or false, also as a number or a CSV file writes it; None for anything else."""
    words = {"true": True, "1": True, "false": False, "0": False}
    if isinstance(value, str):
        return words.get(value.strip().lower())
    return bool(value) if isinstance(value, bool | int | float) and value in (0, 1) else None


def _only_prompt(fields: Fields) -> Example:
    if fields.has(*PROMPTS):
        return Example("prompts", responses=[], columns=[], **_prompt(fields))
    name = fields.first((*CONVERSATIONS, "prompt"))
    messages = messages_of(fields.take(name), name)
    extra: dict[str, object] = {}
    if messages[-1]["role"] == "assistant":  # asked for as prompts: the answer at the end is the gold one
        extra["completion"] = messages.pop()["content"]
    if not messages or messages[-1]["role"] == "assistant":
        raise BadRecord(f"'{name}' has no turn of a user to answer")
    return Example("prompts", messages, [], [], extra=extra)


PARSERS: dict[Format, Callable[[Fields], Example]] = {
    "text": _raw_text,
    "demonstrations": _demonstration,
    "chat": _chat,
    "preferences": _preference,
    "rankings": _ranking,
    "steps": _steps,
    "unpaired": _unpaired,
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
    messages = messages_of(value, name)
    if len(messages) != 1 or messages[0]["role"] != "assistant":
        raise BadRecord(f"'{name}' must be a text or one message of the assistant")
    return messages[0]["content"]


def _context(value: object, name: str) -> tuple[Messages, str] | None:
    """A whole conversation as (what goes before the last answer, that answer); None if it is an answer alone."""
    if isinstance(value, str) and not value.startswith("\n\nHuman:"):
        return None
    if not isinstance(value, str | list):
        raise BadRecord(f"'{name}' must be a text or messages, not {type(value).__name__}")
    messages = messages_of(value, name)
    if messages[-1]["role"] != "assistant":
        raise BadRecord(f"'{name}' ends with a turn of the {messages[-1]['role']}, not with an answer")
    return (messages[:-1], messages[-1]["content"]) if len(messages) > 1 else None


def messages_of(value: object, name: str) -> Messages:
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
