"""Formats: a parser for each kind of record. `data.parser` names one of these, or one of yours.

| parser         | fields of a record                                                                                |
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

A parser is a function from the fields of a record to an `Example`; it raises `BadRecord` for one that it cannot use.
Yours may bring the fields into the layout of one of these and call it, as in `preferences({"prompt": …, …})`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from functools import partial, wraps
from typing import Any

from alignlab.build import BY_NAME, build, locate
from alignlab.core.errors import ConfigError, did_you_mean
from alignlab.core.example import BadRecord, Example, Messages
from alignlab.core.group import Column
from alignlab.core.interfaces import Parser
from alignlab.data.fields import Fields, answer_of, context_of, items_of, messages_of, number_of, text_of, truth_of
from alignlab.data.groups import record_to_group

PROMPTS = ("prompt", "question", "instruction")
COMPLETIONS = ("completion", "answer", "output")
CONVERSATIONS = ("messages", "conversations")
STEP_LABELS = ("labels", "soft_labels", "mistake_index")
FIELDS = frozenset(
    (
        *(*PROMPTS, *COMPLETIONS, *CONVERSATIONS, *STEP_LABELS),
        *("text", "input", "chosen", "rejected", "margin", "preference", "responses", "scores", "label", "steps"),
    )
)
"""The field names that the parsers here read; `data.fields` maps one of them to the name a user's records have."""


# ---------------------------------------------------------------------------------------------- which parser


def find_parser(named: str | Mapping[str, Any] | Parser) -> tuple[str, Parser]:
    """The parser that the setting `data.parser` names, and its name.

    Args:
        named: a format of this module; "module.name" or "module:name" of a function, or of a class that needs no
            arguments; a mapping with `_target_` and arguments, which a class gets when it is made and a function with
            every record; or the parser itself.

    Raises:
        ConfigError: there is no such parser, or it cannot be made or called.
    """
    if isinstance(named, str) and named in FORMATS:
        return named, FORMATS[named]
    if callable(named):
        return f"{named.__module__}.{getattr(named, '__qualname__', type(named).__qualname__)}", named
    values = {"_target_": named} if isinstance(named, str) else dict(named)
    key = "data.parser" if isinstance(named, str) else "data.parser._target_"
    name = str(values.pop("_target_", "")).replace(":", ".")
    if "." not in name:
        hint = did_you_mean(name, [*FORMATS, "auto"])
        raise ConfigError(
            f"{key}={name}: is no format{hint}; a parser of your own is named as in {key}=module.function"
        )
    found = locate(name, key)
    if inspect.isroutine(found) and name not in BY_NAME:
        return name, partial(found, **values) if values else found
    parser = build({"_target_": name, **values}, "data.parser")
    if not callable(parser):
        raise ConfigError(f"{key}={name}: cannot be called with a record, so it is no parser")
    return name, parser


def detect(fields: Mapping[str, object]) -> str:
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
        return "unpaired" if isinstance(label, bool | str) and truth_of(label) is not None else "demonstrations"
    if "text" in present:
        return "text"
    names = ", ".join(sorted(fields)) or "none"
    raise BadRecord(
        f"its fields ({names}) fit no known format; name the format (data.parser) and map them (data.fields)"
    )


# ---------------------------------------------------------------------------------------------- the parsers


def _parser(read: Callable[[Fields], Example]) -> Parser:
    """A parser from a function of `Fields`: what it does not use becomes the example's `extra`."""

    @wraps(read)
    def parse(record: Mapping[str, Any]) -> Example:
        fields = Fields(record)
        example = read(fields)
        rest = {name: value for name, value in record.items() if name not in fields.used}
        example.extra = {**rest, **example.extra}
        return example

    return parse


@_parser
def text(fields: Fields) -> Example:
    """A document, learned whole."""
    return Example(None, [text_of(*fields.take("text"))])


@_parser
def demonstrations(fields: Fields) -> Example:
    """A prompt and its answer."""
    answer = answer_of(*fields.take(*COMPLETIONS))
    return _example(fields, [answer])


@_parser
def chat(fields: Fields) -> Example:
    """A conversation, of which the assistant's turns are learned."""
    value, name = fields.take(*CONVERSATIONS)
    messages = messages_of(value, name)
    if messages[-1]["role"] != "assistant":
        raise BadRecord(f"'{name}' ends with a turn of the {messages[-1]['role']}, so there is nothing to learn from")
    start = next(i for i, message in enumerate(messages) if message["role"] == "assistant")
    if start == 0:
        raise BadRecord(f"'{name}' begins with a turn of the assistant, so there is no prompt")
    return Example(messages[:start], [messages[start:]])


@_parser
def preferences(fields: Fields) -> Example:
    """Two answers, the first of them preferred: by a `margin` > 0, or with a probability (`preference`)."""
    chosen, rejected = fields.take("chosen"), fields.take("rejected")
    contexts = [context_of(*chosen), context_of(*rejected)]
    if not any(contexts):
        good, bad = answer_of(*chosen), answer_of(*rejected)
        asked = _prompt(fields)
    elif all(contexts):
        for name in PROMPTS:  # such files often repeat the first question: it is no further information
            fields.optional(name)
        (prompt, good), (other_prompt, bad) = contexts  # type: ignore[misc]
        if prompt != other_prompt:
            raise BadRecord("the prompts of chosen and rejected differ: they must be alike up to the last answer")
        asked = {"prompt": prompt}
    else:
        raise BadRecord("one of chosen and rejected is a whole conversation, the other only an answer")
    if good.strip() == bad.strip():
        raise BadRecord("chosen and rejected are the same")
    return Example(responses=[good, bad], columns=_preferred(fields), pair=True, **asked)


@_parser
def rankings(fields: Fields) -> Example:
    """Several answers, with a score each unless a scorer is to give them."""
    responses: list[str | Messages] = [answer_of(*item) for item in items_of(*fields.take("responses"))]
    scores = fields.optional("scores")
    if scores is None:
        return _example(fields, responses)
    numbers = [number_of(*item) for item in items_of(scores, "scores")]
    if len(numbers) != len(responses):
        raise BadRecord(f"{len(responses)} responses but {len(numbers)} scores")
    return _example(fields, responses, [{"score": number} for number in numbers])


@_parser
def steps(fields: Fields) -> Example:
    """A solution, step by step, with a label each unless a scorer is to give them."""
    parts = [text_of(*item) for item in items_of(*fields.take("steps"))]
    labels = _step_labels(fields, len(parts))
    asked = _prompt(fields) if fields.has(*PROMPTS) else {"prompt": text_of(fields.take(*PROMPTS, "input")[0], "input")}
    columns: list[dict[str, Column]] = [] if labels is None else [{"step_label": labels}]
    return Example(responses=["\n".join(parts)], columns=columns, steps=[parts], **asked)


@_parser
def unpaired(fields: Fields) -> Example:
    """An answer that was liked or not."""
    answer = answer_of(*fields.take(*COMPLETIONS))
    value, _ = fields.take("label")
    label = truth_of(value)
    if label is None:
        raise BadRecord(f"label={value!r}: must be true (a good answer) or false")
    return _example(fields, [answer], [{"desirable": float(label)}])


@_parser
def prompts(fields: Fields) -> Example:
    """A prompt alone. Answers stay in `extra`, for scorers; of a conversation's last answer, as `completion`."""
    if fields.has(*PROMPTS):
        return _example(fields, [])
    value, name = fields.take(*CONVERSATIONS, "prompt")
    messages = messages_of(value, name)
    extra = {"completion": messages.pop()["content"]} if messages[-1]["role"] == "assistant" else {}
    if not messages or messages[-1]["role"] == "assistant":
        raise BadRecord(f"'{name}' has no turn of a user to answer")
    return Example(messages, extra=dict(extra))


def groups(record: Mapping[str, Any]) -> Example:
    """A group with its tokens, as `alignlab sample` writes it."""
    try:
        group = record_to_group(record)
    except ValueError as error:
        raise BadRecord(str(error)) from None
    columns = [dict(r.columns) for r in group.responses]
    return Example(group.prompt, [r.text for r in group.responses], columns, extra=group.extra, group=group)


FORMATS: dict[str, Parser] = {
    parser.__name__: parser  # type: ignore[attr-defined]
    for parser in (text, demonstrations, chat, preferences, rankings, unpaired, steps, prompts, groups)
}
"""The formats that `data.parser` knows by a name of their own."""


# ---------------------------------------------------------------------------------------------- their parts


def _example(fields: Fields, responses: list, columns: list[dict[str, Column]] | None = None) -> Example:
    return Example(responses=responses, columns=columns or [], **_prompt(fields))


def _prompt(fields: Fields) -> dict[str, Any]:
    """The prompt as arguments of `Example`."""
    value, name = fields.take(*PROMPTS)
    if isinstance(value, list):
        messages = messages_of(value, name)
        if messages[-1]["role"] == "assistant":
            raise BadRecord(f"'{name}' ends with a turn of the assistant")
        return {"prompt": messages}
    asked = text_of(value, name)
    more = fields.optional("input") if name == "instruction" else None
    if more is None or (isinstance(more, str) and not more.strip()):
        return {"prompt": asked, "instruction": asked}
    return {"prompt": f"{asked}\n{text_of(more, 'input')}", "instruction": asked, "input": more}


def _preferred(fields: Fields) -> list[dict[str, Column]]:
    """The columns of chosen and rejected."""
    margin, preference = fields.optional("margin"), fields.optional("preference")
    columns: list[dict[str, Column]] = [{}, {}]
    if margin is not None or preference is None:
        gap = 1.0 if margin is None else number_of(margin, "margin")
        if gap <= 0:
            raise BadRecord(f"margin={gap:g}: chosen must be better than rejected, so it must be > 0")
        columns[0]["score"], columns[1]["score"] = gap, 0.0
    if preference is not None:
        probability = number_of(preference, "preference")
        if not 0 <= probability <= 1:
            raise BadRecord(f"preference={probability:g}: the probability that chosen is better must be in [0, 1]")
        if margin is not None and probability < 0.5:
            raise BadRecord(f"preference={probability:g} says that rejected is better, margin={gap:g} that chosen is")
        columns[0]["preference"], columns[1]["preference"] = probability, 1 - probability
    return columns


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
        number = count if first is None else number_of(first, name)
        if first is not None and (number != int(number) or not 0 <= number < count):
            raise BadRecord(f"mistake_index={first}: must be the index of a step, 0 to {count - 1}, or null")
        return [1.0] * int(number) + [-1.0] * (count - int(number))
    labels = [number_of(*item) for item in items_of(*fields.take(name))]
    if len(labels) != count:
        raise BadRecord(f"{count} steps but {len(labels)} {name}")
    for i, label in enumerate(labels):
        if name == "labels" and label not in (-1, 0, 1):
            raise BadRecord(f"labels[{i}]={label:g}: must be -1 (wrong), 0 (neutral) or 1 (right)")
        if name == "soft_labels" and not 0 <= label <= 1:
            raise BadRecord(f"soft_labels[{i}]={label:g}: the probability that a step is right must be in [0, 1]")
    return labels if name == "labels" else [2 * p - 1 for p in labels]
