"""Products with few rows, again and again: the same numbers, few numbers of rows for oneDNN, the plain way without."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from alignlab.core import private_api
from alignlab.core.private_api import REACHES
from alignlab.models.private_api import ROWS, laid_out, product_with_laid_out
from alignlab.rollout import quick


@pytest.fixture(autouse=True)
def large(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quick, "LARGE", 30 * 40)


def layers() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(40, 30), nn.Linear(30, 20))


def test_large_weights_are_laid_out_for_few_rows() -> None:
    network: Any = layers()
    own = [layer.forward for layer in network]
    with torch.no_grad(), quick.quick_products(network):
        assert isinstance(network[0].forward, quick._Product) and network[1].forward == own[1], "small ones stay"
        for rows in [*[3] * (quick.PATIENCE + 2), 200, 1, 0]:
            x = torch.randn(1, rows, 40)
            expected = F.linear(x, network[0].weight, network[0].bias)
            torch.testing.assert_close(network[0](x), expected, atol=1e-5, rtol=1e-5)
        assert network[0].forward._weight.is_mkldnn
    assert [layer.forward for layer in network] == own


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("columns", [8, 600])
@pytest.mark.parametrize("shape", [(5,), (16,), (1, 33), (2, 3), (1, 127)])
def test_as_torch_says(shape: tuple[int, ...], columns: int, bias: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(*shape, 24, generator=generator)
    weight = torch.randn(columns, 24, generator=generator)
    b = torch.randn(columns, generator=generator) if bias else None
    found = product_with_laid_out(x, laid_out(weight, 16), b)
    assert found is not None
    assert found.shape == (*shape, columns)
    assert found.is_contiguous()
    expected = F.linear(x.double(), weight.double(), None if b is None else b.double())
    torch.testing.assert_close(found.double(), expected, atol=1e-4, rtol=0)


def test_onednn_sees_few_numbers_of_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the rows of a run: for every new number it keeps 0.3 MB."""
    seen: set[int] = set()
    real = torch.ops.mkldnn._linear_pointwise

    def watched(x: Any, *arguments: Any) -> Any:
        seen.add(x.shape[0])
        return real(x, *arguments)

    monkeypatch.setattr(torch.ops.mkldnn, "_linear_pointwise", watched)
    network = layers()
    with torch.no_grad(), quick.quick_products(network):
        for rows in [*[1] * quick.PATIENCE, *range(1, 300)]:
            network[0](torch.ones(rows, 40))
    assert seen == set(range(ROWS, quick.FEW + 1, ROWS))


def test_the_blas_takes_over_where_there_is_no_room(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*arguments: Any) -> None:
        raise RuntimeError("could not create a primitive")

    network: Any = layers()
    x = torch.ones(16, 40)
    with torch.no_grad(), quick.quick_products(network):
        for _ in range(quick.PATIENCE):
            network[0](x)
        monkeypatch.setattr(torch.ops.mkldnn, "_linear_pointwise", full)
        assert torch.equal(network[0](x), F.linear(x, network[0].weight, network[0].bias))


@pytest.fixture
def without(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    def fails() -> None:
        raise AttributeError("no such operator")

    name = "laid-out weights"
    monkeypatch.setitem(REACHES, name, replace(REACHES[name], probe=fails))
    for cached in (private_api.problem, private_api._warn):
        cached.cache_clear()
    yield
    for cached in (private_api.problem, private_api._warn):
        cached.cache_clear()


@pytest.mark.usefixtures("without")
def test_without_the_operators_layers_stay_as_they_are_and_it_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    network: Any = layers()
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            with quick.quick_products(network):
                assert "forward" not in vars(network[0])
    (record,) = caplog.records
    assert "no such operator" in record.getMessage()
