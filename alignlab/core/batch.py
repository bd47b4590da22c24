"""A batch of groups as flat tensors: the only form in which an algorithm sees data. There is no padding in it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import accumulate
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from alignlab.core.errors import AlignlabError
from alignlab.core.group import Group, is_per_token, joined
from alignlab.core.order import best_response, compared
from alignlab.core.ragged import segment_mean, segment_sum, segments

Unit = Literal["token", "response", "pair", "group"]
"""What a loss is a mean over: the loss-bearing tokens, responses, preference pairs or groups of the global batch. The
number of processes and micro-batches makes no difference."""


@dataclass(frozen=True)
class Pairs:
    """Preference pairs of a batch.

    Attributes:
        winner_P, loser_P: the two responses, as indices on axis N, int64.
        group_P: the group that they belong to, as an index on axis G, int64.
        probability_P: probability that the winner is preferred, in [0.5, 1]; 1 if the label is certain.
        margin_P: how much better the winner is: the difference of the scores, or of the preferences if there are no
            scores.
    """

    winner_P: Tensor
    loser_P: Tensor
    group_P: Tensor
    probability_P: Tensor
    margin_P: Tensor

    def __len__(self) -> int:
        return len(self.winner_P)

    def difference(self, x_N: Tensor) -> Tensor:
        """x of the winner minus x of the loser, shape (P,)."""
        return x_N[self.winner_P] - x_N[self.loser_P]


class Batch:
    """Groups laid out flat.

    Columns are read by name and axis: `batch["reward_N"]`, `batch["ref_logp_T"]`, `batch["weight_G"]`; float32.
    `"reward_N" in batch` tells whether all responses have the column.

    Attributes:
        groups: the groups themselves.
        T, N, G: number of loss-bearing response tokens, responses and groups.
        response_T: the response of each loss-bearing token, as an index on axis N, int64.
        group_N: the group of each response, as an index on axis G, int64.
        token_T: ids of the loss-bearing tokens, int64.
        length_N: number of loss-bearing tokens of each response, int64.
        finished_N: whether the response ended by itself (not at the length limit), bool.
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

    def sum(self, x_T: Tensor) -> Tensor:
        """Sum over the loss-bearing tokens of each response, shape (N,); 0 for a response without any."""
        return segment_sum(x_T, self.response_T, self.N)

    def mean(self, x_T: Tensor) -> Tensor:
        """Mean over the loss-bearing tokens of each response, shape (N,); 0 for a response without any."""
        return segment_mean(x_T, self.response_T, self.N)

    @cached_property
    def token_T(self) -> Tensor:
        ids = joined([r.token_ids for r in self.responses])
        if any(r.loss_mask is not None for r in self.responses):
            masks = [r.loss_mask or [True] * len(r.token_ids) for r in self.responses]
            ids = ids[joined(masks).astype(bool)]
        return torch.tensor(ids, device=self.device)

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
            raise AlignlabError(f"'{name}': a column is read by name and axis, as in 'reward_N' or 'ref_logp_T'")
        return column, axis

    def _build(self, name: str) -> Tensor:
        column, axis = self._parse(name)
        if axis == "G":
            values = [self._number(self._value(g.columns, column, g.place), column, g.place) for g in self.groups]
            return torch.tensor(values, dtype=torch.float32, device=self.device)
        found = []
        for group in self.groups:
            for response in group.responses:
                value = self._value(response.columns, column, group.place)
                if is_per_token(value) != (axis == "T"):
                    have, want = ("list", "number") if axis == "N" else ("number", "list")
                    raise AlignlabError(
                        f"{group.place}: column '{column}' is a {have} for each response; '{name}' needs a {want}"
                    )
                if axis == "T" and len(value) != response.loss_tokens:
                    raise AlignlabError(
                        f"{group.place}: column '{column}' has {len(value)} values "
                        f"for {response.loss_tokens} loss-bearing tokens"
                    )
                found.append(self._number(value, column, group.place))
        if axis == "T":
            return torch.tensor(np.concatenate(found) if found else np.zeros(0, np.float32), device=self.device)
        return torch.tensor(found, dtype=torch.float32, device=self.device)

    @staticmethod
    def _value(columns: dict, column: str, place: str):  # type: ignore[no-untyped-def]
        try:
            return columns[column]
        except KeyError:
            have = ", ".join(sorted(columns)) or "none"
            raise AlignlabError(
                f"{place}: no column '{column}' (there are: {have}). A scorer must fill it for every response: "
                "scoring=…"
            ) from None

    @staticmethod
    def _number(value: Any, column: str, place: str) -> Any:
        """A column's value as float32: a number, or an array of them."""
        try:
            return np.asarray(value, np.float32) if is_per_token(value) else float(value)
        except (TypeError, ValueError):
            raise AlignlabError(f"{place}: the column '{column}' is {value!r}: a number is wanted") from None

    def fill(self, name: str, values: Tensor) -> None:
        """Write a column to the groups or responses: `batch.fill("advantage_T", advantage_T)`. It has no gradient."""
        column, axis = self._parse(name)
        if axis == "T":
            lengths = [r.loss_tokens for r in self.responses]
            parts = np.split(values.detach().cpu().numpy().copy(), np.cumsum(lengths)[:-1]) if lengths else []
            for response, part in zip(self.responses, parts, strict=True):
                response.columns[column] = part
        else:
            found = values.detach().tolist()
            held = [g.columns for g in self.groups] if axis == "G" else [r.columns for r in self.responses]
            for columns, value in zip(held, found, strict=True):
                columns[column] = value  # type: ignore[index]
        self._columns.pop(name, None)

    @cached_property
    def pairs(self) -> Pairs:
        """All pairs of responses of one group in which one is preferred to the other.

        One column decides the order, the first of these that the responses of a group have:

        * `lost_to`: in a tournament, the response that beat this one, as an index within the group; -1 for the
          champion. The pairs are those of the tournament: one fewer than responses.
        * `preference`, in groups of two: the probability that a response is preferred to its sibling. A preference of
          exactly 1/2 makes a pair too: its margin should be zero.
        * `score`, or else `reward`: higher is better. Equal values make no pair.

        A record's own response is left out if it was not scored like the sampled ones beside it.
        """
        found = [
            (start + winner, start + loser, g, probability, margin)
            for g, (group, start) in enumerate(zip(self.groups, self._starts(), strict=True))
            for winner, loser, probability, margin in compared(group)
        ]
        winner, loser, group_index, probability, margin = zip(*found, strict=True) if found else ((),) * 5
        index = partial(torch.tensor, dtype=torch.int64, device=self.device)
        value = partial(torch.tensor, dtype=torch.float32, device=self.device)
        return Pairs(index(winner), index(loser), index(group_index), value(probability), value(margin))

    @cached_property
    def best_G(self) -> Tensor:
        """The best response of each group by the columns of `pairs`, as indices on axis N, int64, shape (G,). The
        first one wins a tie."""
        return self.one_each(best_response)

    def one_each(self, choose: Callable[[Group], int]) -> Tensor:
        """One response of each group, as indices on axis N, int64, shape (G,).

        Args:
            choose: the index within the group of the response that is wanted.
        """
        found = [start + choose(group) for group, start in zip(self.groups, self._starts(), strict=True)]
        return torch.tensor(found, dtype=torch.int64, device=self.device)

    def _starts(self) -> list[int]:
        """Index on axis N of each group's first response, shape (G,)."""
        return [0, *accumulate(len(g.responses) for g in self.groups)][: self.G]

    def count(self, unit: Unit) -> int:
        """How many of the unit there are in this batch."""
        if unit == "token":
            return self.T
        if unit == "response":
            return self.N
        return len(self.pairs) if unit == "pair" else self.G
