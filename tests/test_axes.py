"""The checker of axis suffixes finds what it is there for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from alignlab.core import Batch, Group, Response
from tests.axes import ALIGNLAB, checked_axes, shapes, wrong_axes

HERE = Path(__file__).parent


def two_groups() -> Batch:
    """Two groups, three responses, six tokens."""
    return Batch([Group([1], [Response([2, 2]), Response([3])]), Group([1], [Response([4, 4, 4])])])


@pytest.mark.parametrize(
    "variables",
    [
        {"margin_P": torch.zeros(3), "beta": 0.1},
        {"margin_P": torch.zeros(3), "probability_P": 1.0, "reward_N": torch.zeros(2)},
        {"step_TL": torch.zeros(4, 2), "right_T": torch.zeros(4)},
        {"batch": two_groups(), "logp_T": torch.zeros(6), "logp_N": torch.zeros(3), "z_G": torch.zeros(2)},
    ],
)
def test_consistent_shapes_pass(variables: dict[str, Any]) -> None:
    assert wrong_axes(shapes(variables)) == []


@pytest.mark.parametrize(
    ("variables", "name"),
    [
        ({"margin_P": torch.zeros(3), "probability_P": torch.ones(2)}, "probability_P"),
        ({"margin_P": torch.zeros(3, 1)}, "margin_P"),
        ({"step_TL": torch.zeros(4, 2), "right_T": torch.zeros(3)}, "right_T"),
        ({"batch": two_groups(), "logp_N": torch.zeros(6)}, "logp_N"),
        ({"batch": two_groups(), "logp_T": torch.zeros(3)}, "logp_T"),
    ],
)
def test_a_tensor_of_another_length_is_named(variables: dict[str, Any], name: str) -> None:
    (problem,) = wrong_axes(shapes(variables))
    assert problem.startswith(f"{name} has shape")


def mean_over_tokens_by_mistake(logp_T: Tensor, batch: Batch) -> Tensor:
    logp_N = logp_T * 2  # still one for each token
    return logp_N.sum()


def test_local_variables_of_a_call_are_checked() -> None:
    with pytest.raises(AssertionError, match="mean_over_tokens_by_mistake: logp_N"), checked_axes(HERE):
        mean_over_tokens_by_mistake(torch.zeros(6), two_groups())


def test_calls_into_other_folders_are_not_checked() -> None:
    with checked_axes(ALIGNLAB) as found:
        mean_over_tokens_by_mistake(torch.zeros(6), two_groups())
    assert found == []
