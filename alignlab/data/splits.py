"""The way from a path to train, validation and test groups: read, parse, split, merge, tokenise, report."""

from __future__ import annotations

import json
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING

from alignlab.core.errors import ConfigError, DataError, failure
from alignlab.core.example import BadRecord, Example
from alignlab.core.group import Group
from alignlab.core.interfaces import Parser
from alignlab.core.progress import progress
from alignlab.data.encode import Encoder
from alignlab.data.fields import rename
from alignlab.data.formats import FORMATS, detect, find_parser
from alignlab.data.report import DataReport
from alignlab.data.settings import DataSettings
from alignlab.data.sources import SPLITS as SPLIT_NAMES
from alignlab.data.sources import Record, read

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SPLITS = ("train", "validation", "test")

PROBED = 100
"""How many records are tokenised back and forth to see whether the tokenizer fits the data."""


@dataclass
class Splits:
    """The groups of each split, in the order of the records, and what happened to them on the way."""

    train: list[Group] = field(default_factory=list)
    validation: list[Group] = field(default_factory=list)
    test: list[Group] = field(default_factory=list)
    report: DataReport = field(default_factory=DataReport)


def load(settings: DataSettings, tokenizer: PreTrainedTokenizerBase) -> Splits:
    """Read, check, split and tokenise.

    `validation` and `test` are each a fraction of the training records, or records of their own: a path, or the name
    of another split of the same dataset. Fractions are taken by a seeded hash of the prompt, of a conversation's up to
    the first answer: so the same prompt, and the turns of one conversation, never land in two splits, and a record
    stays where it is when others are added.

    Raises:
        ConfigError: a setting is missing or does not go with the tokenizer.
        DataError: there is no such file; a record cannot be used and `on_bad_record` is "stop"; nothing is left.
    """
    if not settings.paths:
        raise ConfigError("data.path: is not set; give a file, a folder or a dataset, e.g. data.path=my.jsonl")
    report = DataReport(paths=settings.paths)
    encoder = Encoder(tokenizer, settings)
    reader = _Reader(settings, encoder, report)
    examples: dict[str, list[Example]] = {"train": reader.examples(settings.paths, settings.split)}
    shares: dict[str, float] = {}
    for name, where in (("validation", settings.validation), ("test", settings.test)):
        if isinstance(where, str):
            own = _is_path(where)
            examples[name] = reader.examples([where] if own else settings.paths, None if own else where)
        else:
            shares[name], examples[name] = where, []
    _move(examples, shares, settings.seed)
    report.leaks = _leaks(examples)
    if settings.merge:
        for name in SPLITS:
            before = len(examples[name])
            examples[name] = merge(examples[name])
            report.merged += before - len(examples[name])
    groups = {name: encoder.groups(examples[name], report, f"tokenising {name}") for name in SPLITS}
    sample = examples["train"][:PROBED]
    if lost := encoder.unwritable(sample):
        report.note(
            f"the tokenizer does not know every character of {lost} of the first {len(sample)} records: "
            "the model will not see them; is it the right tokenizer for this data?"
        )
    report.measure(groups)
    for name in SPLITS:
        if not groups[name] and shares.get(name):
            report.note(f"there are too few records for {name}={shares[name]:g}: it is empty")
        elif not groups[name] and shares.get(name) is None:
            raise DataError(
                f"{', '.join(settings.paths)}: no usable record for {name}; {'; '.join(report.lines()[1:])}"
            )
    report.fingerprint = reader.fingerprint.hexdigest()
    return Splits(groups["train"], groups["validation"], groups["test"], report)


def _is_path(where: str) -> bool:
    """Whether `validation` or `test` names a place of its own rather than a split of the dataset."""
    if where.lower() in SPLIT_NAMES:
        return False
    return Path(where).expanduser().exists() or "/" in where or "." in where


class _Reader:
    """Records to examples, with an eye to bad ones and duplicates."""

    def __init__(self, settings: DataSettings, encoder: Encoder, report: DataReport) -> None:
        self.settings, self.encoder, self.report = settings, encoder, report
        self.parser = None if settings.parser == "auto" else find_parser(settings.parser)
        self.detected: dict[str, tuple[str, Parser]] = {}
        self.fingerprint = blake2b(digest_size=16)

    def examples(self, paths: list[str], split: str | None) -> list[Example]:
        """The usable records of some files, at most `max_records`, with their texts in their templates."""
        seen: set[bytes] = set()
        result: list[Example] = []
        report, settings = self.report, self.settings
        for path in paths:
            for record in progress(read(path, split, settings.subset, settings.separator), f"reading {path}"):
                if settings.max_records is not None and len(result) == settings.max_records:
                    report.note(f"only the first {settings.max_records:,} usable records were read (data.max_records)")
                    return result
                report.read += 1
                try:
                    example = self.encoder.render(self._parse(record))
                except BadRecord as error:
                    report.reject(record.origin, str(error), settings.on_bad_record == "stop")
                    continue
                report.formats[example.format] += 1
                digest = _digest(example)
                report.duplicates += digest in seen
                seen.add(digest)
                self.fingerprint.update(digest)
                result.append(example)
        return result

    def _parse(self, record: Record) -> Example:
        """The record parsed. A file's format is that of the first record that tells one: a record with a field missing
        is then a bad record, not one of another format."""
        if record.error:
            raise BadRecord(record.error)
        fields = rename(record.fields, self.settings.fields)
        name, parser = self.parser or self.detected.get(record.file) or self._detect(record.file, fields)
        try:
            example = parser(fields)
            if not isinstance(example, Example):
                raise TypeError(f"it returned {type(example).__name__}, not an Example")
            if fault := example.fault():
                raise BadRecord(f"data.parser={name}: {fault}")
        except BadRecord:
            raise
        except (Exception, SystemExit) as error:  # the parser may be the user's own: say where it failed
            raise BadRecord(f"data.parser={name}: {failure(error)}") from error
        example.format, example.origin = name, record.origin
        if example.group is not None:
            example.group.origin = record.origin
        if example.is_conversation and self.settings.chat_template == "auto" and self.encoder.template.builtin:
            self.report.note(
                "the tokenizer has no chat template, so conversations are written as "
                "'Human: … Assistant: …' (data.chat_template=plain)"
            )
        return example

    def _detect(self, file: str, fields: dict[str, object]) -> tuple[str, Parser]:
        name = detect(fields)
        self.detected[file] = name, FORMATS[name]
        return self.detected[file]


def merge(examples: Sequence[Example]) -> list[Example]:
    """Examples with the same prompt as one of K responses, where the first of them stood.

    Only responses that stand for themselves are joined: no pairs, conversations, raw texts, nor prompts alone.
    Responses keep their order; origin and the other fields of the record are those of the first.
    """
    found: dict[Hashable, Example] = {}
    for place, example in enumerate(examples):
        texts = [response for response in example.responses if isinstance(response, str)]
        key: Hashable = place
        if example.group is not None:
            key = tuple(example.group.prompt_ids)
        elif example.prompt is not None and not example.pair and texts and len(texts) == len(example.responses):
            key = (example.format, example.prompt_text, example.has_special_tokens)
        first = found.setdefault(key, example)
        if first is not example:
            first.responses += example.responses
            first.columns += example.columns
            first.steps += example.steps
            first.pieces += example.pieces
            if first.group is not None and example.group is not None:
                first.group.responses += example.group.responses
    return list(found.values())


def _prompt(example: Example, whole: bool) -> str:
    """What examples of different splits must not share: the text or the prompt. Of a conversation what goes before the
    first answer decides the split; the `whole` of its prompt may not be in two."""
    if example.prompt is None:
        return str(example.responses[0]).strip()
    if isinstance(example.prompt, str):
        return example.prompt.strip()
    turns = [(message["role"], message["content"].strip()) for message in example.prompt]
    answers = [i for i, (role, _) in enumerate(turns) if role == "assistant"]
    return json.dumps(turns[: answers[0]] if answers and not whole else turns, ensure_ascii=False)


def _digest(example: Example) -> bytes:
    held = [example.prompt or "", example.responses, example.columns]
    content = json.dumps(held, ensure_ascii=False, default=lambda array: array.tolist())
    return blake2b(content.encode("utf-8", "surrogatepass"), digest_size=16).digest()


def _move(examples: dict[str, list[Example]], shares: dict[str, float], seed: int) -> None:
    """Move the shares for validation and test out of train."""
    if not any(shares.values()):
        return
    stay: list[Example] = []
    for example in examples["train"]:
        content = f"{seed}:{_prompt(example, whole=False)}".encode("utf-8", "surrogatepass")
        place = int.from_bytes(blake2b(content, digest_size=8).digest(), "big") / 2**64
        for name, share in shares.items():
            if place < share:
                examples[name].append(example)
                break
            place -= share
        else:
            stay.append(example)
    examples["train"] = stay


def _leaks(examples: dict[str, list[Example]]) -> dict[str, int]:
    """ "test are also in train" → how many distinct prompts, where there are any."""
    prompts = {name: {_prompt(example, whole=True) for example in part} for name, part in examples.items()}
    pairs = {f"{b} are also in {a}": len(prompts[a] & prompts[b]) for a, b in combinations(SPLITS, 2)}
    return {pair: count for pair, count in pairs.items() if count}
