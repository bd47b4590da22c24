"""From a path to train, validation and test groups."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from hashlib import blake2b
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING

from alignlab.core.errors import ConfigError, DataError
from alignlab.core.group import Group
from alignlab.data.encode import Draft, Encoder
from alignlab.data.example import BadRecord, Example
from alignlab.data.formats import detect, parse, rename
from alignlab.data.merge import merge
from alignlab.data.progress import progress
from alignlab.data.readers import SPLITS as SPLIT_NAMES
from alignlab.data.readers import Record, read
from alignlab.data.report import DataReport
from alignlab.data.settings import DataSettings, Format

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
    drafts: dict[str, list[Draft]] = {"train": reader.drafts(settings.paths, settings.split)}
    shares: dict[str, float] = {}
    for name, where in (("validation", settings.validation), ("test", settings.test)):
        if isinstance(where, str):
            drafts[name] = reader.drafts([where], None) if _is_path(where) else reader.drafts(settings.paths, where)
        else:
            shares[name] = where
            drafts[name] = []
    _move(drafts, shares, settings.seed)
    report.leaks = _leaks(drafts)
    if settings.merge:
        for name in SPLITS:
            drafts[name], gone = merge(drafts[name])
            report.merged += gone
    groups = {name: encoder.groups(drafts[name], report, f"tokenising {name}") for name in SPLITS}
    sample = drafts["train"][:PROBED]
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
    """Records to drafts, with an eye to bad ones and duplicates."""

    def __init__(self, settings: DataSettings, encoder: Encoder, report: DataReport) -> None:
        self.settings, self.encoder, self.report = settings, encoder, report
        self.formats: dict[str, Format] = {}
        self.fingerprint = blake2b(digest_size=16)

    def drafts(self, paths: list[str], split: str | None) -> list[Draft]:
        """The usable records of some files, at most `max_records`."""
        seen: set[bytes] = set()
        result: list[Draft] = []
        report, settings = self.report, self.settings
        for path in paths:
            for record in progress(read(path, split, settings.subset, settings.separator), f"reading {path}"):
                if settings.max_records is not None and len(result) == settings.max_records:
                    report.note(f"only the first {settings.max_records:,} usable records were read (data.max_records)")
                    return result
                report.read += 1
                try:
                    draft = self.encoder.draft(self._example(record))
                except BadRecord as error:
                    report.reject(record.origin, str(error), settings.on_bad_record == "stop")
                    continue
                report.formats[draft.example.format] += 1
                digest = _digest(draft.example)
                report.duplicates += digest in seen
                seen.add(digest)
                self.fingerprint.update(digest)
                result.append(draft)
        return result

    def _example(self, record: Record) -> Example:
        """The record parsed. A file's format is that of the first record that tells one: a record with a field missing
        is then a bad record, not one of another format."""
        if record.error:
            raise BadRecord(record.error)
        format = self.settings.format if self.settings.format != "auto" else self.formats.get(record.file)
        if format is None:
            format = self.formats[record.file] = detect(rename(record.fields, self.settings.fields))
        example = parse(record, format, self.settings.fields)
        if example.conversation and self.settings.chat_template == "auto" and self.encoder.template.builtin:
            self.report.note(
                "the tokenizer has no chat template, so conversations are written as "
                "'Human: … Assistant: …' (data.chat_template=plain)"
            )
        return example


def _beginning(example: Example) -> str:
    """What decides the split: the text, the prompt, or the conversation up to the first answer."""
    if example.format == "text":
        return str(example.responses[0]).strip()
    if isinstance(example.prompt, str):
        return example.prompt.strip()
    turns = []
    for message in example.prompt:
        if message["role"] == "assistant":
            break
        turns.append((message["role"], message["content"].strip()))
    return json.dumps(turns, ensure_ascii=False)


def _whole_prompt(example: Example) -> str:
    """What must not be in two splits."""
    if example.format == "text" or isinstance(example.prompt, str):
        return _beginning(example)
    return json.dumps([(m["role"], m["content"].strip()) for m in example.prompt], ensure_ascii=False)


def _digest(example: Example) -> bytes:
    content = json.dumps([example.prompt, example.responses, example.columns], ensure_ascii=False)
    return blake2b(content.encode("utf-8", "surrogatepass"), digest_size=16).digest()


def _move(drafts: dict[str, list[Draft]], shares: dict[str, float], seed: int) -> None:
    """Move the shares for validation and test out of train."""
    if not any(shares.values()):
        return
    stay: list[Draft] = []
    for draft in drafts["train"]:
        content = f"{seed}:{_beginning(draft.example)}".encode("utf-8", "surrogatepass")
        place = int.from_bytes(blake2b(content, digest_size=8).digest(), "big") / 2**64
        for name, share in shares.items():
            if place < share:
                drafts[name].append(draft)
                break
            place -= share
        else:
            stay.append(draft)
    drafts["train"] = stay


def _leaks(drafts: dict[str, list[Draft]]) -> dict[str, int]:
    """ "test are also in train" → how many distinct prompts, where there are any."""
    prompts = {name: {_whole_prompt(draft.example) for draft in part} for name, part in drafts.items()}
    pairs = {f"{b} are also in {a}": len(prompts[a] & prompts[b]) for a, b in combinations(SPLITS, 2)}
    return {pair: count for pair, count in pairs.items() if count}
