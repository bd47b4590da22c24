"""Batches with given log-probs, without a model."""

from __future__ import annotations

import torch
from torch import Tensor

from alignlab.core import Algorithm, Batch, Group, Outputs, Response, aggregate

Known = dict[str, float | list[float]]


def group(*responses: Known, length: int = 1, origin: str = "data.jsonl:3") -> Group:
    """A group with a response of `length` tokens for each set of columns."""
    return Group([1], [Response([2] * length, columns=dict(columns)) for columns in responses], origin)


def loss(algorithm: Algorithm, groups: list[Group], dtype: torch.dtype = torch.float32, **outputs: list) -> Tensor:
    """The algorithm's losses where the forward pass says `outputs`."""
    values = {name: torch.tensor(value, dtype=dtype) for name, value in outputs.items()}
    return algorithm.loss(Outputs(**values), Batch(groups))[0]


def means(algorithm: Algorithm, groups: list[Group], splits: list[int], **outputs: list[float]) -> dict[str, float]:
    """Loss and metrics over all groups, read in micro-batches of these numbers of groups, and what is derived."""
    sums: dict[str, list[float]] = {}
    start = place = token = 0
    units = sum(Batch(groups[i : i + 1]).count(algorithm.unit) for i in range(len(groups)))
    total = 0.0
    for count in splits:
        batch = Batch(groups[start : start + count])
        values = {}
        for name, value in outputs.items():
            first, size = (token, batch.T) if name.endswith(("_T", "_TL")) else (place, batch.N)
            values[name] = torch.tensor(value[first : first + size])
        found, metrics = algorithm.loss(Outputs(**values), batch)
        total += float(aggregate(found, units))
        for name, vector in metrics.items():
            sums.setdefault(name, []).extend(vector.double().tolist())
        start, place, token = start + count, place + batch.N, token + batch.T
    assert start == len(groups)
    result = {name: sum(v) / len(v) for name, v in sums.items() if v}
    return {"loss": total, **result, **algorithm.derive(result)}
