"""LoRA layers that multiply by base and adapter at once (Hu et al. 2021, arXiv:2106.09685, equation 3).

W + s·B·A costs next to nothing beside a product with many tokens. So the forward pass is one product instead of three
and two passes over the outputs, and keeps the layer's input alone for the backward pass.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft.tuners.lora import Linear
from torch import Tensor, nn
from torch.nn.functional import linear

from alignlab.core.private_api import problem
from alignlab.models.private_api import become, is_weight


class FusedLinear(Linear):
    """PEFT's LoRA layer, as it was made, with another forward pass wherever that comes to the same.

    Dropout on the adapter's input, several adapters at once, quantised bases, mixed precision and weights that are
    elsewhere (ZeRO-3) go through PEFT's own. How many tokens there are does not count: ZeRO exchanges gradients in the
    order in which they come, which must be the same on every process.
    """

    fused: bool
    held: Tensor | None

    def forward(self, x: Tensor, *arguments: Any, **options: Any) -> Tensor:
        out = None if arguments or options or not self.fused or self.merged else self._in_one(x)
        if out is None:
            out = super().forward(x, *arguments, **options)
        return out

    def _in_one(self, x: Tensor) -> Tensor | None:
        """The output by a single product, where that comes to the same."""
        base = self.base_layer
        if torch.is_autocast_enabled(x.device.type) or not is_weight(base) or base.weight.dtype != x.dtype:
            return None
        if self.disable_adapters:  # by the same product, so that a policy that has learned nothing equals its reference
            return None if torch.is_grad_enabled() else linear(x, base.weight, base.bias)
        name = self._adapter()
        if name is None or self.lora_A[name].weight.dtype != x.dtype:
            return None
        if self.held is not None:
            return linear(x, self.held, base.bias)
        a, b = self.lora_A[name].weight, self.lora_B[name].weight
        out: Tensor = _LoraProduct.apply(x, base.weight, base.bias, a, b, self.scaling[name])  # type: ignore[no-untyped-call]
        return out

    def _adapter(self) -> str | None:
        """The one adapter in use, where nothing but the products is to be done."""
        active = [name for name in self.active_adapters if name in self.lora_A]
        if self.disable_adapters or self.merged or len(active) != 1 or active[0] in self.lora_variant:
            return None
        (name,) = active
        if not all(is_weight(part) for part in (self.base_layer, self.lora_A[name], self.lora_B[name])):
            return None
        dropout = self.lora_dropout[name]
        if self.lora_B[name].bias is not None or (dropout.training and not isinstance(dropout, nn.Identity)):
            return None
        return None if self.base_layer.weight.requires_grad else name

    def merge_for_now(self) -> None:
        """Hold W + s·B·A beside the weights."""
        name = self._adapter() if self.fused else None
        if name is not None:
            base, a, b = self.base_layer.weight, self.lora_A[name].weight, self.lora_B[name].weight
            if base.dtype == a.dtype:
                self.held = torch.addmm(base, b, a, alpha=self.scaling[name])


def fuse(network: nn.Module, on: bool = True) -> str | None:
    """Let the LoRA layers of a PEFT network use the fused product, or PEFT's own again.

    Returns:
        Why they cannot, with the PEFT that is installed here; None where they can.
    """
    if on and (refused := problem("LoRA layers")):
        return refused
    for module in network.modules():
        if type(module) is Linear:
            become(module, FusedLinear)
        if isinstance(module, FusedLinear):
            module.fused, module.held = on, None
    return None


@contextmanager
def merged(network: nn.Module) -> Iterator[None]:
    """Base and adapter multiplied out once, for many passes over few tokens without gradient. The weights themselves
    stay as they are: nothing is added that would have to be subtracted again."""
    layers = [m for m in network.modules() if isinstance(m, FusedLinear)]
    try:
        with torch.no_grad():
            for layer in layers:
                layer.merge_for_now()
        yield
    finally:
        for layer in layers:
            layer.held = None


class _LoraProduct(torch.autograd.Function):
    """y = x (W + s·B·A)ᵀ + bias, with gradients for x, A and B."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scaling: float
    ) -> Tensor:
        ctx.save_for_backward(x, weight, a, b)
        ctx.scaling = scaling
        return linear(x, torch.addmm(weight, b, a, alpha=scaling), bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, weight, a, b = ctx.saved_tensors
        of_x = of_a = of_b = None
        rows, grads = x.reshape(-1, x.shape[-1]), grad.reshape(-1, grad.shape[-1])
        if ctx.needs_input_grad[0]:
            of_x = linear(grads, torch.addmm(weight, b, a, alpha=ctx.scaling).t()).view_as(x)
        if ctx.needs_input_grad[3]:
            of_a = (linear(grads, b.t()).t() @ rows).mul_(ctx.scaling)
        if ctx.needs_input_grad[4]:
            of_b = (grads.t() @ linear(rows, a)).mul_(ctx.scaling)
        return of_x, None, None, of_a, of_b, None
