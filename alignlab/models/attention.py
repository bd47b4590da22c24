"""Attention of trunk and branches over one row without padding, piece by piece; no mask of all pairs is ever made.

A row holds groups one after the other, each its trunk and then its branches. Trunks attend to themselves, branches to
their trunk and to themselves. Both pieces of a branch are joined by their log-sum-exps, as flash attention joins blocks
(Dao et al. 2022, arXiv:2205.14135, section 3.1): the cost is that of the allowed pairs alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from itertools import pairwise
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx

from alignlab.core import Group
from alignlab.models import private_api
from alignlab.models.packing import TRUNK, Rows, Span

NAME = "alignlab"
"""What transformers knows our attention function by."""

PLAN = "attention_plan"
"""The keyword under which a forward pass hands a plan down to every attention layer."""

UNKNOWN = ("softcap", "s_aux", "position_bias")
"""What some architectures ask of attention and plans do not do."""


class AttentionPlan(Protocol):
    """How the tokens of a forward pass attend to each other."""

    def attend(self, module: Any, query: Tensor, key: Tensor, value: Tensor, scaling: float | None) -> Tensor:
        """Attention of one layer.

        Args:
            module: the attention layer; `layer_idx` is its number.
            query: shape (B, H, L, d).
            key, value: shape (B, H', L, d), H' dividing H.
            scaling: factor on the scores; 1/√d by default.

        Returns:
            shape (B, L, H, d).
        """
        ...


def attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **options: Any,
) -> tuple[Tensor, None]:
    """transformers' attention interface: by the plan where there is one, else as its own SDPA function."""
    plan: AttentionPlan | None = options.pop(PLAN, None)
    if plan is None:
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        found: tuple[Tensor, None] = sdpa_attention_forward(
            module, query, key, value, attention_mask, scaling=scaling, dropout=dropout, **options
        )
        return found
    if dropout or any(options.get(name) is not None for name in UNKNOWN):
        raise ValueError("attention with dropout, soft caps, sinks or biases goes through a mask")
    if torch.is_autocast_enabled(query.device.type):  # as SDPA does: rotary embeddings are left in full precision
        dtype = torch.get_autocast_dtype(query.device.type)
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    return plan.attend(module, query, key, value, scaling), None


def use_plans(network: Any) -> bool:
    """Let the attention layers of a transformers model take plans; False where it is not computed by SDPA, or where
    `refusal` has a reason."""
    if private_api.attention_of(network) == NAME:
        return True
    if private_api.attention_of(network) != "sdpa" or refusal(network) is not None:
        return False
    private_api.register_attention(NAME, attention)
    network.set_attn_implementation(NAME)
    return True


def refusal(network: Any) -> str | None:
    """Why attention by plans is not to be had from the libraries installed here; None where it is."""
    on_cpu = next(network.parameters()).device.type == "cpu"
    needs = ["attention of transformers", *(["attention on CPUs"] if on_cpu else [])]
    return next((found for name in needs if (found := private_api.problem(name))), None)


class Segments:
    """The plan of a row that holds groups one after the other, on a CPU.

    Args:
        spans: where the groups are.
    """

    def __init__(self, spans: Sequence[Span]) -> None:
        self.pieces: list[tuple[slice, list[slice]]] = []
        for span in spans:
            ends = [span.start + span.trunk]
            for length in span.branches:
                ends.append(ends[-1] + length)
            branches = [slice(a, b) for a, b in pairwise(ends) if b > a]
            if len(branches) == 1:  # one sequence: trunk and branch are one causal piece
                self.pieces.append((slice(span.start, ends[-1]), []))
            else:
                self.pieces.append((slice(span.start, ends[0]), branches))

    def attend(self, module: Any, query: Tensor, key: Tensor, value: Tensor, scaling: float | None) -> Tensor:
        out: Tensor = _SegmentAttention.apply(query, key, value, self.pieces, scaling)  # type: ignore[no-untyped-call]
        return out


class _SegmentAttention(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[override]
        ctx: FunctionCtx,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        pieces: list[tuple[slice, list[slice]]],
        scaling: float | None,
    ) -> Tensor:
        _, heads, length, size = query.shape
        out = query.new_empty(1, length, heads, size)
        lse = torch.empty(1, length, heads, dtype=torch.promote_types(query.dtype, torch.float32))

        def piece(q: slice, k: slice, causal: bool) -> tuple[Tensor, Tensor]:
            """Output (1, L, H, d) and log-sum-exp (1, L, H) of queries `q` over keys `k`."""
            found, sums = private_api.cpu_attention(query[:, :, q], key[:, :, k], value[:, :, k], causal, scaling)
            return found.transpose(1, 2), sums.transpose(1, 2)

        for trunk, branches in pieces:
            out[:, trunk], lse[:, trunk] = piece(trunk, trunk, True)
            if not branches:
                continue
            every = slice(branches[0].start, branches[-1].stop)
            out[:, every], lse[:, every] = piece(every, trunk, False)
            own = [piece(branch, branch, True) for branch in branches]
            _join(out[:, every], lse[:, every], torch.cat([o for o, _ in own], 1), torch.cat([s for _, s in own], 1))
        ctx.save_for_backward(query, key, value, out, lse)
        ctx.pieces, ctx.scaling = pieces, scaling  # type: ignore[attr-defined]
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:  # type: ignore[override]
        query, key, value, out, lse = ctx.saved_tensors
        grads = [torch.empty(x.transpose(1, 2).shape, dtype=x.dtype).transpose(1, 2) for x in (query, key, value)]
        grad, out, lse = grad.transpose(1, 2), out.transpose(1, 2), lse.transpose(1, 2)

        def piece(q: slice, k: slice, causal: bool) -> tuple[Tensor, Tensor, Tensor]:
            return private_api.cpu_attention_backward(
                *(grad[:, :, q], query[:, :, q], key[:, :, k], value[:, :, k], out[:, :, q], lse[:, :, q]),
                causal,
                ctx.scaling,
            )

        # Probabilities come from the joint log-sum-exp, so that each piece yields its part of the gradient.
        for trunk, branches in ctx.pieces:
            for whole, part in zip(grads, piece(trunk, trunk, True), strict=True):
                whole[:, :, trunk] = part
            if not branches:
                continue
            every = slice(branches[0].start, branches[-1].stop)
            of_query, of_key, of_value = piece(every, trunk, False)
            grads[0][:, :, every] = of_query
            grads[1][:, :, trunk].add_(of_key)
            grads[2][:, :, trunk].add_(of_value)
            for branch in branches:
                of_query, of_key, of_value = piece(branch, branch, True)
                grads[0][:, :, branch].add_(of_query)
                grads[1][:, :, branch] = of_key
                grads[2][:, :, branch] = of_value
        return grads[0], grads[1], grads[2], None, None


def _join(out: Tensor, lse: Tensor, other: Tensor, other_lse: Tensor) -> None:
    """Softmax over two sets of keys from the softmax over each, in place in `out` and `lse`."""
    total = torch.logaddexp(lse, other_lse)
    out.mul_((lse - total).exp_().to(out.dtype)[..., None])
    out.add_(other.mul((other_lse - total).exp_().to(out.dtype)[..., None]))
    lse.copy_(total)


class FlexPlan:
    """The plan of a varlen row on a GPU: FlexAttention (Dong et al. 2024, arXiv:2412.05496), whose block mask skips the
    blocks in which no token sees another.

    Args:
        rows: in the varlen layout.
    """

    def __init__(self, rows: Rows) -> None:
        from torch.nn.attention.flex_attention import create_block_mask

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


CALL_PAIRS = 256
"""What a call to the kernel costs, in pairs of tokens that a mask makes it look at for nothing (per head)."""


def worthwhile(groups: Sequence[Group], device: torch.device) -> bool:
    """Whether attention piece by piece is faster for these groups than through a mask of all pairs."""
    if device.type != "cpu":
        return True
    calls = masked = allowed = 0
    for group in groups:
        lengths = [len(r.token_ids) for r in group.responses]
        trunk, branches = len(group.prompt_ids), sum(lengths)
        calls += 1 if len(lengths) == 1 else 2 + len(lengths)
        masked += (trunk + branches) ** 2
        allowed += trunk * (trunk // 2 + branches) + sum(n * n // 2 for n in lengths)
    return masked - allowed > calls * CALL_PAIRS


def shortest_window(config: Any) -> int | None:
    """The shortest sliding window of a model's layers, in positions; None where there is none."""
    window = getattr(config, "sliding_window", None)
    return int(window) if window else None


def plan_of(rows: Rows) -> AttentionPlan:
    """How the tokens of a varlen row attend to each other."""
    if rows.input_ids_RL.device.type == "cpu":
        return Segments(rows.spans)
    return FlexPlan(rows)
