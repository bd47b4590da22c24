"""Products of large weights with few rows, again and again, as sampling on a CPU makes them: a weight is laid out once
for oneDNN's kernel, which then reads it faster."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from alignlab.core.private_api import works
from alignlab.models.private_api import is_weight, laid_out, product_with_laid_out

LARGE = 1 << 22
"""Numbers in a weight, from which on reading it is what a product with few rows waits for."""

FEW = 128
"""Rows."""

PATIENCE = 16
"""Products after which a weight is laid out for the kernel once and for all, which costs as much as about 20 save."""


@contextmanager
def quick_products(network: nn.Module) -> Iterator[None]:
    """Plain linear layers multiply faster inside the context, on CPUs in float32. Without gradient; weights must stay
    what they are."""
    plain: list[Any] = [m for m in network.modules() if is_weight(m) and "forward" not in vars(m)]
    layers = [layer for layer in plain if _is_large(layer)]
    if layers and not works("laid-out weights"):
        layers = []
    try:
        for layer in layers:
            vars(layer)["forward"] = _Product(layer)
        yield
    finally:
        for layer in layers:
            vars(layer).pop("forward", None)


def _is_large(layer: nn.Linear) -> bool:
    weight = layer.weight
    return weight.dtype == torch.float32 and weight.device.type == "cpu" and weight.numel() >= LARGE


class _Product:
    """A layer's forward pass."""

    def __init__(self, layer: nn.Linear) -> None:
        self._layer, self._used = layer, 0
        self._weight: Tensor | None = None

    def __call__(self, input: Tensor) -> Tensor:
        layer, few = self._layer, 0 < input.numel() <= FEW * input.shape[-1]
        usable = few and input.dtype == torch.float32 and not torch.is_autocast_enabled("cpu")
        self._used += usable
        if usable and self._used == PATIENCE:
            self._weight = laid_out(layer.weight.detach(), PATIENCE)
        found = None
        if usable and self._weight is not None:
            found = product_with_laid_out(input, self._weight, layer.bias)
        return F.linear(input, layer.weight, layer.bias) if found is None else found
