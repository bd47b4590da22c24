"""Batches with given log-probs, without a model."""

from __future__ import annotations

import torch
from torch import Tensor

from alignlab.core import Algorithm, Batch, Group, Outputs, Response

Known = dict[str, float | list[float]]


def group(*responses: Known, length: int = 1, origin: str = "data.jsonl:3") -> Group:
    """A group with a response of `length` tokens for each set of columns."""
    return Group([1], [Response([2] * length, columns=dict(columns)) for columns in responses], origin)


def loss(algorithm: Algorithm, groups: list[Group], dtype: torch.dtype = torch.float32, **outputs: list) -> Tensor:
    """The algorithm's losses where the forward pass says `outputs`."""
    values = {name: torch.tensor(value, dtype=dtype) for name, value in outputs.items()}
    return algorithm.loss(Outputs(**values), Batch(groups))[0]
