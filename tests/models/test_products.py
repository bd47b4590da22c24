"""Products by oneDNN or by the BLAS: the same numbers, and few numbers of rows."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from alignlab.models import products
from alignlab.models.products import even, linear

needs_onednn = pytest.mark.skipif(products._ONEDNN is None, reason="this PyTorch has no oneDNN")


def laid_out(weight: Tensor) -> Tensor:
    found: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight, 16)
    assert found.is_mkldnn
    return found


@pytest.mark.parametrize(
    ("rows", "expected"),
    [(1, 16), (16, 16), (17, 32), (500, 512), (512, 512), (513, 544), (1024, 1024), (1025, 1088), (2047, 2048)],
)
def test_even_numbers(rows: int, expected: int) -> None:
    """Steps of 16 up to 512, of 32 up to 1,024, of 64 up to 2,048."""
    assert even(rows) == expected


def test_there_are_few_of_them_and_little_is_added() -> None:
    found = {even(n) for n in range(1, 4097)}
    assert len(found) == 32 + 3 * 16
    assert all(even(n) == n for n in found)
    assert all(even(n) <= n * 17 / 16 for n in range(256, 4097))


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("columns", [8, 600])
@pytest.mark.parametrize("shape", [(5,), (16,), (1, 33), (2, 3), (1, 513), (0,)])
def test_as_torch_says(shape: tuple[int, ...], columns: int, bias: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(*shape, 24, generator=generator)
    weight = torch.randn(columns, 24, generator=generator)
    b = torch.randn(columns, generator=generator) if bias else None
    found = linear(x, weight, b)
    expected = F.linear(x.double(), weight.double(), None if b is None else b.double())
    assert found.shape == (*shape, columns)
    assert found.is_contiguous()
    torch.testing.assert_close(found.double(), expected, atol=1e-4, rtol=0)
    torch.testing.assert_close(linear(x, weight.t().contiguous().t(), b), found, atol=1e-4, rtol=0)


@needs_onednn
def test_onednn_sees_even_numbers_of_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    real = products._ONEDNN

    def watched(x: Any, *arguments: Any) -> Any:
        seen.append(x.numel() // x.shape[-1])
        return real(x, *arguments)

    monkeypatch.setattr(products, "_ONEDNN", watched)
    for rows in range(1, 700):
        for columns in (8, 600):
            linear(torch.ones(rows, 4), torch.ones(columns, 4))
    assert set(seen) == {even(n) for n in range(1, 700)}


@needs_onednn
def test_the_blas_takes_over_where_there_is_no_room(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*arguments: Any) -> None:
        raise RuntimeError("could not create a primitive")

    monkeypatch.setattr(products, "_ONEDNN", full)
    x, weight = torch.ones(16, 4), torch.ones(3, 4)
    assert torch.equal(linear(x, weight), F.linear(x, weight))
    assert torch.equal(linear(x, laid_out(weight)), F.linear(x, weight))


@needs_onednn
@pytest.mark.parametrize("rows", [3, 16, 33])
@pytest.mark.parametrize("columns", [8, 600])
def test_weights_that_are_laid_out(rows: int, columns: int) -> None:
    generator = torch.Generator().manual_seed(0)
    x, weight = torch.randn(1, rows, 24, generator=generator), torch.randn(columns, 24, generator=generator)
    torch.testing.assert_close(linear(x, laid_out(weight)), F.linear(x, weight), atol=1e-4, rtol=0)
