"""Ragged operations against hand arithmetic, loops and finite differences."""

from __future__ import annotations

import math
import random
import statistics
from collections.abc import Callable

import pytest
import torch

from alignlab.core import (
    segment_count,
    segment_max,
    segment_mean,
    segment_std,
    segment_sum,
    segments,
)

VALUES = [1.0, 2.0, 6.0, -3.0, 5.0]
SEGMENT = [0, 0, 0, 2, 3]  # segments 1 and 4 are empty
BY_HAND = {
    segment_sum: [9.0, 0.0, -3.0, 5.0, 0.0],
    segment_mean: [3.0, 0.0, -3.0, 5.0, 0.0],
    segment_max: [6.0, -math.inf, -3.0, 5.0, -math.inf],
    segment_std: [math.sqrt(7.0), 0.0, 0.0, 0.0, 0.0],  # (4 + 1 + 9) / (3 - 1)
}
LOOPS: dict[Callable, Callable[[list[float]], float]] = {
    segment_sum: sum,
    segment_mean: lambda x: statistics.fmean(x) if x else 0.0,
    segment_max: lambda x: max(x, default=-math.inf),
    segment_std: lambda x: statistics.stdev(x) if len(x) > 1 else 0.0,
}


@pytest.mark.parametrize("operation", BY_HAND, ids=lambda f: f.__name__)
def test_operations_by_hand(operation: Callable) -> None:
    found = operation(torch.tensor(VALUES), torch.tensor(SEGMENT), 5)
    assert found.tolist() == pytest.approx(BY_HAND[operation])


@pytest.mark.parametrize("operation", LOOPS, ids=lambda f: f.__name__)
@pytest.mark.parametrize("seed", range(5))
def test_operations_equal_loops_in_any_order(operation: Callable, seed: int) -> None:
    rng = random.Random(seed)
    count = rng.randrange(1, 7)
    segment = [rng.randrange(count) for _ in range(rng.randrange(0, 20))]
    values = [rng.uniform(-5, 5) for _ in segment]
    found = operation(torch.tensor(values, dtype=torch.float64), torch.tensor(segment, dtype=torch.int64), count)
    expected = [LOOPS[operation]([v for v, s in zip(values, segment, strict=True) if s == i]) for i in range(count)]
    assert found.shape == (count,)
    assert found.tolist() == pytest.approx(expected)


@pytest.mark.parametrize("operation", BY_HAND, ids=lambda f: f.__name__)
def test_gradients_are_those_of_finite_differences(operation: Callable) -> None:
    values = torch.tensor(VALUES, dtype=torch.float64, requires_grad=True)

    def filled(x: torch.Tensor) -> torch.Tensor:
        return operation(x, torch.tensor(SEGMENT), 5)[[0, 2, 3] if operation is not segment_std else [0]]

    assert torch.autograd.gradcheck(filled, (values,))


@pytest.mark.parametrize("operation", [segment_sum, segment_mean, segment_std], ids=lambda f: f.__name__)
def test_empty_single_and_equal_items_have_finite_gradients(operation: Callable) -> None:
    values = torch.tensor([4.0, 2.0, 2.0, 1.0, 3.0], requires_grad=True)
    operation(values, torch.tensor([0, 2, 2, 3, 3]), 5).sum().backward()
    assert values.grad is not None
    assert torch.isfinite(values.grad).all()
    if operation is segment_std:  # (x, y) of std |x - y| / sqrt(2), and nothing to say of the others
        slope = 1 / math.sqrt(2)
        assert values.grad.tolist() == pytest.approx([0, 0, 0, -slope, slope])


def test_operations_on_no_items_give_neutral_values() -> None:
    nothing, nowhere = torch.zeros(0), torch.zeros(0, dtype=torch.int64)
    assert segment_sum(nothing, nowhere, 2).tolist() == [0, 0]
    assert segment_mean(nothing, nowhere, 2).tolist() == [0, 0]
    assert segment_std(nothing, nowhere, 2).tolist() == [0, 0]
    assert segment_max(nothing, nowhere, 2).tolist() == [-math.inf, -math.inf]
    assert segment_count(nowhere, 2).tolist() == [0, 0]
    assert segment_sum(nothing, nowhere, 0).shape == (0,)


def test_segment_count_by_hand() -> None:
    assert segment_count(torch.tensor([2, 0, 2, 2]), 4).tolist() == [1, 0, 3, 0]


def test_segments_from_lengths() -> None:
    lengths = [2, 0, 1, 3]
    assert segments(lengths).tolist() == [0, 0, 2, 3, 3, 3]
    assert segments(torch.tensor(lengths)).tolist() == [0, 0, 2, 3, 3, 3]
    assert segments([]).tolist() == []
    assert segments(lengths).dtype == torch.int64
    assert segment_sum(torch.arange(6.0), segments(lengths), 4).tolist() == [1, 0, 2, 12]
