"""A step over a global batch: its means, and how often it waits for its device."""

from __future__ import annotations

import re
from collections import Counter
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from alignlab.algorithms.sft import SFT
from alignlab.core import Batch, Metrics, NonFiniteError, Outputs
from alignlab.training.step import Means, means, run_batch
from alignlab.training.trainer import Trainer
from tests import tiny


def test_means_are_over_what_all_processes_read() -> None:
    """1, 2 and 3 on one process, 6 on another, and a metric of the other alone; one that nobody has is left out."""
    mine, theirs = Means(), Means()
    for values in ([1.0, 2.0], [3.0]):
        mine.add("loss", torch.tensor(values))
    mine.add("nothing", torch.zeros(0))
    theirs.add("loss", torch.tensor([6.0]))
    theirs.add("margin", torch.tensor([0.5, 1.5]))
    assert means([mine.of(), theirs.of()]) == {"loss": 3.0, "margin": 1.0}
    assert means([Means().of()]) == {}


class Waits(TorchDispatchMode):
    """Counts what makes a GPU's host wait: reading a number off a tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls[str(func)] += 1
        return func(*args, **(kwargs or {}))


def waits(trainer: Trainer, groups: list[Any], budget: int) -> tuple[int, int]:
    """Micro-batches of a step, and how often it reads a number."""
    with Waits() as found:
        run_batch(groups, algorithm=trainer.algorithm, engine=trainer.engine, max_tokens_per_microbatch=budget)
    trainer.engine.discard()
    return len(trainer.model.micro_batches(groups, budget)), found.calls["aten._local_scalar_dense.default"]


def test_a_step_waits_no_more_often_for_more_micro_batches() -> None:
    trainer = Trainer(tiny.model(), SFT(), lr=1e-3)
    groups = tiny.groups([(5, [6])] * 12)
    few, many = (waits(trainer, groups, budget) for budget in (10_000, 20))
    assert few[0] == 1 and many[0] > 4
    assert many[1] == few[1]


class Spoilt(SFT):
    """The loss of a record of 6 tokens is not finite."""

    def loss(self, outputs: Outputs, batch: Batch) -> tuple[torch.Tensor, Metrics]:
        loss_T, metrics = super().loss(outputs, batch)
        return torch.where(batch.length_N[batch.response_T] == 6, torch.nan, loss_T), metrics


@pytest.mark.parametrize("budget", [10_000, 15])
def test_records_without_a_finite_loss_are_named(budget: int) -> None:
    """In whichever micro-batches they are."""
    trainer = Trainer(tiny.model(), Spoilt(), lr=1e-3)
    groups = tiny.groups([(5, [4]), (5, [6]), (5, [3]), (5, [6])])
    with pytest.raises(NonFiniteError, match=r"for 2 record\(s\): data") as failed:
        run_batch(groups, algorithm=trainer.algorithm, engine=trainer.engine, max_tokens_per_microbatch=budget)
    assert sorted(re.findall(r"data\.jsonl:\d", str(failed.value))) == ["data.jsonl:2", "data.jsonl:4"]
