"""Linear maps held in few bits, as shapes alone: bytes, and what a pass makes of them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

NF4_BLOCK, NF4_BLOCKS_OF_CONSTANTS = 64, 256
"""Numbers that share a constant, and constants that share a second one (Dettmers et al. 2023, arXiv:2305.14314)."""


def nf4_bytes(double: bool = True) -> float:
    """Bytes for each number in NF4: half a byte, and its share of a block's constant, in 32 bits; or, quantised once
    more, in 8 bits with a 32-bit constant for 256 of them: 0.127 bits (QLoRA, section 3)."""
    constant = 1 + 4 / NF4_BLOCKS_OF_CONSTANTS if double else 4
    return 0.5 + constant / NF4_BLOCK


class _Dequantised(torch.autograd.Function):
    """x·Wᵀ where W exists only while it is used, forward and backward, as in bitsandbytes; in 8 bits it keeps x."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, keeps_input: bool) -> Tensor:
        ctx.save_for_backward(weight, *((x,) if keeps_input else ()))
        return x @ torch.empty_like(weight, dtype=x.dtype).t()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        weight = ctx.saved_tensors[0]
        return gradient @ torch.empty_like(weight, dtype=gradient.dtype), None, None


class _QuantisedLinear(nn.Linear):
    """A linear map in few bits. One in 4 bits casts what it reads to the precision of its products, and back."""

    compute: torch.dtype | None

    def forward(self, x: Tensor) -> Tensor:
        y = _Dequantised.apply(x if self.compute is None else x.to(self.compute), self.weight, self.compute is None)
        return (y if self.bias is None else y + self.bias.to(y.dtype)).to(x.dtype)


def quantise(network: Any, kind: str, compute: torch.dtype) -> None:
    """Frozen base, linear maps of the layers in few bits; the embeddings and heads stay as they are."""
    network.requires_grad_(False)
    heads = {id(network.get_output_embeddings())} if hasattr(network, "get_output_embeddings") else set()
    for name, found in list(network.named_modules()):
        if type(found) is not nn.Linear or id(found) in heads or name.split(".")[-1] in ("score", "classifier"):
            continue
        module: Any = found
        module.weight.few_bits = True
        module.__class__ = _QuantisedLinear
        module.compute = compute if kind == "nf4" else None
    for name in ("score", "classifier"):
        if hasattr(network, name):
            getattr(network, name).requires_grad_(True)
