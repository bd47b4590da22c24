"""Attention piece by piece equals attention through the mask of all pairs, values and gradients, in float64."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from torch import Tensor

from alignlab.core import Group, Response
from alignlab.models.attention import FlexPlan, Segments
from alignlab.models.packing import Rows, lay_out

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


def check(rows: Rows, plan: Segments, dtype: torch.dtype, heads: int, shared: int, atol: float) -> None:
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


@pytest.mark.parametrize("heads", [(4, 4), (4, 2)])
@pytest.mark.parametrize("name", ["several groups", "one sequence"])
def test_flex_attention_is_the_mask(name: str, heads: tuple[int, int]) -> None:
    """The plan of GPUs, here uncompiled and without gradients, which FlexAttention has on GPUs alone."""
    rows = rows_of(SHAPES[name])
    query, key, value = (torch.randn(1, h, rows.input_ids_RL.shape[1], 16) for h in (heads[0], heads[1], heads[1]))
    found = FlexPlan(rows).attend(None, query, key, value, 0.3)
    torch.testing.assert_close(found, dense(query, key, value, rows, 0.3), atol=5e-6, rtol=0)


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
