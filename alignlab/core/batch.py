"""A batch of groups as flat tensors: the only form in which an algorithm sees data. There is no padding in it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor

from alignlab.core.errors import AlignlabError
from alignlab.core.group import Group
from alignlab.core.order import best_response, compared
from alignlab.core.ragged import segments

Unit = Literal["token", "response", "pair", "group"]
"""What a loss is a mean over: the loss-bearing tokens, the responses, the preference pairs or the groups of the
global batch, whatever the number of processes and micro-batches it is spread over."""


@dataclass(frozen=True)
class Pairs:
    """Preference pairs of a batch.

    Attributes:
        winner_P, loser_P: response indices (axis N), int64.
        probability_P: probability that the winner is preferred, in [0.5, 1]; 1 where a label is certain.
        margin_P: how much better the winner is, in the units of the scores (of the preferences where there are none).
    """

    winner_P: Tensor
    loser_P: Tensor
    probability_P: Tensor
    margin_P: Tensor

    def __len__(self) -> int:
        return len(self.winner_P)


class Batch:
    """Groups laid out flat.

    Attributes:
        groups: the groups themselves.
        N, G, T: number of responses, groups and loss-bearing response tokens.
        response_T: which response (axis N) each loss-bearing token belongs to, int64.
        group_N: which group each response belongs to, int64.
        token_T: token ids of the loss-bearing tokens, int64.
        length_N: loss-bearing tokens of each response, int64.
        finished_N: whether the response ended by itself, bool.

    Columns are read by name and axis, `batch["reward_N"]`, `batch["ref_logp_T"]`, `batch["weight_G"]`; float32.
    """

    def __init__(self, groups: Sequence[Group], device: torch.device | str | None = None) -> None:
        self.groups = list(groups)
        self.device = torch.device(device or "cpu")
        self.responses = [r for g in self.groups for r in g.responses]
        self.G, self.N = len(self.groups), len(self.responses)
        lengths = [r.loss_tokens for r in self.responses]
        self.T = sum(lengths)
        self.length_N = torch.tensor(lengths, dtype=torch.int64, device=self.device)
        self.response_T = segments(lengths, self.device)
        self.group_N = segments([len(g.responses) for g in self.groups], self.device)
        self.finished_N = torch.tensor([r.finished for r in self.responses], dtype=torch.bool, device=self.device)
        self._columns: dict[str, Tensor] = {}

    @cached_property
    def token_T(self) -> Tensor:
        ids = [r.token_ids[i] for r in self.responses for i in r.predicted]
        return torch.tensor(ids, dtype=torch.int64, device=self.device)

    def __contains__(self, name: str) -> bool:
        column, axis = self._parse(name)
        holders = self.groups if axis == "G" else self.responses
        return bool(holders) and all(column in h.columns for h in holders)

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._columns:
            self._columns[name] = self._build(name)
        return self._columns[name]

    @staticmethod
    def _parse(name: str) -> tuple[str, str]:
        column, _, axis = name.rpartition("_")
        if not column or axis not in ("T", "N", "G"):
            raise AlignlabError(f"a column is asked for by name and axis, as in 'reward_N'; got '{name}'")
        return column, axis

    def _build(self, name: str) -> Tensor:
        column, axis = self._parse(name)
        values: list[float] = []
        if axis == "G":
            for group in self.groups:
                values.append(self._value(group.columns, column, group.origin))
        else:
            for group in self.groups:
                for response in group.responses:
                    value = self._value(response.columns, column, group.origin)
                    if isinstance(value, list) != (axis == "T"):
                        raise AlignlabError(
                            f"column '{column}' is not one value per {'token' if axis == 'T' else 'response'}"
                        )
                    if isinstance(value, list):
                        if len(value) != response.loss_tokens:
                            raise AlignlabError(
                                f"{group.origin}: column '{column}' has {len(value)} values "
                                f"for {response.loss_tokens} loss-bearing tokens"
                            )
                        values.extend(value)
                    else:
                        values.append(value)
        return torch.tensor(values, dtype=torch.float32, device=self.device)

    @staticmethod
    def _value(columns: dict, column: str, origin: str):  # type: ignore[no-untyped-def]
        try:
            return columns[column]
        except KeyError:
            have = ", ".join(sorted(columns)) or "none"
            raise AlignlabError(
                f"{origin or 'a group'}: no column '{column}' (there are: {have}). A scorer must fill it in: "
                f"see `scoring` in the config."
            ) from None

    def fill(self, name: str, values: Tensor) -> None:
        """Write a column back to the groups or responses: `batch.fill("advantage_T", advantage_T)`."""
        column, axis = self._parse(name)
        found = values.detach().tolist()
        if axis == "T":
            start = 0
            for response in self.responses:
                response.columns[column] = found[start : start + response.loss_tokens]
                start += response.loss_tokens
        else:
            held = [g.columns for g in self.groups] if axis == "G" else [r.columns for r in self.responses]
            for columns, value in zip(held, found, strict=True):
                columns[column] = value  # type: ignore[index]
        self._columns.pop(name, None)

    @cached_property
    def pairs(self) -> Pairs:
        """All ordered pairs of one group in which one response is preferred to the other.

        The first of these columns that a group's responses have decides:

        * `lost_to`: the index within the group of the response that beat it in a tournament, -1 where none did; the
          pairs are those of the tournament, one less than there are responses;
        * `preference`, in groups of two: the probability that a response is preferred to its sibling; it gives order
          and certainty, and one of exactly 1/2 makes a pair too, since it says that the margin should be zero;
        * `score`, or else `reward`: higher is better; ties make no pair.

        A record's own response that was not compared with the sampled ones beside it takes no part.
        """
        winner, loser, probability, margin = [], [], [], []
        start = 0
        for group in self.groups:
            for first, second, p, gap in compared(group):
                winner.append(start + first)
                loser.append(start + second)
                probability.append(p)
                margin.append(gap)
            start += len(group.responses)
        return Pairs(
            torch.tensor(winner, dtype=torch.int64, device=self.device),
            torch.tensor(loser, dtype=torch.int64, device=self.device),
            torch.tensor(probability, dtype=torch.float32, device=self.device),
            torch.tensor(margin, dtype=torch.float32, device=self.device),
        )

    @cached_property
    def best_G(self) -> Tensor:
        """The best response of each group by the columns of `pairs`, as indices on axis N, int64, shape (G,); the
        first wins a tie."""
        found, start = [], 0
        for group in self.groups:
            found.append(start + best_response(group))
            start += len(group.responses)
        return torch.tensor(found, dtype=torch.int64, device=self.device)

    def count(self, unit: Unit) -> int:
        """How many of the unit this batch holds; what the global mean of a loss divides by (summed over ranks)."""
        if unit == "token":
            return self.T
        if unit == "response":
            return self.N
        return len(self.pairs) if unit == "pair" else self.G
