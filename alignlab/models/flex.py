"""Attention of trunk and branches on a GPU: FlexAttention (Dong et al. 2024, arXiv:2412.05496), whose block mask skips
the blocks in which no token sees another."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor

from alignlab.models.packing import TRUNK, Rows


class FlexPlan:
    """The plan of a flat row: an `alignlab.models.attention.AttentionPlan`.

    Args:
        rows: in the flat layout.
        wanted: positions that are read from the last layer, ascending; None for all.
    """

    def __init__(self, rows: Rows, wanted: Tensor | None = None) -> None:
        from torch.nn.attention.flex_attention import create_block_mask

        self.wanted = wanted
        group, branch = rows.group_RL[0], rows.branch_RL[0]
        length = len(group)

        def allowed(_batch: Tensor, _head: Tensor, q: Tensor, k: Tensor) -> Tensor:
            same = (branch[k] == TRUNK) | (branch[q] == branch[k])
            return (q >= k) & (group[q] == group[k]) & same

        make = _compiled_mask() if group.device.type == "cuda" else create_block_mask
        self.mask = make(allowed, None, None, length, length, device=group.device)

    def attend(self, module: Any, query: Tensor, key: Tensor, value: Tensor, scaling: float | None) -> Tensor:
        from torch.nn.attention.flex_attention import flex_attention

        compute: Any = _compiled_attention() if query.device.type == "cuda" else flex_attention
        shared = query.shape[1] != key.shape[1]
        found: Tensor = compute(query, key, value, block_mask=self.mask, scale=scaling, enable_gqa=shared)
        return found.transpose(1, 2).contiguous()


@cache
def _compiled_attention() -> Any:
    """Uncompiled, FlexAttention makes the whole matrix of scores."""
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=True)


@cache
def _compiled_mask() -> Any:
    from torch.nn.attention.flex_attention import create_block_mask

    return torch.compile(create_block_mask, dynamic=True)
