"""Axis suffixes are checked as types: within a call, all tensors named `…_P` have one length, and so on.

`checked_axes` watches every call into the files it is given. When a call returns, its tensors (arguments and local
variables whose names end with axes) are held against jaxtyping's `Shaped[Tensor, "P"]`, all in one scope, so that an
axis has the same length wherever it appears. The package itself needs no decorators and no jaxtyping for it.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

from jaxtyping import Shaped, jaxtyped
from torch import Tensor

import alignlab
from alignlab.core import Batch

ALIGNLAB = Path(alignlab.__file__).parent
SUFFIX = re.compile(r"_([TNGPSVDL]{1,2})$")
"""The axes that a name ends with."""

Shapes = tuple[tuple[str, tuple[int, ...]], ...]
"""Names and shapes of the tensors of a call."""


def shapes(variables: dict[str, Any]) -> Shapes:
    """The tensors whose names end with axes; a `Batch` among the variables adds its own T, N, G and P."""
    found = {}
    for value in variables.values():
        if isinstance(value, Batch):
            found |= {"batch.response_T": value.response_T, "batch.group_N": value.group_N}
            if "pairs" in vars(value):  # they are made when they are first asked for
                found["batch.pairs.winner_P"] = value.pairs.winner_P
    found |= {name: value for name, value in variables.items() if isinstance(value, Tensor) and SUFFIX.search(name)}
    return tuple((name, tuple(value.shape)) for name, value in found.items())


@cache
def wrong_axes(tensors: Shapes) -> list[str]:
    """What is wrong with the shapes of the tensors of one call."""
    found, before = [], []
    with jaxtyped("context"):
        for name, shape in tensors:
            axes = SUFFIX.search(name)
            assert axes is not None
            if not isinstance(_Shape(shape), Shaped[_Shape, " ".join(axes[1])]):
                found.append(f"{name} has shape {shape}, beside {', '.join(before) or 'nothing'}")
            before.append(f"{name} {shape}")
    return found


class _Shape:
    """All that jaxtyping asks of an array: so nothing is kept alive but numbers."""

    dtype = "float32"

    def __init__(self, shape: tuple[int, ...]) -> None:
        self.shape = shape


@contextmanager
def checked_axes(*folders: Path) -> Iterator[list[str]]:
    """Check every call into the files below `folders` in this thread. Yields what is found to be wrong, as it is found.

    Raises:
        AssertionError: at the end, with all that was wrong.
    """
    below, found = tuple(str(folder) for folder in folders), list[str]()

    @cache
    def has_axes(code: CodeType) -> bool:
        return code.co_filename.startswith(below) and any(map(SUFFIX.search, code.co_varnames + code.co_cellvars))

    def called(frame: FrameType, event: str, argument: Any) -> Callable | None:
        if not has_axes(frame.f_code):
            return None
        frame.f_trace_lines = False
        return returned

    def returned(frame: FrameType, event: str, argument: Any) -> Callable:
        if event == "return":
            place = f"{Path(frame.f_code.co_filename).name}:{frame.f_code.co_name}"
            found.extend(f"{place}: {problem}" for problem in wrong_axes(shapes(frame.f_locals)))
        return returned

    before = sys.gettrace()
    sys.settrace(called)
    try:
        yield found
    finally:
        sys.settrace(before)
    assert not found, "\n".join(found)
