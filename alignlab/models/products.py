"""Matrix products by the fastest library at hand. Without gradients: for use inside functions that have their own."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

_ONEDNN: Any = getattr(torch.ops.mkldnn, "_linear_pointwise", None) if torch.backends.mkldnn.is_available() else None


def is_weight(layer: Any) -> bool:
    """Whether a layer is nothing but its weight and bias, which may be used without calling it."""
    return type(layer) is nn.Linear and not layer._forward_hooks and not layer._forward_pre_hooks


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x · weightᵀ + bias, as `torch.nn.functional.linear`.

    In float32 on CPUs oneDNN is about a tenth faster than the BLAS that PyTorch takes, and much faster where one of
    the sizes is that of a vocabulary. It takes transposed weights without copying them.
    """
    if _ONEDNN is None or x.dtype != torch.float32 or x.device.type != "cpu" or torch.is_autocast_enabled("cpu"):
        return F.linear(x, weight, bias)
    try:
        found: Tensor = _ONEDNN(x, weight, bias, "none", [], "")
    except RuntimeError as error:
        if "primitive" not in str(error):
            raise
        return F.linear(x, weight, bias)  # it has no room for its own code: the BLAS may, or says that memory is out
    return found
