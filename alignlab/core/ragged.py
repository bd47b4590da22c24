"""Operations on ragged tensors: a flat vector of items and, for each item, the index of its segment.

`segment_sum(logp_T, response_T, N)` turns log-probs of tokens into log-probs of responses. All functions are
differentiable in their first argument, deterministic on CPU, and accept empty segments.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def segment_sum(values: Tensor, segment: Tensor, count: int) -> Tensor:
    """Sum of each segment, shape (count,); 0 for an empty one. `segment` holds int64 indices in [0, count)."""
    return values.new_zeros(count).index_add(0, segment, values)


def segment_count(segment: Tensor, count: int) -> Tensor:
    """Number of items in each segment, int64, shape (count,)."""
    one = torch.ones((), dtype=torch.int64, device=segment.device)
    return one.new_zeros(count).index_add(0, segment, one.expand_as(segment))


def segment_mean(values: Tensor, segment: Tensor, count: int) -> Tensor:
    """Mean of each segment, shape (count,); 0 for an empty one."""
    return segment_sum(values, segment, count) / segment_count(segment, count).clamp(min=1)


def segment_max(values: Tensor, segment: Tensor, count: int) -> Tensor:
    """Maximum of each segment, shape (count,); -inf for an empty one."""
    return values.new_full((count,), float("-inf")).scatter_reduce(0, segment, values, "amax")


def segment_std(values: Tensor, segment: Tensor, count: int) -> Tensor:
    """Standard deviation of each segment with Bessel's correction, shape (count,); 0 for fewer than two items."""
    centred = values - segment_mean(values, segment, count)[segment]
    freedom = (segment_count(segment, count) - 1).clamp(min=1)
    variance = segment_sum(centred * centred, segment, count) / freedom
    spread = variance > 0  # the gradient of a root at 0 is infinite; here it is 0
    return torch.where(spread, torch.where(spread, variance, 1.0).sqrt(), 0.0)


def segments(lengths: Sequence[int] | Tensor, device: torch.device | str | None = None) -> Tensor:
    """Index of each item's segment, from the lengths of the segments: `segments([2, 0, 1])` is `[0, 0, 2]`, int64."""
    total = None if isinstance(lengths, Tensor) else sum(lengths)
    lengths = torch.as_tensor(lengths, dtype=torch.int64)
    found = torch.repeat_interleave(torch.arange(len(lengths), device=lengths.device), lengths, output_size=total)
    return found if device is None else found.to(device)  # made here: a device would be waited for, to know its size
