"""Records to examples: what people's files look like, and the one shape that everything after this deals with.

| format         | fields of a record                                                                                |
|----------------|---------------------------------------------------------------------------------------------------|
| text           | text                                                                                              |
| demonstrations | prompt, completion · question, answer · instruction, [input], output (Alpaca)                     |
| chat           | messages: [{role, content}…] ending with the assistant · conversations: [{from, value}…] (ShareGPT) |
| preferences    | prompt, chosen, rejected · chosen and rejected as whole conversations; [margin], [preference]     |
| rankings       | prompt, responses: [text…], [scores: [number…]]                                                   |
| unpaired       | prompt, completion, label: true or false                                                          |
| steps          | prompt · input, steps: [text…], and one of labels: [-1, 0 or 1…], soft_labels: [0 to 1…],         |
|                | mistake_index: the first wrong step, from 0, or null (BIG-Bench-Mistake)                          |
| groups         | prompt_ids, responses: [{token_ids, …}…], as `alignlab sample` writes them                      |
| prompts        | prompt · question · instruction, [input] · messages                                               |

Wherever a prompt stands, so may question, or instruction with input; a prompt and a response may be message lists.
A conversation is a message list, or a transcript in the layout of Anthropic's HH-RLHF:
"\\n\\nHuman: …\\n\\nAssistant: …".
"""

from __future__ import annotations

from collections.abc import Mapping

from alignlab.data.example import BadRecord, Example, Messages
from alignlab.data.groups import record_to_group
from alignlab.data.parsers import (
    COMPLETIONS,
    CONVERSATIONS,
    PARSERS,
    PROMPTS,
    STEP_LABELS,
    Fields,
    messages_of,
    parse_transcript,
    truth,
)
from alignlab.data.readers import Record
from alignlab.data.settings import Format

__all__ = ["BadRecord", "Example", "Format", "Messages", "detect", "parse", "parse_transcript", "rename"]


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
    if "steps" in present and (asks or "input" in present) and fields.keys() & set(STEP_LABELS):
        return "steps"
    for name in CONVERSATIONS:
        if name in present:
            return "chat" if messages_of(fields[name], name)[-1]["role"] == "assistant" else "prompts"
    if asks:
        if not present.intersection(COMPLETIONS):
            return "prompts"
        label = fields.get("label")  # a number may be anything's class
        return "unpaired" if isinstance(label, bool | str) and truth(label) is not None else "demonstrations"
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
    fields = Fields(rename(record.fields, mapping or {}))
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
    columns = [dict(r.columns) for r in group.responses]
    texts: list[str | Messages] = [r.text for r in group.responses]
    return Example("groups", group.prompt, texts, columns, group, extra=group.extra, origin=record.origin)
