"""Shared-prefix packing: groups laid out in rows of tokens, each prompt once (the trunk), then its responses (the
branches).

A token attends to its own prompt and to the earlier tokens of its own response, never to a sibling. Positions restart
at the end of the prompt for each response. The first token of each response is predicted from the last token of the
prompt. A group costs P + ΣC tokens instead of K·P + ΣC. There are three layouts:

* `varlen`: all groups follow each other in one row of variable length, without padding and without a mask;
* `packed`: groups share rows of equal length, behind a mask of all pairs;
* `plain`: a right-padded row for each response, for models that cannot be masked so (see `alignlab.models.probe`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from heapq import heapreplace
from itertools import accumulate
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from alignlab.core import Group
from alignlab.core.group import joined

Layout = Literal["varlen", "packed", "plain"]

PADDING = -1
TRUNK = 0


@dataclass(frozen=True)
class Span:
    """Where a group is in a varlen row: its trunk from `start`, then its branches, each as long as this."""

    start: int
    trunk: int
    branches: tuple[int, ...]


@dataclass
class Rows:
    """A micro-batch as the model sees it: R rows of L tokens, and where in them to look.

    Attributes:
        input_ids_RL, position_RL: token ids and position ids, int64, shape (R, L).
        group_RL: which group (or, in the plain layout, which response) a token belongs to, -1 for padding.
        branch_RL: 0 for a token of the prompt, k >= 1 for the k-th response of its group.
        predict_T: flat index in [0, R·L) of the position that predicts each loss-bearing token.
        place_T: flat index of the loss-bearing token itself.
        target_T: its token id.
        last_N: flat index of the last token of each response.
        layout: whether attention goes over `spans`, through the trunk-and-branches mask, or is plainly causal.
        tokens: real tokens, padding not counted.
        spans: of a varlen row, the groups in it.
    """

    input_ids_RL: Tensor
    position_RL: Tensor
    group_RL: Tensor
    branch_RL: Tensor
    predict_T: Tensor
    place_T: Tensor
    target_T: Tensor
    last_N: Tensor
    layout: Layout
    tokens: int
    spans: tuple[Span, ...] = ()

    def to(self, device: torch.device | str) -> Rows:
        held = {f.name: getattr(self, f.name) for f in fields(self)}
        moved: dict[str, Any] = {k: v.to(device) for k, v in held.items() if isinstance(v, Tensor)}
        return replace(self, **moved)

    def attention(self, window: int | None = None) -> Tensor:
        """Which position (last axis) each position may attend to, bool, shape (R, 1, L, L).

        Args:
            window: sliding-window size in positions: a token sees only keys fewer than `window` positions back.
        """
        group, branch = self.group_RL, self.branch_RL
        length = group.shape[1]
        index = torch.arange(length, device=group.device)
        allowed = index[None, :, None] >= index[None, None, :]
        allowed = allowed & (group[:, :, None] == group[:, None, :])
        allowed &= (branch[:, None, :] == TRUNK) | (branch[:, :, None] == branch[:, None, :])
        if window is not None:
            allowed &= self.position_RL[:, :, None] - self.position_RL[:, None, :] < window
        # Padding attends to itself at least, so that no softmax is over nothing.
        return (allowed | (index[:, None] == index[None, :])).unsqueeze(1)


def group_cost(group: Group, layout: Layout) -> int:
    """Length of the longest row that the group needs."""
    if layout != "plain":
        return group.packed_length
    return len(group.prompt_ids) + max((len(r.token_ids) for r in group.responses), default=0)


def micro_batches(
    groups: Sequence[Group], max_tokens_per_microbatch: int, layout: Layout = "packed"
) -> list[list[int]]:
    """Divide groups into micro-batches of at most `max_tokens_per_microbatch` tokens, padding counted, like
    lengths together.

    Returns lists of indices into `groups`; every index once. A group longer than the budget gets a micro-batch of
    its own: a group is never cut, since losses compare its responses.
    """
    costs = [group_cost(g, layout) for g in groups]
    if layout == "varlen":
        return _fill_varlen(costs, max_tokens_per_microbatch)
    order = sorted(range(len(groups)), key=lambda i: (-costs[i], i))
    batches: list[list[int]] = []
    free: list[int] = []  # room left in each row of the micro-batch being filled
    length = 0
    for i in order:
        cost = costs[i]
        rows = 1 if layout == "packed" else len(groups[i].responses)
        if layout == "packed":
            row = next((r for r, room in enumerate(free) if room >= cost), None)
            if row is not None and batches:
                free[row] -= cost
                batches[-1].append(i)
                continue
        if not batches or (len(free) + rows) * length > max_tokens_per_microbatch:
            batches.append([])
            free, length = [], cost
        free.extend([length - cost] * rows)
        batches[-1].append(i)
    return batches


def _fill_varlen(costs: Sequence[int], max_tokens_per_microbatch: int) -> list[list[int]]:
    """Items in micro-batches of at most `max_tokens_per_microbatch`, about equally full: the longest first, each into
    the emptiest of as few micro-batches as there must be, or of one more where that fails."""
    order = sorted(range(len(costs)), key=lambda i: (-costs[i], i))
    alone = sum(2 * cost > max_tokens_per_microbatch for cost in costs)  # no two of these share a micro-batch
    count = max(-(-sum(costs) // max_tokens_per_microbatch), alone, 1)
    while True:
        batches: list[list[int]] = [[] for _ in range(count)]
        emptiest = [(0, b) for b in range(count)]
        for i in order:
            used, place = emptiest[0]
            if used and used + costs[i] > max_tokens_per_microbatch:
                break
            heapreplace(emptiest, (used + costs[i], place))
            batches[place].append(i)
        else:
            return [batch for batch in batches if batch]
        count += 1


def lay_out(
    groups: Sequence[Group], layout: Layout = "packed", pad_id: int = 0, score_skips: int | None = None
) -> Rows:
    """Lay groups out in rows. The axes T and N are in the order of the groups given, as in `Batch`.

    Args:
        layout: see the module's docstring.
        pad_id: token id of the padding at the end of rows.
        score_skips: `last_N` is the last token that is not this one: of the response, or, where it has no other, of
            the prompt. Transformers' sequence classifiers take the last token that is not their pad token, which for
            some models is the end token.
    """
    if layout != "plain":
        units = [(g, list(range(len(g.responses)))) for g in groups]
    else:
        units = [(g, [k]) for g in groups for k in range(len(g.responses))]
    lengths = [len(g.prompt_ids) + sum(len(g.responses[k].token_ids) for k in ks) for g, ks in units]
    row_length = max(1, sum(lengths)) if layout == "varlen" else max(lengths, default=1)
    if layout == "varlen":
        start = list(accumulate(lengths, initial=0))[:-1]
    else:
        start = _place(lengths, row_length, stack=layout == "packed")
    size = (max((s // row_length for s in start), default=0) + 1) * row_length

    # Axis S: the pieces, each trunk followed by its branches. Axis C: all of their tokens.
    pieces: list[Sequence[int]] = []
    masks: dict[int, list[bool]] = {}
    starts, trunks, owners = [], [], []
    for unit, ((g, ks), at) in enumerate(zip(units, start, strict=True)):
        trunk = len(pieces)
        for tokens in (g.prompt_ids, *(g.responses[k].token_ids for k in ks)):
            pieces.append(tokens)
            starts.append(at)
            trunks.append(trunk)
            owners.append(unit)
            at += len(tokens)
        masks |= {trunk + 1 + n: mask for n, k in enumerate(ks) if (mask := g.responses[k].loss_mask) is not None}
    start_S, trunk_S, unit_S = (np.array(values, np.int64) for values in (starts, trunks, owners))
    length_S = np.array([*map(len, pieces)], np.int64)
    begin_S = length_S.cumsum() - length_S  # on axis C
    branch_S = np.arange(len(pieces)) - trunk_S
    first_S = np.where(branch_S > 0, length_S[trunk_S], 0)
    token_C, piece_C = joined(pieces), np.arange(len(pieces)).repeat(length_S)
    within_C = np.arange(len(token_C)) - begin_S[piece_C]
    place_C = start_S[piece_C] + within_C

    def grid(fill: int, values_C: np.ndarray) -> Tensor:
        filled = np.full(size, fill)
        filled[place_C] = values_C
        return torch.tensor(filled).view(-1, row_length)

    bears_C = (branch_S > 0)[piece_C]
    for s, mask in masks.items():
        bears_C[begin_S[s] : begin_S[s] + length_S[s]] = mask
    trunk_end_S = start_S[trunk_S] + length_S[trunk_S] - 1
    predict_C = np.where(within_C > 0, place_C - 1, trunk_end_S[piece_C])
    counts_C = np.ones(len(token_C), bool) if score_skips is None else token_C != score_skips
    last_S = np.full(len(pieces), -1)  # of the tokens that count, within the piece; -1: none does
    np.maximum.at(last_S, piece_C[counts_C], within_C[counts_C])
    of_trunk_S = start_S[trunk_S] + last_S[trunk_S].clip(0)
    last_S = np.where(last_S < 0, of_trunk_S, start_S + last_S)
    return Rows(
        grid(pad_id, token_C),
        grid(0, first_S[piece_C] + within_C),
        grid(PADDING, unit_S[piece_C]),
        grid(TRUNK, branch_S[piece_C]),
        torch.tensor(predict_C[bears_C]),
        torch.tensor(place_C[bears_C]),
        torch.tensor(token_C[bears_C]),
        torch.tensor(last_S[branch_S > 0]),
        layout,
        len(token_C),
        tuple(
            Span(at, len(g.prompt_ids), tuple(len(r.token_ids) for r in g.responses))
            for (g, _), at in zip(units, start, strict=True)
        )
        if layout == "varlen"
        else (),
    )


def _place(lengths: Sequence[int], row_length: int, stack: bool) -> list[int]:
    """Flat start of each unit: first fit by descending length where rows may hold several, else a row each."""
    if not stack:
        return [row_length * i for i in range(len(lengths))]
    start = [0] * len(lengths)
    used: list[int] = []
    for i in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        row = next((r for r, u in enumerate(used) if u + lengths[i] <= row_length), None)
        if row is None:
            used.append(0)
            row = len(used) - 1
        start[i] = row * row_length + used[row]
        used[row] += lengths[i]
    return start
