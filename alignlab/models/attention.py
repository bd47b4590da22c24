"""Attention of trunk and branches over one row without padding; no mask of all pairs is ever made.

A row holds groups one after the other, each its trunk and then its branches. Trunks attend to themselves, branches to
their trunk and to themselves. There are two plans, and `path` chooses between them:

* `Segments` computes piece by piece. Both pieces of a branch are joined by their log-sum-exps, as flash attention joins
  blocks (Dao et al. 2022, arXiv:2205.14135, section 3.1): the cost is that of the allowed pairs alone.
* `FlexPlan` computes the blocks of 128 tokens by 128 in which a token sees another, by compiled FlexAttention.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cache
from itertools import count, pairwise
from typing import Any, Literal, Protocol

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx
from torch.nn.functional import pad

from alignlab.core import AlignlabError, Group
from alignlab.core.memory import is_memory_error, said
from alignlab.core.private_api import problem
from alignlab.models import private_api
from alignlab.models.packing import PADDING, TRUNK, Rows, Span

NAME = "alignlab"
"""What transformers knows our attention function by."""

PLAN = "attention_plan"
"""The keyword under which a forward pass hands a plan down to every attention layer."""

UNKNOWN = ("softcap", "s_aux", "position_bias")
"""What some architectures ask of attention and plans do not do."""

Path = Literal["segments", "flex", "mask"]

ON_CPU: Path = "segments"
"""The path of CPUs. Tests set it to "flex", and CPUs then do what GPUs do, but for gradients: FlexAttention has none
on CPUs."""


def path(device: torch.device, implementation: str | None = "sdpa", segments: bool = True) -> Path:
    """How attention is computed: by `Segments`, by `FlexPlan`, or through a mask of all pairs.

    Args:
        device: where.
        implementation: what transformers would compute it with (`model.attention`); plans stand in for SDPA alone.
        segments: `Features.segments`.
    """
    if not segments or implementation not in ("sdpa", NAME):
        return "mask"
    return ON_CPU if device.type == "cpu" else "flex"


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
    implementation = private_api.attention_of(network)
    if implementation == NAME:
        return True
    if path(_device(network), implementation) == "mask" or refusal(network) is not None:
        return False
    private_api.register_attention(NAME, attention)
    network.set_attn_implementation(NAME)
    return True


def refusal(network: Any) -> str | None:
    """Why attention by plans is not to be had from the libraries installed here; None where it is."""
    needs = ["attention of transformers", *(["attention on CPUs"] if path(_device(network)) == "segments" else [])]
    return next((found for name in needs if (found := problem(name))), None)


def _device(network: Any) -> torch.device:
    found: torch.device = next(network.parameters()).device
    return found


class Segments:
    """The plan of a row that holds groups one after the other, piece by piece.

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


BLOCK = 128
"""FlexAttention's blocks have so many tokens, and rows are padded to a multiple of it. Shorter rows than two blocks
would be computed by other kernels: they are padded too, so that one kernel serves all lengths."""

MOST_SHARED = 160_000
"""Bytes of shared memory that suffice for the kernels that PyTorch chooses for heads of 128."""

VARIANTS = 64
"""Kernels for one shape of heads at most. One is expected."""


class FlexPlan:
    """The plan of a varlen row by FlexAttention (Dong et al. 2024, arXiv:2412.05496), always compiled: uncompiled, it
    makes the whole matrix of scores. Padding is one more group, and is cut off.

    Args:
        group_L: which group a token belongs to. The tokens of a group follow each other, its trunk first.
        branch_L: which branch of its group, `TRUNK` for the trunk. The tokens of a branch follow each other.
    """

    def __init__(self, group_L: Tensor, branch_L: Tensor) -> None:
        length = len(group_L)
        self._extra = max(2, -(-length // BLOCK)) * BLOCK - length
        group, branch = (
            pad(x.int(), (0, self._extra), value=value) for x, value in ((group_L, PADDING), (branch_L, TRUNK))
        )
        self.mask = block_mask(group, branch)

    def attend(self, module: Any, query: Tensor, key: Tensor, value: Tensor, scaling: float | None) -> Tensor:
        """See `AttentionPlan.attend`.

        Raises:
            AlignlabError: FlexAttention cannot be compiled for this model on this device.
        """
        length = query.shape[2]
        padded = [pad(x.transpose(1, 2), (0, 0, 0, 0, 0, self._extra)).contiguous() for x in (query, key, value)]
        query, key, value = (x.transpose(1, 2) for x in padded)
        shape = (query.shape[1], key.shape[1], query.shape[-1], value.shape[-1])
        grads = (torch.is_grad_enabled(), *(x.requires_grad for x in (query, key, value)))
        # PyTorch would compile anew with autocast, and with TF32: all has its dtype, and TF32 is for float32 alone.
        alike: AbstractContextManager[None] = nullcontext() if query.dtype == torch.float32 else without_tf32()
        try:
            with torch.autocast(query.device.type, enabled=False), alike:
                compute = compiled(*shape, query.dtype, query.device, grads, scaling)
                found: Tensor = compute(query, key, value, self.mask)
        except Exception as error:
            if is_memory_error(error):
                raise
            raise AlignlabError(
                f"FlexAttention fails for {shape[0]} heads of {shape[2]} with {shape[1]} of keys in {query.dtype} on "
                f"{query.device} ({said(_cause(error))}): model.layout=packed goes through a mask of all pairs instead"
            ) from error
        return found.transpose(1, 2)[:, :length].contiguous()


@contextmanager
def without_tf32() -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def _cause(error: BaseException) -> BaseException:
    """What an error of PyTorch's compiler is about: its own first line names the compiler alone."""
    inner = getattr(error, "inner_exception", None) or error.__cause__
    return _cause(inner) if isinstance(inner, BaseException) else error


def block_mask(group_L: Tensor, branch_L: Tensor) -> Any:
    """FlexAttention's block mask of a row whose length is a multiple of `BLOCK`, from what is first and last in each
    block: no pair of tokens is looked at.

    A block before another is seen by it where the group that it ends with is the one that the other begins with, and
    either this group's trunk is in it or its last branch is the other's first. It is seen in full where both have one
    group, and it has nothing but trunk, or but trunk and the one branch that the other has.
    """
    from torch.nn.attention.flex_attention import BlockMask

    def allowed(_batch: Tensor, _head: Tensor, q: Tensor, k: Tensor) -> Tensor:
        same = (branch_L[k] == TRUNK) | (branch_L[q] == branch_L[k])
        return (q >= k) & (group_L[q] == group_L[k]) & same

    group_BL, branch_BL = group_L.unflatten(0, (-1, BLOCK)), branch_L.unflatten(0, (-1, BLOCK))
    first, last = group_BL[:, 0], group_BL[:, -1]
    first_branch, last_branch = branch_BL[:, 0], branch_BL[:, -1]
    has_trunk = ((group_BL == last[:, None]) & (branch_BL == TRUNK)).any(1)
    one_group, one_branch = first == last, first_branch == last_branch
    no_siblings = ((branch_BL == TRUNK) | (branch_BL == last_branch[:, None])).all(1)

    number = torch.arange(len(first), device=group_L.device)
    goes_on = first_branch[:, None] == last_branch
    seen = (number[:, None] > number) & (first[:, None] == last) & (has_trunk | goes_on)
    full = (last_branch == TRUNK) | (one_branch[:, None] & goes_on & no_siblings)
    full &= seen & one_group[:, None] & one_group
    partial = (seen & ~full) | (number[:, None] == number)

    def ordered(blocks: Tensor) -> tuple[Tensor, Tensor]:
        """How many blocks each sees, and which: these first."""
        which = blocks.int().argsort(dim=-1, descending=True, stable=True)
        return blocks.sum(-1, dtype=torch.int32)[None, None], which.int()[None, None]

    return BlockMask.from_kv_blocks(*ordered(partial), *ordered(full), BLOCK_SIZE=BLOCK, mask_mod=allowed)


@cache
def compiled(
    heads: int,
    shared: int,
    size: int,
    value_size: int,
    dtype: torch.dtype,
    device: torch.device,
    grads: tuple[bool, ...],
    scaling: float | None,
) -> Any:
    """FlexAttention compiled for one shape of heads, dtype and use of gradients, and for any length.

    PyTorch counts and limits compilations by the function's code: each of ours has its own. As the whole function must
    be compiled (`fullgraph`), what cannot be, or goes beyond the limit, is an error and never runs uncompiled.

    Args:
        heads, shared: of queries, and of keys and values.
        size, value_size: of a head.
        grads: whether gradients are recorded, and whether query, key and value have one.
    """
    from torch.nn.attention.flex_attention import flex_attention

    options: Any = kernel_options(device, max(size, value_size), dtype)

    def compute(query: Tensor, key: Tensor, value: Tensor, mask: Any) -> Any:
        gqa = heads != shared
        return flex_attention(query, key, value, block_mask=mask, scale=scaling, enable_gqa=gqa, kernel_options=options)

    compute.__code__ = compute.__code__.replace(co_name=f"flex_attention_{heads}_{shared}_{size}")
    takes_limit = "recompile_limit" in inspect.signature(torch.compile).parameters  # 8 in versions that take none
    limit: Any = {"recompile_limit": VARIANTS} if takes_limit else {}
    made: Any = torch.compile(compute, dynamic=True, fullgraph=True, **limit)
    # PyTorch takes sizes that are equal in the first call for equal in all: as many blocks as heads, and it would
    # compile for this number of blocks alone.
    blocks = next(n for n in count(3) if not {n, n * BLOCK} & {heads, shared, size, value_size})
    shapes = ((heads, size), (shared, size), (shared, value_size))
    first = [torch.zeros(1, blocks * BLOCK, *shape, dtype=dtype, device=device) for shape in shapes]
    group, branch = (torch.zeros(blocks * BLOCK, dtype=torch.int32, device=device) for _ in range(2))
    with torch.set_grad_enabled(grads[0]):
        inputs = (x.transpose(1, 2).requires_grad_(grad) for x, grad in zip(first, grads[1:], strict=True))
        made(*inputs, block_mask(group, branch))
    return made


def kernel_options(device: torch.device, size: int, dtype: torch.dtype) -> dict[str, int] | None:
    """Smaller blocks of queries and keys where a GPU has less shared memory than PyTorch's choice of them is made for:
    with heads of 128 they need 131 to 151 KB, of which GPUs of compute capability 8.6 and 8.9 (A10, RTX 4090, L40S)
    have 99.

    Args:
        size: of a head.
    """
    if device.type != "cuda" or size <= 64:
        return None
    properties = torch.cuda.get_device_properties(device)
    if getattr(properties, "shared_memory_per_block_optin", MOST_SHARED) >= MOST_SHARED:
        return None
    return {"fwd_BLOCK_M": 64, "fwd_BLOCK_N": 32, "fwd_num_stages": 2 if dtype.itemsize < 4 else 1}


CALL_PAIRS = 256
"""What a call to the kernel costs, in pairs of tokens that a mask makes it look at for nothing (per head)."""


def worthwhile(groups: Sequence[Group], by: Path) -> bool:
    """Whether attention on this path is faster for these groups than through a mask of all pairs."""
    if by != "segments":
        return by == "flex"
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
    if path(rows.input_ids_RL.device) == "segments":
        return Segments(rows.spans)
    return FlexPlan(rows.group_RL[0], rows.branch_RL[0])
