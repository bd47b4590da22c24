"""Responses of unequal lengths, each with the log-probs that the forward pass shall say it has."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from alignlab.core import Algorithm, Batch, Group, Metrics, Outputs, Response
from tests.algorithms.common import Known


@dataclass
class Made:
    """A group and the log-probs of its responses' tokens."""

    group: Group
    logp: list[list[float]]


def made(*responses: tuple[list[float], Known], prompt: int = 1, own: int = 0, origin: str = "data.jsonl:3") -> Made:
    """A group with a response of as many tokens as it has log-probs, for each pair of log-probs and columns.

    Args:
        own: how many of the first responses came with the record; the others are the policy's.
    """
    made = [
        Response([2] * len(logp), columns=dict(columns), source="data" if i < own or not own else "policy")
        for i, (logp, columns) in enumerate(responses)
    ]
    return Made(Group([prompt], made, origin), [logp for logp, _ in responses])


def flat(*groups: Made) -> list[float]:
    return [value for g in groups for logp in g.logp for value in logp]


def run(algorithm: Algorithm, *groups: Made) -> tuple[Tensor, Metrics]:
    """Losses and metrics, in double precision but for the columns."""
    outputs = Outputs(logp_T=torch.tensor(flat(*groups), dtype=torch.float64))
    return algorithm.loss(outputs, Batch([g.group for g in groups]))


def found(algorithm: Algorithm, *groups: Made) -> list[float]:
    return run(algorithm, *groups)[0].tolist()


def with_columns(response: Response, **columns: float | list[float]) -> Response:
    return replace(response, columns={**response.columns, **columns})
