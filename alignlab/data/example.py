"""What a record says, before it is tokenised: the one shape that everything after the parsers deals with."""

from __future__ import annotations

from dataclasses import dataclass, field

from alignlab.core.group import Column, Group
from alignlab.data.settings import Format

Message = dict[str, str]
Messages = list[Message]


class BadRecord(Exception):
    """A record that cannot be used, and why. Whoever reads the records decides whether to stop or to skip it."""


@dataclass(slots=True)
class Example:
    """A group before it is tokenised: a prompt and the responses to it.

    Attributes:
        format: which format it was read as.
        prompt: text, or messages that end before the assistant's turn; "" for raw text.
        responses: texts; for a chat of several turns, the messages from the first of the assistant's on.
        columns: what is known of each response (`score`, `preference`, `step_label`), one dict for each.
        steps: the steps of each response, where it consists of such; its text is made of them when it is tokenised.
        instruction, input: the two parts of an Alpaca-style prompt, for templates; `instruction` is the prompt itself
            where there are no such parts.
        group: the group itself, where the record holds its tokens.
        extra: the other fields of the record.
        origin: "file:line".
    """

    format: Format
    prompt: str | Messages
    responses: list[str | Messages]
    columns: list[dict[str, Column]]
    group: Group | None = None
    steps: list[list[str]] = field(default_factory=list)
    instruction: str = ""
    input: str = ""
    extra: dict[str, object] = field(default_factory=dict)
    origin: str = ""

    @property
    def conversation(self) -> bool:
        """Whether it consists of messages."""
        return not isinstance(self.prompt, str)
