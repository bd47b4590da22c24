"""Log-probs of tokens from hidden states, a chunk at a time: no logits of the whole vocabulary outlive their chunk."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

CHUNK_ELEMENTS = 1 << 22
"""Logits held at a time on a CPU, in numbers (16 MB in float32), whatever the vocabulary."""

GPU_CHUNKS = 8
"""On a GPU so many times as many: it needs more to be busy."""

Entropy = Literal["no", "value", "gradient"]
"""Whether entropies are computed, and whether they have a gradient."""


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
    hidden: Tensor, target: Tensor, head: nn.Linear, scaling: Scaling, entropy: Entropy
) -> tuple[Tensor, Tensor]:
    """Log-prob of each target, and the entropies (zeros where they are not asked for), in nats.

    One pass over the logits. While a chunk's logits are there, so is all that the gradient with respect to the hidden
    states needs: d logp / d h = W_target - sum_v p_v W_v, a vector for each token, whatever comes down the graph later.
    So nothing is computed again in the backward pass. Only a head that is trained needs its logits anew there, since
    what its weights get depends on what comes down.

    Args:
        hidden: shape (T, D).
        target: token ids, shape (T,).
        head: the map to the vocabulary.
        entropy: whether entropies are computed, and whether they have a gradient.

    Returns:
        two tensors of shape (T,), float32 or better.
    """
    found: tuple[Tensor, Tensor] = _LogProbs.apply(  # type: ignore[no-untyped-call]
        hidden, head.weight, head.bias, target, scaling, entropy, torch.is_grad_enabled()
    )
    return found


def chunks(target: Tensor, vocabulary: int) -> list[slice]:
    """Parts of the T axis whose logits are held together."""
    elements = CHUNK_ELEMENTS * (GPU_CHUNKS if target.device.type == "cuda" else 1)
    size, tokens = max(1, elements // vocabulary), len(target)
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
        entropy: Entropy,
        training: bool,
    ) -> tuple[Tensor, Tensor]:
        wide = torch.promote_types(hidden.dtype, torch.float32)
        logp, spread = (torch.zeros(len(target), dtype=wide, device=hidden.device) for _ in range(2))
        eager = training and hidden.requires_grad and not _trained(weight, bias)
        jacobian = torch.empty_like(hidden) if eager else None
        of_spread = torch.empty_like(hidden) if eager and entropy == "gradient" else None
        rounded = _rounded(weight)
        for part in chunks(target, weight.shape[0]):
            logits = linear(hidden[part], rounded, bias)
            z, dtype = scaling(logits), logits.dtype
            del logits
            log_p = z.log_softmax(-1)
            column = target[part, None]
            logp[part] = log_p.gather(-1, column)[:, 0]
            p = None
            if entropy != "no":
                p = torch.softmax(z, -1)  # faster than exp of the log-probs
                spread[part] = _entropy(p, log_p)
            if of_spread is not None and p is not None:
                slope = scaling.slope_(_of_entropy(p, log_p, spread[part, None]), z).to(dtype)
                of_spread[part] = linear(slope, rounded.to(dtype).t())
            if jacobian is not None:
                p = torch.softmax(z, -1, out=log_p) if p is None else p
                slope = scaling.slope_(_of_logp(p, column, torch.ones_like(logp[part, None])), z).to(dtype)
                jacobian[part] = linear(slope, rounded.to(dtype).t())
        ctx.scaling, ctx.eager, ctx.entropy = scaling, eager, entropy
        ctx.autocast = torch.is_autocast_enabled(hidden.device.type)
        ctx.dtype = torch.get_autocast_dtype(hidden.device.type)
        ctx.save_for_backward(*((jacobian, of_spread) if eager else (hidden, weight, bias, target) if training else ()))
        if entropy != "gradient":
            ctx.mark_non_differentiable(spread)
        return logp, spread

    @staticmethod
    def backward(ctx: Any, grad: Tensor, grad_entropy: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        if ctx.eager:
            jacobian, of_spread = ctx.saved_tensors
            found = jacobian * grad[:, None].to(jacobian.dtype)
            if of_spread is not None:
                found += of_spread * grad_entropy[:, None].to(of_spread.dtype)
            return (found, *[None] * 6)
        hidden, weight, bias, target = ctx.saved_tensors
        wanted = ctx.needs_input_grad
        of_hidden = torch.empty_like(hidden) if wanted[0] else None
        of_weight = torch.zeros_like(weight) if wanted[1] else None
        of_bias = torch.zeros_like(bias) if bias is not None and wanted[2] else None
        with torch.autocast(hidden.device.type, ctx.dtype, enabled=ctx.autocast):
            rounded = _rounded(weight)
            for part in chunks(target, weight.shape[0]):
                logits = linear(hidden[part], rounded, bias)
                z, dtype = ctx.scaling(logits), logits.dtype
                if ctx.entropy == "gradient":
                    log_p = z.log_softmax(-1)
                    p = torch.softmax(z, -1)
                    slope = _of_entropy(p, log_p, _entropy(p, log_p)[:, None])
                    slope.mul_(grad_entropy[part, None]).add_(_of_logp(p, target[part, None], grad[part, None]))
                else:
                    slope = _of_logp(torch.softmax(z, -1), target[part, None], grad[part, None])
                slope = ctx.scaling.slope_(slope, z).to(dtype)
                if of_hidden is not None:
                    of_hidden[part] = linear(slope, rounded.to(dtype).t())
                if of_weight is not None:
                    of_weight += slope.t() @ hidden[part].to(dtype)
                if of_bias is not None:
                    of_bias += slope.sum(0)
        return of_hidden, of_weight, of_bias, None, None, None, None


def _rounded(weight: Tensor) -> Tensor:
    """A weight as autocast would round it for each chunk anew."""
    kind = weight.device.type
    return weight.to(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else weight


def _trained(weight: Tensor, bias: Tensor | None) -> bool:
    return weight.requires_grad or (bias is not None and bias.requires_grad)


def _entropy(p: Tensor, log_p: Tensor) -> Tensor:
    """-sum p log p, shape (T,), in full precision: autocast takes it for a product."""
    with torch.autocast(p.device.type, enabled=False):
        return -torch.linalg.vecdot(p, log_p)


def _of_logp(p: Tensor, column: Tensor, grad: Tensor) -> Tensor:
    """d (grad · logp) / dz, shape (T, V), in place in the probabilities; `column` and `grad` are (T, 1)."""
    return p.mul_(-grad).scatter_add_(-1, column, grad)


def _of_entropy(p: Tensor, log_p: Tensor, entropy: Tensor) -> Tensor:
    """dH / dz = -p (log p + H), shape (T, V); `entropy` is (T, 1)."""
    return (log_p + entropy).mul_(p).neg_()
