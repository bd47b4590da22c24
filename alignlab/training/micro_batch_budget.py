"""How many tokens a micro-batch may have: what was asked for, or suits the device, until memory runs out."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from alignlab.core import AlignlabError, Batch
from alignlab.core.files import read_json, write_json
from alignlab.core.memory import ADVICE, said, usual_tokens
from alignlab.training.run_folder import BUDGET

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Shortage:
    """A micro-batch that there was no memory for.

    Attributes:
        rank: the process whose it was.
        tokens: its tokens; `longest` of them are of one group, which cannot be divided.
        groups: how many groups it had.
        origin: the record of the longest group.
        said: the allocator's message.
    """

    rank: int
    tokens: int
    longest: int
    groups: int
    origin: str
    said: str

    @staticmethod
    def of(batch: Batch, rank: int, error: BaseException) -> Shortage:
        longest = max(batch.groups, key=lambda g: g.packed_length)
        tokens = sum(g.packed_length for g in batch.groups)
        return Shortage(rank, tokens, longest.packed_length, len(batch.groups), longest.origin, said(error))


class OutOfMemory(AlignlabError):
    """There was no memory for a micro-batch; the same on every process, where processes can agree at that point.

    Attributes:
        shortages: of each process that had one.
    """

    def __init__(self, shortages: Sequence[Shortage]) -> None:
        super().__init__(f"out of memory: {shortages[0].said}")
        self.shortages = list(shortages)


class TokenBudget:
    """Tokens per micro-batch. Halved when memory runs out, and kept in the run's folder, so that a continuation does
    not learn it anew; a continuation that asks for another budget gets that.

    Args:
        folder: the run's; None: there is none, and nothing is kept.
        asked: `training.max_tokens_per_microbatch`; None: what suits the device.

    Attributes:
        asked: what was asked for or chosen.
        tokens: what is in use.
    """

    def __init__(self, folder: Path | None, asked: int | None, device: torch.device) -> None:
        self.path = None if folder is None else folder / BUDGET
        self.asked = self.tokens = asked or usual_tokens(device.type == "cpu")

    def found(self) -> int:
        """What the folder says of a run that asked for as much."""
        if self.path is None:
            return self.asked
        try:
            kept = read_json(self.path, "counts as not there", {"asked": int, "tokens": int}, {"asked": 0, "tokens": 0})
        except AlignlabError as error:
            log.warning("%s", error)
            return self.asked
        return max(1, min(self.asked, kept["tokens"])) if kept["asked"] == self.asked else self.asked

    def halve(self, shortages: Sequence[Shortage], write: bool) -> None:
        """Make the budget half of what there was no memory for, but no less than the longest group there.

        Args:
            write: say so, and keep it in the folder; one process at least does.

        Raises:
            AlignlabError: a group alone was too much.
        """
        for short in shortages:
            if short.groups == 1:
                raise AlignlabError(
                    f"out of memory with a micro-batch of one group, the least there can be: "
                    f"{short.origin or 'a group'}, {short.tokens:,} tokens ({short.said}): {ADVICE}"
                )
        before = self.tokens
        self.tokens = min(max(s.longest, min(before, s.tokens) // 2) for s in shortages)
        if write and self.path is not None:
            write_json(self.path, {"asked": self.asked, "tokens": self.tokens})
        if write:
            first = shortages[0]
            log.warning(
                "out of memory in a micro-batch of %s tokens on process %d (%s): "
                "training.max_tokens_per_microbatch goes down from %s to %s",
                *(f"{first.tokens:,}", first.rank, first.said, f"{before:,}", f"{self.tokens:,}"),
            )


def random_state(device: torch.device) -> list[torch.Tensor]:
    """Of the generators that dropout draws from on this process."""
    return [torch.get_rng_state(), *([torch.cuda.get_rng_state(device)] if device.type == "cuda" else [])]


def set_random_state(state: Sequence[torch.Tensor], device: torch.device) -> None:
    torch.set_rng_state(state[0])
    if device.type == "cuda":
        torch.cuda.set_rng_state(state[1], device)
