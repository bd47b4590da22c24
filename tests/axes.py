"""Axis suffixes are checked as types: within a call, all tensors named `…_P` have one length, and so on.

`checked_axes` watches every call into the files it is given. When a call returns, its tensors (arguments and local
variables, the values of dictionaries with such keys left out) are held against jaxtyping's `Shaped[Tensor, "P"]`, all
in one scope, so that an axis has the same length wherever it appears. The package itself needs no decorators and no
jaxtyping for it.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

from jaxtyping import Shaped, jaxtyped
from torch import Tensor

import alignlab
from alignlab.core import Batch

ALIGNLAB = Path(alignlab.__file__).parent
SUFFIX = re.compile(r"_([TNGPSVDL]{1,2})$")
"""The axes that a name ends with."""


def wrong_axes(variables: dict[str, Any]) -> list[str]:
    """What is wrong with the shapes of the variables of one call; a `Batch` among them fixes T, N and G."""
    tensors = {name: v for name, v in variables.items() if isinstance(v, Tensor) and SUFFIX.search(name)}
    for batch in (v for v in variables.values() if isinstance(v, Batch)):
        tensors = {"batch.response_T": batch.response_T, "batch.group_N": batch.group_N} | tensors
        if "pairs" in vars(batch):
            tensors = {"batch.pairs.winner_P": batch.pairs.winner_P} | tensors
    found, sizes = [], []
    with jaxtyped("context"):
        for name, tensor in tensors.items():
            axes = SUFFIX.search(name)
            assert axes is not None
            if not isinstance(tensor, Shaped[Tensor, " ".join(axes[1])]):
                found.append(f"{name} has shape {tuple(tensor.shape)}, beside {', '.join(sizes) or 'nothing'}")
            sizes.append(f"{name} {tuple(tensor.shape)}")
    return found


@contextmanager
def checked_axes(*folders: Path) -> Iterator[list[str]]:
    """Check every call into the files below `folders` in this thread. Yields what is found to be wrong, as it is found.

    Raises:
        AssertionError: at the end, with all that was wrong.
    """
    below, found = tuple(str(folder) for folder in folders), list[str]()

    def returned(frame: FrameType, event: str, argument: Any) -> None:
        if event != "return" or not frame.f_code.co_filename.startswith(below):
            return
        for problem in wrong_axes(frame.f_locals):
            place = f"{Path(frame.f_code.co_filename).name}:{frame.f_code.co_name}"
            found.append(f"{place}: {problem}")

    before = sys.getprofile()
    sys.setprofile(returned)
    try:
        yield found
    finally:
        sys.setprofile(before)
    assert not found, "\n".join(found)
