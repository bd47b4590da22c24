"""RMSNorm as one function with a gradient of its own (Zhang & Sennrich 2019, arXiv:1910.07467, equation 4).

Transformers writes it in six elementwise operations, which autograd turns into about ten more. On CPUs each is a pass
over memory: here it takes three forward, six backward, and only the input and one number for each row are kept.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from alignlab.models.grafting import graft, ungraft

AGREES = 2e-6
"""Largest relative difference from a module's own forward: both round to about 2.5e-7, rows of 8192 included."""


class FusedNorm(nn.Module):
    """For `graft`: another forward pass in float32 on CPUs; elsewhere it is the module's own."""

    weight: nn.Parameter

    def forward(self, *arguments: Any, **options: Any) -> Any:
        if len(arguments) != 1 or options or not self._takes(arguments[0]):
            return super().forward(*arguments, **options)
        (x,) = arguments
        eps: Any = _epsilon(self)
        if torch.is_grad_enabled() and (x.requires_grad or self.weight.requires_grad):
            return _RMSNorm.apply(x, self.weight, eps)  # type: ignore[no-untyped-call]
        return _scaled(x, _inverse_rms(x, eps), self.weight)

    def _takes(self, x: Tensor) -> bool:
        weight = self.weight
        if x.dtype != torch.float32 or not x.is_cpu or weight.dtype != torch.float32 or not weight.is_cpu:
            return False
        return weight.shape == x.shape[-1:] and not torch.is_autocast_enabled("cpu")


def fuse_norms(network: nn.Module, on: bool = True) -> None:
    """Let the RMSNorm layers of a network use the one function, or their own again.

    Left alone are layers that compute something else (Gemma's 1 + w), and those whose weights are not here in float32:
    quantised, on a GPU, or divided among processes (ZeRO-3).
    """
    for module in network.modules():
        if isinstance(module, FusedNorm) and not on:
            ungraft(module)
        elif on and not isinstance(module, FusedNorm) and _is_rms_norm(module):
            graft(module, FusedNorm)


def _epsilon(module: nn.Module) -> Any:
    held = vars(module)
    return held.get("variance_epsilon", held.get("eps"))


def _is_rms_norm(module: nn.Module) -> bool:
    """Whether a layer computes equation 4, by trial: with a random weight, since ones or zeros may hide what is done
    with it, and with rows so small that epsilon counts."""
    weight: Any = getattr(module, "weight", None)
    if not type(module).__name__.endswith("RMSNorm") or type(weight) is not nn.Parameter or weight.ndim != 1:
        return False
    if not weight.is_cpu or weight.dtype != torch.float32 or not weight.numel():
        return False
    eps = _epsilon(module)
    if getattr(module, "bias", None) is not None or not isinstance(eps, float):
        return False
    generator = torch.Generator().manual_seed(0)  # the global one stays as it is
    x = torch.randn((8, len(weight)), generator=generator) * torch.logspace(-4, 3, 8)[:, None]
    w = torch.randn(weight.shape, generator=generator)
    try:
        own = functional_call(module, {"weight": w}, (x,))
    except Exception:  # it wants more than an input, or another one: not this function, whatever it says
        return False
    ours = _scaled(x, _inverse_rms(x, eps), w)
    return isinstance(own, Tensor) and own.shape == x.shape and torch.allclose(ours, own, rtol=AGREES, atol=0)


def _inverse_rms(x: Tensor, eps: float) -> Tensor:
    """1 / √(mean(x²) + ε), shape (…, 1)."""
    length = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return torch.addcmul(x.new_full((), eps), length, length, value=1 / x.shape[-1]).rsqrt_()


def _scaled(x: Tensor, r: Tensor, weight: Tensor) -> Tensor:
    return (x * r).mul_(weight)


class _RMSNorm(torch.autograd.Function):
    """y = w · x · r with r = 1 / √(mean(x²) + ε), with gradients for x and w.

    ∂/∂w = Σ g · x · r over rows, and ∂/∂x = r · g · w - x · r³ · mean(g · w · x).
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:  # type: ignore[override]
        r = _inverse_rms(x, eps)
        ctx.save_for_backward(x, r, weight)
        return _scaled(x, r, weight)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, r, weight = ctx.saved_tensors
        of_x = of_weight = None
        work = grad * x
        if ctx.needs_input_grad[1]:
            of_weight = torch.mv(work.reshape(-1, x.shape[-1]).t(), r.reshape(-1))
        if ctx.needs_input_grad[0]:
            slope = work.mul_(weight).sum(-1, keepdim=True).mul_(r.pow(3))
            of_x = torch.mul(grad, weight, out=work).mul_(r).addcmul_(x, slope, value=-1 / x.shape[-1])
        return of_x, of_weight, None
