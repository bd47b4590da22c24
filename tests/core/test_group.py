"""What there is for each token, as arrays."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from alignlab.core import AlignlabError, Group, Response
from alignlab.core.group import numbers
from alignlab.core.parts import score


@pytest.mark.parametrize(
    ("given", "dtype"),
    [
        ([1, -1, 0], np.float32),
        ([0.1, 0.5], np.float64),
        ([1e300], np.float64),
        ([2**24 + 1], np.float64),
        (np.array([0.1], np.float32), np.float32),
        (np.array([0.5, 0.1]), np.float64),
        ([float(np.float32(-0.1))], np.float32),
        ([], np.float32),
    ],
)
def test_an_array_takes_no_more_than_its_numbers_need_and_changes_none(given: Any, dtype: Any) -> None:
    found = numbers(given)
    assert found.dtype == dtype
    assert found.tolist() == [float(x) for x in given]


class Gives:
    """A scorer of a user's that gives each response the same."""

    fills = ("logp",)

    def __init__(self, value: Any) -> None:
        self.value = value

    def score(self, groups: Any) -> None:
        for response in (r for g in groups for r in g.responses):
            response.columns["logp"] = self.value


@pytest.mark.parametrize(
    "kind",
    [
        list,
        tuple,
        np.array,
        torch.tensor,
        lambda x: torch.tensor(x, dtype=torch.bfloat16),
        lambda x: torch.tensor(x, requires_grad=True),
    ],
)
def test_whatever_a_scorer_gives_becomes_an_array(kind: Callable[[list[float]], Any]) -> None:
    group = Group([1], [Response([2, 3])])
    score(Gives(kind([0.5, -2.0])), [group])
    found = group.responses[0].columns["logp"]
    assert isinstance(found, np.ndarray) and found.dtype == np.float32
    assert found.tolist() == [0.5, -2.0]


@pytest.mark.parametrize("value", [[0.5], [[0.5, 1.0]], ["a", "b"], [0.5, float("nan")], [0.5, None]])
def test_what_is_not_a_number_for_each_token_is_refused(value: Any) -> None:
    with pytest.raises(AlignlabError, match=r"Gives\.score: 'logp' of response 1 .*one for each token; got \["):
        score(Gives(value), [Group([1], [Response([2, 3])])])
