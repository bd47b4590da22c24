"""Matrix products by the fastest library at hand. Without gradients: for use inside functions that have their own."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

_ONEDNN: Any = getattr(torch.ops.mkldnn, "_linear_pointwise", None) if torch.backends.mkldnn.is_available() else None

WIDE = 512
"""Outputs from which on a product is worth a copy of its input, to have an even number of rows."""


def step(rows: int) -> int:
    """Numbers of rows that oneDNN is given are multiples of this: of 16, above 512 sixteen for each doubling.

    For every new number it makes code, which takes a millisecond and memory that it never gives back (0.3 MB): with
    the rows of a run as they come, a gigabyte.
    """
    return 1 << max(rows - 1, 256).bit_length() - 5


def even(rows: int) -> int:
    """The least such number from this one on."""
    return -(-rows // step(rows)) * step(rows)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x · weightᵀ + bias, as `torch.nn.functional.linear`.

    In float32 on CPUs oneDNN is about a tenth faster than the BLAS that PyTorch takes, and twice as fast where one of
    the sizes is that of a vocabulary. It takes transposed weights without copying them.

    Args:
        weight: may be one that oneDNN has laid out for itself.
    """
    if _ONEDNN is None or x.dtype != torch.float32 or x.device.type != "cpu" or torch.is_autocast_enabled("cpu"):
        return F.linear(x, weight, bias)
    rows = x.numel() // x.shape[-1]
    padding = even(rows) - rows
    if padding and weight.shape[0] < WIDE and not weight.is_mkldnn:
        return F.linear(x, weight, bias)
    try:
        if not padding:
            found: Tensor = _ONEDNN(x, weight, bias, "none", [], "")
            return found
        padded = F.pad(x.reshape(rows, -1), (0, 0, 0, padding))
        return _ONEDNN(padded, weight, bias, "none", [], "")[:rows].view(*x.shape[:-1], -1)  # type: ignore[no-any-return]
    except RuntimeError as error:
        if "primitive" not in str(error):
            raise
        # It has no room for its own code: the BLAS may, or says that memory is out.
        return F.linear(x, weight.to_dense() if weight.is_mkldnn else weight, bias)
