"""Log-probs of tokens from hidden states, a chunk at a time: no logits of the whole vocabulary outlive their chunk."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from alignlab.models.products import linear

CHUNK_ELEMENTS = 1 << 23
"""Logits held at a time, in numbers (32 MB in float32), whatever the vocabulary."""


@dataclass(frozen=True)
class Scaling:
    """What comes between a linear head and the softmax: z = cap · tanh(s·x / cap) / temperature.

    Attributes:
        factor: s, as in Cohere and Granite.
        cap: Gemma's soft cap; None without.
        temperature: > 0.
    """

    factor: float = 1.0
    cap: float | None = None
    temperature: float = 1.0

    def __call__(self, logits: Tensor) -> Tensor:
        """z, in float32 or better; differentiable."""
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        if self.cap is not None:
            return torch.tanh(logits * (self.factor / self.cap)) * (self.cap / self.temperature)
        scale = self.factor / self.temperature
        return logits if scale == 1.0 else logits * scale

    def slope_(self, grad: Tensor, scaled: Tensor) -> Tensor:
        """dz/dx times `grad`, in place; `scaled` is z."""
        if self.cap is not None:
            grad.mul_(1.0 - (scaled * (self.temperature / self.cap)).square_())
        scale = self.factor / self.temperature
        return grad if scale == 1.0 else grad.mul_(scale)


def log_probs(
    hidden: Tensor, target: Tensor, head: nn.Linear, scaling: Scaling, entropy: bool
) -> tuple[Tensor, Tensor]:
    """Log-prob of each target, and the entropies (without gradient; zeros where not asked for), in nats.

    One pass over the logits. While a chunk's logits are there, so is all that the gradient with respect to the hidden
    states needs: d logp / d h = W_target - sum_v p_v W_v, a vector for each token, whatever comes down the graph later.
    So nothing is computed again in the backward pass. Only a head that is trained needs its logits anew there, since
    what its weights get depends on what comes down.

    Args:
        hidden: shape (T, D).
        target: token ids, shape (T,).
        head: the map to the vocabulary.

    Returns:
        two tensors of shape (T,), float32 or better.
    """
    found: tuple[Tensor, Tensor] = _LogProbs.apply(  # type: ignore[no-untyped-call]
        hidden, head.weight, head.bias, target, scaling, entropy, torch.is_grad_enabled()
    )
    return found


def chunks(tokens: int, vocabulary: int) -> list[slice]:
    """Parts of the T axis whose logits are held together."""
    size = max(1, CHUNK_ELEMENTS // vocabulary)
    return [slice(start, min(start + size, tokens)) for start in range(0, tokens, size)]


class _LogProbs(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        target: Tensor,
        scaling: Scaling,
        entropy: bool,
        training: bool,
    ) -> tuple[Tensor, Tensor]:
        wide = torch.promote_types(hidden.dtype, torch.float32)
        logp, spread = (torch.zeros(len(target), dtype=wide, device=hidden.device) for _ in range(2))
        eager = training and hidden.requires_grad and not _trained(weight, bias)
        jacobian = torch.empty_like(hidden) if eager else None
        for part in chunks(len(target), weight.shape[0]):
            logits = linear(hidden[part], weight, bias)
            z = scaling(logits)
            log_p = z.log_softmax(-1)
            column = target[part, None]
            logp[part] = log_p.gather(-1, column)[:, 0]
            if not eager and not entropy:
                continue
            p = log_p.exp() if entropy else log_p.exp_()
            if entropy:
                spread[part] = -(p * log_p).sum(-1)
            if jacobian is not None:
                one = torch.ones_like(column, dtype=p.dtype)
                of_logits = _of_logits(p, column, one, scaling, z).to(logits.dtype)
                jacobian[part] = linear(of_logits, weight.to(logits.dtype).t())
        ctx.scaling, ctx.autocast = scaling, torch.is_autocast_enabled(hidden.device.type)
        kept = (jacobian,) if eager else (hidden, weight, bias, target) if training else ()
        ctx.eager = eager
        ctx.save_for_backward(*kept)
        ctx.mark_non_differentiable(spread)
        return logp, spread

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        if ctx.eager:
            (jacobian,) = ctx.saved_tensors
            return (jacobian * grad[:, None].to(jacobian.dtype), *[None] * 6)
        hidden, weight, bias, target = ctx.saved_tensors
        wanted = ctx.needs_input_grad
        of_hidden = torch.empty_like(hidden) if wanted[0] else None
        of_weight = torch.zeros_like(weight) if wanted[1] else None
        of_bias = torch.zeros_like(bias) if bias is not None and wanted[2] else None
        with torch.autocast(hidden.device.type, enabled=ctx.autocast):
            for part in chunks(len(target), weight.shape[0]):
                logits = linear(hidden[part], weight, bias)
                z = ctx.scaling(logits)
                p = torch.softmax(z, -1)
                of_logits = _of_logits(p, target[part, None], grad[part, None], ctx.scaling, z).to(logits.dtype)
                if of_hidden is not None:
                    of_hidden[part] = linear(of_logits, weight.to(logits.dtype).t())
                if of_weight is not None:
                    of_weight += of_logits.t() @ hidden[part].to(logits.dtype)
                if of_bias is not None:
                    of_bias += of_logits.sum(0)
        return of_hidden, of_weight, of_bias, None, None, None, None


def _trained(weight: Tensor, bias: Tensor | None) -> bool:
    return weight.requires_grad or (bias is not None and bias.requires_grad)


def _of_logits(p: Tensor, column: Tensor, grad: Tensor, scaling: Scaling, z: Tensor) -> Tensor:
    """d (grad · logp) / d logits, shape (T, V), in place in the probabilities; `column` and `grad` are (T, 1)."""
    grad = grad.to(p.dtype)
    return scaling.slope_(p.mul_(-grad).scatter_add_(-1, column, grad), z)
