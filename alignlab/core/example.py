"""What a record says, before it is tokenised: the one shape between a record and its group. Parsers make it."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from alignlab.core.group import Column, Group, is_per_token

Message = dict[str, str]
"""One turn of a conversation: `{"role": …, "content": …}`."""

Messages = list[Message]

ROLES = ("user", "assistant", "system", "tool")


class BadRecord(Exception):
    """A record that cannot be used, and why. Whoever reads the records adds file and line, and stops or skips it."""


@dataclass(slots=True)
class Example:
    """A prompt and the responses to it, as text. `Example("2+2=", ["4"])` is a whole one.

    Attributes:
        prompt: a text, or messages that end before the assistant's turn; None for raw text, which is the one response.
        responses: texts; for a chat of several turns, the messages from the first of the assistant's on.
        columns: what is known of each response, one dict each: `score` (higher is better), `preference` (in [0, 1]),
            `desirable` (0 or 1), `step_label` (a list, one value a step), or a column that an algorithm of yours reads.
        steps: the steps of each response where it consists of steps; its text is then made of them.
        pair: whether the two responses are chosen and rejected. A pair stays one group when `data.merge` joins records,
            and is dropped where the length limits leave nothing in which the two differ.
        instruction, input: the two parts of an Alpaca-style prompt, for templates that name them.
        extra: other fields of the record, for scorers; the model does not see them.
        group: the group itself, where the record holds its tokens.

    The data layer fills in the others:
        format: the name of the parser.
        origin: "file:line".
        prompt_text: the prompt with its template.
        has_special_tokens: whether the template has written every special token that the prompt needs.
        pieces: each response as pieces of text, with its template; and whether a piece bears loss.
    """

    prompt: str | Messages | None
    responses: list[str | Messages] = field(default_factory=list)
    columns: list[dict[str, Column]] = field(default_factory=list)
    steps: list[list[str]] = field(default_factory=list)
    pair: bool = False
    instruction: str = ""
    input: str = ""
    extra: dict[str, object] = field(default_factory=dict)
    group: Group | None = None

    format: str = ""
    origin: str = ""
    prompt_text: str = ""
    has_special_tokens: bool = False
    pieces: list[list[tuple[str, bool]]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.columns = self.columns or [{} for _ in self.responses]

    @property
    def is_conversation(self) -> bool:
        """Whether the prompt consists of messages."""
        return isinstance(self.prompt, list)

    def fault(self) -> str:
        """Why it cannot become a group: an empty text, a message without a role, a column that is no finite number or
        has not one for each step. "" if it can. Numbers in columns become floats."""
        if self.group is not None:
            return ""
        if self.prompt is None and len(self.responses) != 1:
            return f"raw text (prompt=None) is one response, not {len(self.responses)}"
        for name, values in (("columns", self.columns), ("steps", self.steps or self.responses)):
            if len(values) != len(self.responses):
                return f"{len(self.responses)} responses but {len(values)} {name}"
        texts = {} if self.prompt is None else {"prompt": self.prompt}
        for name, text in {**texts, **{f"responses[{k}]": r for k, r in enumerate(self.responses)}}.items():
            if found := _text_fault(text):
                return f"{name} {found}"
        if self.pair and (len(self.responses) != 2 or self.responses[0] == self.responses[1]):
            return "a pair must have two responses, and they must differ"
        for k, columns in enumerate(self.columns):
            steps = len(self.steps[k]) if self.steps else 0
            for name, value in columns.items():
                try:
                    numbers = [float(v) for v in value] if is_per_token(value) else float(value)  # type: ignore[union-attr, arg-type]
                except (TypeError, ValueError, OverflowError):
                    return f"responses[{k}]: {name}={value!r:.80} must be a number, or a list of one for each step"
                if isinstance(numbers, list) and len(numbers) != steps:
                    return f"responses[{k}] has {steps} steps but {len(numbers)} values of {name}"
                if not all(map(math.isfinite, numbers if isinstance(numbers, list) else [numbers])):
                    return f"responses[{k}]: {name}={value} must be finite"
                columns[name] = numbers
        return ""


def _text_fault(value: object) -> str:
    if isinstance(value, str):
        return _characters_fault(value) or ("" if value.strip() else "is empty")
    if not isinstance(value, list) or not value:
        return f"must be a text or a list of messages, not {type(value).__name__}"
    for message in value:
        if not isinstance(message, dict) or message.get("role") not in ROLES or not message.get("content"):
            return f"has a message {message!r}: it needs content and a role: {', '.join(ROLES)}"
        if found := _characters_fault(str(message["content"])):
            return found
    return ""


def _characters_fault(text: str) -> str:
    """A lone surrogate is half a character, which no tokenizer takes."""
    if text.isascii():
        return ""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        return (
            f"has half a character, U+{ord(text[error.start]):04X}, at {error.start + 1}: it was cut or escaped wrongly"
        )
    return ""
