"""What a record says, before it is tokenised: the one shape between a record and its group. Parsers make it."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from alignlab.core.group import Column, Group

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

    def check(self) -> None:
        """Find out whether it can become a group.

        Raises:
            BadRecord: a text is empty or no text, a message has no role, a column has no number for each response.
        """
        if self.group is not None:
            return
        if self.prompt is not None:
            _check_text(self.prompt, "prompt")
        elif len(self.responses) != 1:
            raise BadRecord(f"raw text (prompt=None) is one response, not {len(self.responses)}")
        for k, response in enumerate(self.responses):
            _check_text(response, f"responses[{k}]")
        if self.pair and (len(self.responses) != 2 or self.responses[0] == self.responses[1]):
            raise BadRecord("a pair must have two responses, and they must differ")
        for name, values in (("columns", self.columns), ("steps", self.steps or self.responses)):
            if len(values) != len(self.responses):
                raise BadRecord(f"{len(self.responses)} responses but {len(values)} {name}")
        for k, columns in enumerate(self.columns):
            steps = len(self.steps[k]) if self.steps else 0
            for name, value in columns.items():
                numbers = [float(v) for v in value] if isinstance(value, list | tuple) else float(value)
                if isinstance(numbers, list) and len(numbers) != steps:
                    raise BadRecord(f"responses[{k}] has {steps} steps but {len(numbers)} values of {name}")
                if not all(map(math.isfinite, numbers if isinstance(numbers, list) else [numbers])):
                    raise BadRecord(f"responses[{k}]: {name}={value} must be finite")
                columns[name] = numbers


def _check_text(value: str | Messages, name: str) -> None:
    if isinstance(value, str):
        if not value.strip():
            raise BadRecord(f"the {name} is empty")
        return
    if not isinstance(value, list) or not value:
        raise BadRecord(f"the {name} must be a text or a list of messages, not {type(value).__name__}")
    for message in value:
        if not isinstance(message, dict) or message.get("role") not in ROLES or not str(message.get("content", "")):
            raise BadRecord(f"the {name} has a message {message!r}: it needs content and a role: {', '.join(ROLES)}")
