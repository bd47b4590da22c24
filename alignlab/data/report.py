"""What happened to the records on their way to the model: nothing is dropped, cut or repeated without a line here."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from statistics import median

from alignlab.core.errors import DataError
from alignlab.core.group import Group, is_per_token

SHOWN = 10
"""How many of the bad records are listed; all are counted."""


@dataclass
class DataReport:
    """Counts of records, unless said otherwise.

    Attributes:
        paths: what was read.
        read: records found, bad ones included.
        used: groups made of them, over all splits; a long text makes several.
        formats: of the good records, by the name of the parser.
        bad: that could not be used; `bad_records` lists the first, "file:line: reason".
        merged: that went into the group of an earlier one with the same prompt (`data.merge`).
        step_labels: steps of the split "train" that are labelled wrong, neither, right; a soft label by its sign.
        duplicates: equal to an earlier one of the same file or path; they are kept.
        cut: by length limits, what was done → how many records it was done to.
        unfinished: responses that lost their end token to a length limit; marked as `finished=False`.
        splits: groups in each split.
        leaks: "test in train" → how many prompts of the one are in the other too.
        prompt_tokens, response_tokens: (median, largest) over all groups and responses, in tokens.
        loss_tokens: tokens that bear loss, in the split "train".
        fingerprint: a hash of all records that were used, in order.
        notes: anything else to know, as sentences.
    """

    paths: list[str] = field(default_factory=list)
    read: int = 0
    used: int = 0
    formats: Counter[str] = field(default_factory=Counter)
    bad: int = 0
    bad_records: list[str] = field(default_factory=list)
    duplicates: int = 0
    merged: int = 0
    step_labels: tuple[int, int, int] = (0, 0, 0)
    cut: Counter[str] = field(default_factory=Counter)
    unfinished: int = 0
    splits: dict[str, int] = field(default_factory=dict)
    leaks: dict[str, int] = field(default_factory=dict)
    prompt_tokens: tuple[float, int] = (0, 0)
    response_tokens: tuple[float, int] = (0, 0)
    loss_tokens: int = 0
    fingerprint: str = ""
    notes: list[str] = field(default_factory=list)

    def reject(self, origin: str, reason: str, stop: bool) -> None:
        """Count a bad record, or raise `DataError` if the settings say `stop`."""
        if stop:
            raise DataError(f"{origin}: {reason}; mend it, or leave such records out with data.on_bad_record=skip")
        self.bad += 1
        if len(self.bad_records) < SHOWN:
            self.bad_records.append(f"{origin}: {reason}")

    def note(self, sentence: str) -> None:
        """Add a sentence, once."""
        if sentence not in self.notes:
            self.notes.append(sentence)

    def measure(self, splits: dict[str, list[Group]]) -> None:
        """Fill in the counts that are of groups."""
        groups = [group for part in splits.values() for group in part]
        prompts = [len(group.prompt_ids) for group in groups]
        responses = [len(response.token_ids) for group in groups for response in group.responses]
        self.used = len(groups)
        self.splits = {name: len(part) for name, part in splits.items()}
        self.prompt_tokens = (median(prompts), max(prompts)) if prompts else (0, 0)
        self.response_tokens = (median(responses), max(responses)) if responses else (0, 0)
        trained = [response for group in splits.get("train", []) for response in group.responses]
        columns = [response.columns.get("step_label", 0.0) for response in trained]
        labels = [float(label) for column in columns if is_per_token(column) for label in column]  # type: ignore[union-attr]
        self.step_labels = (sum(x < 0 for x in labels), sum(x == 0 for x in labels), sum(x > 0 for x in labels))
        self.loss_tokens = sum(response.loss_tokens for response in trained)

    def lines(self) -> list[str]:
        """The report for people, one fact a line."""
        formats = ", ".join(f"{name} {count:,}" for name, count in self.formats.items())
        lines = [
            f"data: {', '.join(self.paths)}",
            f"records: {self.read:,} read, {self.bad:,} bad; {formats}",
            "groups: " + ", ".join(f"{name} {count:,}" for name, count in self.splits.items()),
            f"tokens: prompts median {self.prompt_tokens[0]:g}, longest {self.prompt_tokens[1]:,}; "
            f"responses median {self.response_tokens[0]:g}, longest {self.response_tokens[1]:,}; "
            f"{self.loss_tokens:,} bear loss in train",
        ]
        if any(self.step_labels):
            wrong, neutral, right = self.step_labels
            lines.append(f"steps in train: {right:,} right, {wrong:,} wrong, {neutral:,} neither")
        if self.merged:
            lines.append(f"merged: {self.merged:,} records went into the group of an earlier one with the same prompt")
        if self.duplicates:
            lines.append(f"duplicates: {self.duplicates:,} records equal an earlier one (kept)")
        lines += [f"length: {what}: {count:,} records" for what, count in self.cut.items()]
        if self.unfinished:
            lines.append(f"length: {self.unfinished:,} responses lost their end token and count as unfinished")
        lines += [f"warning: {count:,} prompts of {pair}: the split is leaking" for pair, count in self.leaks.items()]
        lines += [f"bad: {line}" for line in self.bad_records]
        if self.bad > len(self.bad_records):
            lines.append(f"bad: … and {self.bad - len(self.bad_records):,} more")
        return lines + [f"note: {sentence}" for sentence in self.notes]
