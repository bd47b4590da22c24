"""Attention piece by piece equals attention through the mask of all pairs, values and gradients, in float64."""

from __future__ import annotations

import random
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor

from alignlab.core import AlignlabError, Group, Response
from alignlab.models import attention
from alignlab.models.attention import NAME, FlexPlan, Segments, path, plan_of
from alignlab.models.packing import Rows, lay_out
from tests import tiny

SHAPES: dict[str, list[tuple[int, list[int]]]] = {
    "several groups": [(7, [3, 9, 1]), (40, [5]), (3, [70, 2]), (1, [1, 1, 1, 1])],
    "one sequence": [(5, [6])],
    "prompts alone": [(5, []), (4, [3])],
    "empty responses": [(5, [0, 4, 0]), (6, [0]), (3, [0, 0])],
}


def rows_of(shape: list[tuple[int, list[int]]], layout: str = "varlen") -> Rows:
    rng = random.Random(0)

    def ids(n: int) -> list[int]:
        return [rng.randrange(4, 90) for _ in range(n)]

    return lay_out([Group(ids(p), [Response(ids(c)) for c in cs]) for p, cs in shape], layout)  # type: ignore[arg-type]


def dense(query: Tensor, key: Tensor, value: Tensor, rows: Rows, scaling: float | None) -> Tensor:
    """The definition: softmax over all pairs that the mask allows."""
    repeat = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(repeat, 1), value.repeat_interleave(repeat, 1)
    scores = query @ key.transpose(-1, -2) * (scaling or query.shape[-1] ** -0.5)
    weights = scores.masked_fill(~rows.attention(), -torch.inf).softmax(-1)
    return (weights @ value).transpose(1, 2)


def check(rows: Rows, plan: Segments | FlexPlan, dtype: torch.dtype, heads: int, shared: int, atol: float) -> None:
    length = rows.input_ids_RL.shape[1]
    generator = torch.Generator().manual_seed(1)
    inputs = [
        torch.randn(1, length, h, 16, generator=generator).to(dtype).transpose(1, 2).requires_grad_()
        for h in (heads, shared, shared)
    ]
    weight = torch.randn(1, length, heads, 16, generator=generator).to(dtype)
    for scaling in (None, 0.3):
        found = plan.attend(None, *inputs, scaling)
        expected = dense(*(x.double() for x in inputs), rows, scaling)
        torch.testing.assert_close(found.double(), expected, atol=atol, rtol=0)
        of_found = torch.autograd.grad((found * weight).sum(), inputs)
        of_expected = torch.autograd.grad((expected * weight).sum(), inputs)
        for one, other in zip(of_found, of_expected, strict=True):
            torch.testing.assert_close(one.double(), other.double(), atol=10 * atol, rtol=10 * atol)


@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (6, 1)])
@pytest.mark.parametrize("name", SHAPES)
def test_pieces_are_the_mask(name: str, heads: tuple[int, int]) -> None:
    rows = rows_of(SHAPES[name])
    check(rows, Segments(rows.spans), torch.float64, *heads, atol=1e-12)


def test_in_lower_precision() -> None:
    rows = rows_of(SHAPES["several groups"])
    check(rows, Segments(rows.spans), torch.float32, 4, 2, atol=5e-6)
    check(rows, Segments(rows.spans), torch.bfloat16, 4, 2, atol=0.03)


def test_finite_differences() -> None:
    rows = rows_of([(4, [2, 3]), (2, [3])])
    inputs = [torch.randn(1, 2, 14, 4, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    assert torch.autograd.gradcheck(lambda *x: Segments(rows.spans).attend(None, *x, None), inputs)


def test_no_work_for_pairs_that_are_not_allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Scores computed are those of trunk and branches, P² + ΣC·P + ΣC² (half of the squares), however many groups."""
    from alignlab.models import private_api

    pairs, kernel = [], private_api.cpu_attention

    def counted(q: Tensor, k: Tensor, *rest: Any, **options: Any) -> Any:
        pairs.append(q.shape[2] * k.shape[2])
        return kernel(q, k, *rest, **options)

    monkeypatch.setattr(private_api, "cpu_attention", counted)
    for copies in (1, 3):
        pairs.clear()
        rows = rows_of([(10, [3, 4, 5])] * copies)
        x = torch.randn(1, 2, 22 * copies, 16)
        Segments(rows.spans).attend(None, x, x, x, None)
        assert sum(pairs) == copies * (10 * 10 + 12 * 10 + 9 + 16 + 25)


# ---------------------------------------------------------------------- FlexAttention, as on GPUs


def test_which_path() -> None:
    """GPUs take FlexAttention, CPUs pieces; what is not SDPA goes through a mask. No other place asks for a device."""
    assert [path(torch.device(kind)) for kind in ("cpu", "cuda", "meta")] == ["segments", "flex", "flex"]
    for device in (torch.device("cpu"), torch.device("cuda")):
        assert path(device, NAME) == path(device, "sdpa") == path(device)
        assert path(device, "eager") == path(device, None) == path(device, segments=False) == "mask"


def test_block_masks_are_those_of_all_pairs() -> None:
    """Partial and full blocks, as PyTorch finds them by looking at every pair of tokens."""
    from torch.nn.attention.flex_attention import create_block_mask

    rng = random.Random(0)
    seen = [0, 0]
    for _ in range(40):
        lengths = [0, 1, 40, 128, 256, 300]
        shape = [
            (rng.choice([1, 5, 128, 200, 300]), rng.choices(lengths, k=rng.randrange(4)))
            for _ in range(rng.randrange(1, 5))
        ]
        rows = rows_of(shape)
        mask = FlexPlan(rows.group_RL[0], rows.branch_RL[0]).mask
        length = mask.shape[-1]
        assert length % 128 == 0 and length >= 256 and length - rows.input_ids_RL.shape[1] < 256
        expected = create_block_mask(mask.mask_mod, None, None, length, length, device="cpu")
        for kind, part in enumerate(("", "full_")):
            for axis in ("kv", "q"):
                found, wanted = (
                    blocks(getattr(m, f"{part}{axis}_num_blocks"), getattr(m, f"{part}{axis}_indices"))
                    for m in (mask, expected)
                )
                assert torch.equal(found, wanted), shape
                seen[kind] += int(found.sum())
    assert min(seen) > 100


def blocks(count: Tensor, which: Tensor) -> Tensor:
    """FlexAttention's lists of blocks as a table, bool."""
    table = torch.zeros(which.shape[-2:], dtype=torch.bool)
    for row, number in enumerate(count.flatten().tolist()):
        table[row, which[0, 0, row, :number].long()] = True
    return table


@pytest.mark.parametrize("heads", [(4, 4), (4, 1)])
def test_flex_attention_is_the_mask(heads: tuple[int, int]) -> None:
    """Values and gradients, padding cut off."""
    with tiny.flex_on_cpu("aot_eager"):
        for shape in SHAPES.values():
            rows = rows_of(shape)
            plan = plan_of(rows)
            assert isinstance(plan, FlexPlan)
            check(rows, plan, torch.float64, *heads, atol=1e-12)


MODELS = [(4, 4, torch.float32), (4, 1, torch.float32), (8, 2, torch.bfloat16)]
"""Heads, heads of keys, dtype: as of a policy, a critic and a reward model."""


def counted(seen: list[int]) -> Any:
    """A compiler that counts what it is given, and whose functions return the queries."""

    def compiler(graph: Any, _: Any) -> Any:
        seen.append(len(graph.graph.nodes))
        return lambda *inputs: (next(x for x in inputs if isinstance(x, Tensor) and x.is_floating_point()),)

    return compiler


def test_each_shape_of_heads_is_compiled_once() -> None:
    """For 30 lengths of three models, by turns, inside autocast too, rows of as many blocks as heads first; with and
    without TF32, which a run turns on after its model was tried, and which changes nothing of bfloat16."""
    rng, seen = random.Random(0), list[int]()
    lengths = [256, 512, 1024, 70, 127, 128, 129, *(rng.randrange(2, 8192) for _ in range(23))]
    with tiny.flex_on_cpu(counted(seen)), torch.no_grad():
        for length in lengths:
            plan = plan_of(rows_of([(length // 2, [length - length // 2])]))
            for heads, shared, dtype in MODELS:
                query, key = (torch.zeros(1, length, h, 64, dtype=dtype).transpose(1, 2) for h in (heads, shared))
                in_tf32 = length % 3 and dtype == torch.bfloat16
                with torch.autocast("cpu", dtype=torch.bfloat16, enabled=length % 2 == 0):
                    torch.set_float32_matmul_precision("high" if in_tf32 else "highest")
                    try:
                        found = plan.attend(None, query, key, key, None)
                    finally:
                        torch.set_float32_matmul_precision("highest")
                assert found.shape == (1, length, heads, 64)
    assert len(seen) == len(MODELS)


def test_shapes_of_heads_share_no_limit() -> None:
    """PyTorch's limit is one function's: each has its own."""
    seen: list[int] = []
    with tiny.flex_on_cpu(counted(seen)), torch.no_grad(), patch.object(attention, "VARIANTS", 1):
        plan = plan_of(rows_of([(4, [3])]))
        for heads in (1, 2, 3):
            x = torch.zeros(1, heads, 7, 16)
            plan.attend(None, x, x, x, None)
    assert len(seen) == 3


def test_compiled_as_on_gpus() -> None:
    """By inductor, whose kernels CPUs have for the forward pass alone: lengths on both sides of 128 and 256."""
    generator = torch.Generator().manual_seed(0)
    with tiny.flex_on_cpu("inductor"), torch.no_grad():
        for heads, shared, dtype, atol in [(8, 2, torch.float32, 2e-6), (4, 1, torch.bfloat16, 0.03)]:
            for length in (70, 128, 256, 300):
                rows = rows_of([(length // 3, [length // 4, length - length // 3 - length // 4])])
                query, key, value = (
                    torch.randn(1, length, h, 64, generator=generator).transpose(1, 2).to(dtype)
                    for h in (heads, shared, shared)
                )
                found = plan_of(rows).attend(None, query, key, value, None)
                assert found.dtype == dtype
                expected = dense(query.double(), key.double(), value.double(), rows, None)
                torch.testing.assert_close(found.double(), expected, atol=atol, rtol=0)


@pytest.mark.parametrize(
    ("held", "size", "dtype", "stages"),
    [
        (101_376, 64, torch.bfloat16, None),  # fits as it is
        (101_376, 128, torch.bfloat16, 2),
        (101_376, 128, torch.float32, 1),
        (166_912, 128, torch.float32, None),  # A100
        (232_448, 128, torch.bfloat16, None),  # H100
        (None, 128, torch.bfloat16, None),  # a PyTorch that does not say
    ],
)
def test_blocks_fit_into_the_shared_memory_of_smaller_gpus(
    held: int | None, size: int, dtype: torch.dtype, stages: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A block of 64 queries, and so many stages of 32 keys and values, in bytes."""
    card = SimpleNamespace(**({} if held is None else {"shared_memory_per_block_optin": held}))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: card)
    options = attention.kernel_options(torch.device("cuda"), size, dtype)
    assert (options or {}).get("fwd_num_stages") == stages
    if options is not None and held is not None:
        rows = options["fwd_BLOCK_M"] + 2 * options["fwd_BLOCK_N"] * options["fwd_num_stages"]
        assert rows * size * dtype.itemsize + 4096 <= held
    assert attention.kernel_options(torch.device("cpu"), size, dtype) is None


def test_beyond_the_limit_is_an_error() -> None:
    """Never the matrix of all scores."""
    rows = rows_of([(4, [3])])
    x, other = torch.randn(1, 2, 7, 16), torch.randn(1, 3, 7, 16)
    with tiny.flex_on_cpu(), torch.no_grad(), patch.object(attention, "VARIANTS", 1):
        plan = plan_of(rows)
        plan.attend(None, x, x, x, None)
        one_for_all = compiled_for(x)
        with patch.object(attention, "compiled", lambda *_: one_for_all):
            plan.attend(None, x, x, x, None)
            with pytest.raises(AlignlabError, match=r"3 heads of 16.*[Rr]ecompile.*model\.layout=packed"):
                plan.attend(None, other, other, other, None)


def compiled_for(x: Tensor) -> Any:
    """The function compiled for these queries."""
    shape = (x.shape[1], x.shape[1], x.shape[3], x.shape[3])
    return attention.compiled(*shape, x.dtype, x.device, (False, False, False, False), None)
