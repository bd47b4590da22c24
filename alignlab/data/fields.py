"""The fields of a record, checked: texts, numbers, lists, conversations. For parsers, ours and yours.

What is wrong with a field is told by its name, as in "scores[1] must be a number, not 'good'".
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from typing import Any

from alignlab.core.example import BadRecord, Messages

SPEAKERS = {
    **dict.fromkeys(("user", "human", "prompter"), "user"),
    **dict.fromkeys(("assistant", "gpt", "chatgpt", "bing", "bard", "model"), "assistant"),
    **dict.fromkeys(("system", "developer"), "system"),
    **dict.fromkeys(("tool", "function", "observation"), "tool"),
}
"""What data sets call those who speak → their role."""

TURN = re.compile(r"\n\n(Human|Assistant):")


class Fields:
    """The fields of a record; remembers which were used."""

    def __init__(self, values: Mapping[str, object]) -> None:
        self.values = values
        self.used: set[str] = set()

    def take(self, *names: str) -> tuple[Any, str]:
        """The value of the first of the names that the record has, and that name."""
        for name in names:
            if self.values.get(name) is not None:
                self.used.add(name)
                return self.values[name], name
        if null := [name for name in names if name in self.values]:
            raise BadRecord(f"field '{null[0]}' is null")
        have = ", ".join(sorted(self.values)) or "none"
        wanted = "' or '".join(names)
        raise BadRecord(f"no field '{wanted}'; there are: {have}")

    def optional(self, name: str) -> Any:
        """None also for an empty cell, which is all a CSV file has to say so."""
        self.used.add(name)
        value = self.values.get(name)
        return None if value == "" else value

    def has(self, *names: str) -> bool:
        """Whether the record has one of them."""
        return any(self.values.get(name) is not None for name in names)


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


def truth_of(value: object) -> bool | None:
    """True or false, also as a number or a CSV file writes it; None for anything else."""
    if isinstance(value, str):
        return {"true": True, "1": True, "false": False, "0": False}.get(value.strip().lower())
    return bool(value) if isinstance(value, bool | int | float) and value in (0, 1) else None


def text_of(value: object, name: str) -> str:
    """A text with something in it."""
    if not isinstance(value, str):
        raise BadRecord(f"'{name}' must be a text, not {type(value).__name__}")
    if not value.strip():
        raise BadRecord(f"'{name}' is empty")
    return value


def number_of(value: Any, name: str) -> float:
    """A finite number, also one that is written as a text."""
    try:
        if isinstance(value, bool):
            raise TypeError
        number = float(value)
    except (TypeError, ValueError):
        raise BadRecord(f"{name} must be a number, not {value!r}") from None
    if not math.isfinite(number):
        raise BadRecord(f"{name}={number}: must be finite")
    return number


def items_of(value: Any, name: str) -> list[tuple[Any, str]]:
    """The items of a list, each with its name, as in "scores[1]"."""
    if isinstance(value, str):  # a cell of a CSV file
        try:
            value = json.loads(value)
        except json.JSONDecodeError:
            raise BadRecord(f"'{name}' must be a list") from None
    if not isinstance(value, list) or not value:
        raise BadRecord(f"'{name}' must be a list with something in it")
    return [(item, f"{name}[{i}]") for i, item in enumerate(value)]


def answer_of(value: object, name: str) -> str:
    """A response: a text, or the assistant's one message."""
    if not isinstance(value, list):
        return text_of(value, name)
    messages = messages_of(value, name)
    if len(messages) != 1 or messages[0]["role"] != "assistant":
        raise BadRecord(f"'{name}' must be a text or one message of the assistant")
    return messages[0]["content"]


def context_of(value: object, name: str) -> tuple[Messages, str] | None:
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
    """A conversation as messages: from a message list, ShareGPT's layout, or a transcript.

    Raises:
        BadRecord: it is none, or a turn is empty.
    """
    if isinstance(value, str) and value.startswith("\n\nHuman:"):
        return parse_transcript(value, name)
    messages = []
    for item, place in items_of(value, name):
        if not isinstance(item, Mapping):
            raise BadRecord(f"{place} must be an object with role and content")
        role = item.get("role", item.get("from"))
        if not isinstance(role, str) or role not in SPEAKERS:
            raise BadRecord(f"{place} has the role {role!r}; known: {', '.join(sorted(set(SPEAKERS.values())))}")
        content = item.get("content", item.get("value"))
        if SPEAKERS[role] == "system" and content == "":
            continue  # ShareGPT has many of these; they say nothing
        messages.append({"role": SPEAKERS[role], "content": text_of(content, f"{place}.content")})
    if not messages:
        raise BadRecord(f"'{name}' has no turns")
    return messages


def parse_transcript(transcript: str, name: str = "transcript") -> Messages:
    """A transcript in HH-RLHF's layout as messages, without the spaces around each turn.

    Raises:
        BadRecord: a turn is empty.
    """
    pieces = TURN.split(transcript)
    turns = zip(pieces[1::2], pieces[2::2], strict=True)
    return [
        {"role": SPEAKERS[speaker.lower()], "content": text_of(words, f"{name}, turn {i}").strip()}
        for i, (speaker, words) in enumerate(turns, 1)
    ]
