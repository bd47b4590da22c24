"""A user's own scorers by the public API, as a notebook calls them. (By the commands: corpus/code.yaml.)"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

import alignlab as al
from alignlab.core import AlignlabError, Group, Response


class Mine:
    """Fills a reward with whatever a function says."""

    fills = ("reward",)

    def __init__(self, value: Callable[[], Any]) -> None:
        self.value = value

    def score(self, groups: Any) -> None:
        for response in (r for g in groups for r in g.responses):
            response.columns["reward"] = self.value()


def fail() -> Any:
    raise KeyError("gold")


def leave() -> Any:
    raise SystemExit(0)


def groups() -> list[Group]:
    return [Group([1], [Response([2, 3], text="a"), Response([4, 5], text="b")], "records:1", "p")]


BAD: dict[str, tuple[Callable[[], Any], str]] = {
    "raises": (fail, "KeyError: 'gold'"),
    "exits": (leave, "SystemExit"),
    "None": (lambda: None, r"no number \(None\)"),
    "a text": (lambda: "1", r"no number \(str\)"),
    "NaN": (lambda: float("nan"), r"not finite \(nan\)"),
    "a tensor of NaN": (lambda: torch.tensor(float("nan")), r"not finite \(nan\)"),
    "400 digits": (lambda: 10**400, r"no number \(int\)"),
    "a complex number": (lambda: 1j, r"no number \(complex\)"),
}


@pytest.mark.parametrize(("value", "said"), BAD.values(), ids=BAD.keys())
def test_a_scorer_and_a_function_that_say_something_else(value: Callable[[], Any], said: str) -> None:
    with pytest.raises(AlignlabError, match=rf"^records:1: .*Mine\.score.*{said}"):
        al.score(groups(), Mine(value))
    with pytest.raises(AlignlabError, match=rf"^records:1: .*{said}"):
        al.score(groups(), lambda prompt, response, extra: value())


MISFITS: list[Any] = [[1.0], [1.0, float("inf")], [[1.0, 2.0]], ["a", "b"], np.zeros(3), torch.zeros(2, 2)]


@pytest.mark.parametrize("value", MISFITS, ids=str)
def test_values_for_tokens_that_do_not_fit(value: Any) -> None:
    with pytest.raises(AlignlabError, match=r"^records:1: .*Mine\.score: 'reward' of response 1 (has|is)"):
        al.score(groups(), Mine(lambda: value))


@pytest.mark.parametrize("value", [1, True, 0.5, np.float32(0.5), torch.tensor(0.5), [1.0, 2.0], np.zeros(2)], ids=str)
def test_numbers_of_all_kinds_are_taken(value: Any) -> None:
    found = al.score(groups(), Mine(lambda: value))
    assert np.array_equal(np.asarray(found[0].responses[0].columns["reward"]), np.asarray(value))
