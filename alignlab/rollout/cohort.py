"""Keys and values of rows that were begun together: each prompt's once, each row's own tokens in place.

The rows of one prompt attend to it together, as several queries of one sequence: a matrix product in place of as many
products with vectors (shared-prefix attention: Juravsky et al. 2024, arXiv:2402.05099). What they see of it and what
they see of their own tokens is joined by the log-sum-exps of the two.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from alignlab.models.attention import FlexPlan, path
from alignlab.models.packing import TRUNK
from alignlab.models.private_api import cpu_attention
from alignlab.rollout.batching import Space


@dataclass(slots=True)
class Layer:
    """Keys and values of one attention layer.

    Attributes:
        trunk_key, trunk_value: of prompts, shape (T, H', P, d).
        own_key, own_value: of tokens drawn, shape (R, H', C, d), of which the first `Cohort.length` are there.
    """

    trunk_key: Tensor
    trunk_value: Tensor
    own_key: Tensor
    own_value: Tensor


class Cohort:
    """Rows that have equally many tokens of their own. As a plan it is the pass that reads the prompts.

    Args:
        lengths: of the prompts.
        counts: rows of each prompt.
        room: tokens that a row may still get.
        few_shapes: keep all tensors at their full size, rounded up, and mask what is not there: for a compiled step.

    Attributes:
        rows: which prompt each row has.
        length: tokens of its own that each row has.
        space: what is kept.
    """

    def __init__(
        self, lengths: Sequence[int], counts: Sequence[int], room: int, device: torch.device, few_shapes: bool = False
    ) -> None:
        self.device = device
        self.lengths = list(lengths)
        self.rows = [prompt for prompt, count in enumerate(counts) for _ in range(count)]
        self.length = 0
        self._few_shapes = few_shapes
        self.space = self._rounded(Space(len(self.lengths), max(self.lengths), len(self.rows), room))
        self._layers: dict[int, Layer] = {}
        self._reads = self._flex_plan() if path(device) == "flex" else None
        self._arrange()

    def _flex_plan(self) -> FlexPlan:
        """How GPUs read the prompts: all at once, each a trunk without branches."""
        lengths = torch.tensor(self.lengths)
        group = torch.arange(len(lengths)).repeat_interleave(lengths, output_size=sum(self.lengths)).to(self.device)
        return FlexPlan(group, torch.full_like(group, TRUNK))

    def _rounded(self, space: Space) -> Space:
        return space.rounded() if self._few_shapes else space

    @property
    def needed(self) -> Space:
        """For the rows that are left."""
        return self._rounded(replace(self.space, contexts=len(self.lengths), rows=len(self.rows)))

    @property
    def contexts(self) -> list[int]:
        """The length of each row's prompt."""
        return [self.lengths[prompt] for prompt in self.rows]

    def attend(self, module: Any, query: Tensor, key: Tensor, value: Tensor, scaling: float | None) -> Tensor:
        """The prompts' own attention, one after the other in a varlen row; see `AttentionPlan.attend`."""
        key_, value_ = self._stacked(key[0]), self._stacked(value[0])
        own = (self.space.rows, key.shape[1], self.space.room)
        empty = torch.zeros if self._few_shapes else torch.empty  # what is masked must be finite all the same
        own_key, own_value = (empty((*own, x.shape[-1]), dtype=x.dtype, device=x.device) for x in (key, value))
        self._layers[module.layer_idx] = Layer(key_, value_, own_key, own_value)
        if self._reads is not None:
            return self._reads.attend(module, query, key, value, scaling)
        heads, shared = query.shape[1], query.shape[1] != key.shape[1]
        out = value.new_empty(query.shape[2], heads, value.shape[-1])
        start = first = 0
        while first < len(self.lengths):  # prompts of one length, which follow each other, at once
            length = self.lengths[first]
            same = next((i for i in range(first, len(self.lengths)) if self.lengths[i] != length), len(self.lengths))
            count, end = same - first, start + (same - first) * length
            found = scaled_dot_product_attention(
                query[0, :, start:end].unflatten(1, (count, length)).transpose(0, 1),
                key_[first:same, :, :length],
                value_[first:same, :, :length],
                is_causal=True,
                scale=scaling,
                enable_gqa=shared,
            )
            out[start:end] = found.transpose(1, 2).flatten(0, 1)
            start, first = end, same
        return out[None]

    def step(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scaling: float | None) -> Tensor:
        """Attention of one new token of each row.

        Args:
            query, key, value: shape (R, H, d), (R, H', d), (R, H', d).

        Returns:
            shape (R, H, d).
        """
        at, rows, last = self._layers[layer], len(self.rows), self.length
        at.own_key[:rows, :, last] = key
        at.own_value[:rows, :, last] = value
        own = at.own_key[:rows, :, : last + 1], at.own_value[:rows, :, : last + 1]
        prompts = len(self.lengths)
        trunk = at.trunk_key[:prompts], at.trunk_value[:prompts]
        return attend_to_both(query, own, trunk, self._grid, self._place, scaling, trunk_bias=self._bias)

    def masked_step(self) -> MaskedStep:
        """The same as a plan for all places at once, whether there is a row or not."""
        beyond = torch.arange(self.space.room, device=self.device) > self.length
        bias = torch.zeros(beyond.shape, device=self.device).masked_fill_(beyond, -math.inf)[None, None, None]
        assert self._grid is not None and self._place is not None and self._bias is not None
        last = torch.tensor([self.length], device=self.device)
        return MaskedStep(self._layers, self._grid, self._place, self._bias, bias, last)

    def retain(self, going: Sequence[int]) -> list[int]:
        """Let the other rows go.

        Returns:
            The rows that go on, in their new order: the last take the places of those that left.
        """
        if not going:
            self.rows, self.lengths, self._layers = [], [], {}
            return []
        order, moved, holes = _close(going, len(self.rows))
        alive = sorted({self.rows[i] for i in going})
        prompts, moved_prompts, prompt_holes = _close(alive, len(self.lengths))
        number = {prompt: place for place, prompt in enumerate(prompts)}
        self.rows = [number[self.rows[i]] for i in order]
        self.lengths = [self.lengths[i] for i in prompts]
        used = self.length
        from_, to = torch.tensor(moved, device=self.device), torch.tensor(holes, device=self.device)
        from_prompt, to_prompt = (torch.tensor(x, device=self.device) for x in (moved_prompts, prompt_holes))
        for layer in self._layers.values():
            for own in (layer.own_key, layer.own_value) if moved else ():
                own[to, :, :used] = own[from_, :, :used]
            for trunk in (layer.trunk_key, layer.trunk_value) if moved_prompts else ():
                trunk[to_prompt] = trunk[from_prompt]
        if 2 * self.needed.rows <= self.space.rows or 2 * self.needed.contexts <= self.space.contexts:
            self.compact()
        self._arrange()
        return order

    def compact(self) -> None:
        """Give back what is not needed."""
        if self.needed == self.space:
            return
        prompts, rows = self.needed.contexts, self.needed.rows
        for layer in self._layers.values():
            layer.trunk_key, layer.trunk_value = layer.trunk_key[:prompts].clone(), layer.trunk_value[:prompts].clone()
            layer.own_key, layer.own_value = layer.own_key[:rows].clone(), layer.own_value[:rows].clone()
        self.space = self.needed
        self._arrange()

    def _arrange(self) -> None:
        """Which rows ask which prompt: a table of prompts × rows, where rows that are missing are any."""
        places: list[list[int]] = [[] for _ in self.lengths]
        for row, prompt in enumerate(self.rows):
            places[prompt].append(row)
        widest, lengths, rows = max(map(len, places), default=0), self.lengths, len(self.rows)
        if self._few_shapes:
            widest = 1 << (widest - 1).bit_length()
            missing = self.space.contexts - len(lengths)
            places, lengths, rows = places + [[0]] * missing, lengths + [1] * missing, self.space.rows
        table = [row for some in places for row in [*some, *[some[0]] * (widest - len(some))]]
        self._grid = self._place = self._bias = None
        if self._few_shapes or table != list(range(rows)):
            place = {row: i for i, row in reversed(list(enumerate(table)))}
            self._grid = torch.tensor(table, device=self.device)
            self._place = torch.tensor([place.get(row, 0) for row in range(rows)], device=self.device)
        if self._few_shapes or min(lengths, default=0) < self.space.longest:
            beyond = (
                torch.arange(self.space.longest, device=self.device)
                >= torch.tensor(lengths, device=self.device)[:, None]
            )
            bias = torch.zeros(beyond.shape, device=self.device).masked_fill_(beyond, -math.inf)
            self._bias = bias[:, None, None]

    def _stacked(self, flat: Tensor) -> Tensor:
        """(H', sum of lengths, d) as (T, H', P, d), padded with zeros."""
        longest = self.space.longest
        if min(self.lengths) == longest and self.space.contexts == len(self.lengths):
            return flat.unflatten(1, (-1, longest)).transpose(0, 1).contiguous()
        stacked = flat.new_zeros(self.space.contexts, flat.shape[0], longest, flat.shape[-1])
        for place, part in zip(stacked, flat.split(self.lengths, 1), strict=False):
            place[:, : part.shape[1]] = part
        return stacked


class MaskedStep:
    """A step of a cohort with few shapes; see `Cohort.masked_step`. Nothing in it but tensors changes from step to
    step: a compiled pass stays good."""

    def __init__(
        self, layers: dict[int, Layer], grid: Tensor, place: Tensor, trunk_bias: Tensor, own_bias: Tensor, last: Tensor
    ) -> None:
        self.layers, self.grid, self.place, self.last = layers, grid, place, last
        self.trunk_bias, self.own_bias = trunk_bias, own_bias

    def attend(self, module: Any, query: Tensor, key: Tensor, value: Tensor, scaling: float | None) -> Tensor:
        """See `AttentionPlan.attend`."""
        at = self.layers[module.layer_idx]
        query, key, value = (x[0].transpose(0, 1) for x in (query, key, value))
        at.own_key.index_copy_(2, self.last, key[:, :, None])
        at.own_value.index_copy_(2, self.last, value[:, :, None])
        own, trunk = (at.own_key, at.own_value), (at.trunk_key, at.trunk_value)
        biases = {"own_bias": self.own_bias, "trunk_bias": self.trunk_bias}
        return attend_to_both(query, own, trunk, self.grid, self.place, scaling, **biases)[None]


def attend_to_both(
    query: Tensor,
    own: tuple[Tensor, Tensor],
    trunk: tuple[Tensor, Tensor],
    grid: Tensor | None,
    place: Tensor | None,
    scaling: float | None,
    own_bias: Tensor | None = None,
    trunk_bias: Tensor | None = None,
) -> Tensor:
    """Attention of R tokens, one of each row, to the row's own tokens and to its prompt.

    Args:
        query: shape (R, H, d).
        own: keys and values, shape (R, H', C, d).
        trunk: likewise, shape (T, H', P, d).
        grid: the rows that ask the first prompt, then those that ask the second, equally many of each; None where
            these are all rows in order.
        place: where in the grid each row is.
        own_bias, trunk_bias: added to the scores, shape (1 or R, 1, 1, C) and (T, 1, 1, P).

    Returns:
        shape (R, H, d).
    """
    query = query.unflatten(1, (own[0].shape[1], -1))  # (R, H', g, d): g heads share keys
    out, weight = _attend(query, *own, scaling, own_bias)
    asked = (query if grid is None else query[grid]).unflatten(0, (trunk[0].shape[0], -1)).transpose(1, 2)
    found, found_weight = _attend(asked.flatten(2, 3), *trunk, scaling, trunk_bias)  # (T, H', n·g, d)
    found = found.unflatten(2, asked.shape[2:4]).transpose(1, 2).flatten(0, 1)
    found_weight = found_weight.unflatten(2, asked.shape[2:4]).transpose(1, 2).flatten(0, 1)
    if place is not None:
        found, found_weight = found[place], found_weight[place]
    share = torch.sigmoid(found_weight - weight).to(out.dtype)[..., None]
    return torch.lerp(out, found, share).flatten(1, 2)


def _attend(
    query: Tensor, key: Tensor, value: Tensor, scaling: float | None, bias: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Attention without causality.

    Args:
        query, key, value: shape (B, H', Q, d), (B, H', K, d), (B, H', K, d).
        bias: added to the scores, shape (B, 1, 1, K).

    Returns:
        shape (B, H', Q, d), and the log-sum-exps of the scores, shape (B, H', Q).
    """
    if path(query.device) != "segments":
        return attend_by_scores(query, key, value, scaling, bias)
    bias = None if bias is None else bias.to(query.dtype)
    return cpu_attention(query, key, value, False, scaling, bias)


def attend_by_scores(
    query: Tensor, key: Tensor, value: Tensor, scaling: float | None, bias: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The same by its definition, with the softmax in float32: queries are few here."""
    factor = 1 / math.sqrt(query.shape[-1]) if scaling is None else scaling
    score = torch.matmul(query * factor, key.transpose(-1, -2)).to(torch.promote_types(query.dtype, torch.float32))
    if bias is not None:
        score = score + bias
    total = score.logsumexp(-1)
    return torch.matmul((score - total[..., None]).exp().to(value.dtype), value), total


def _close(going: Sequence[int], count: int) -> tuple[list[int], list[int], list[int]]:
    """Which of `count` places stay, in their new order; which of them are moved, and to which places."""
    staying = set(going)
    order = list(range(len(going)))
    holes = [i for i in order if i not in staying]
    moved = [i for i in range(len(going), count) if i in staying]
    for hole, other in zip(holes, moved, strict=True):
        order[hole] = other
    return order, moved, holes
