"""Losses and gradients that are no numbers: the run stops and names records, or leaves the step out, in every mode."""

from __future__ import annotations

import json
import logging
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from alignlab.core import NonFiniteError
from alignlab.training import step, trainer
from tests.training import forks, runs

MORE = [
    "adapter=lora",
    "optimizer=adamw",
    "optimizer.lr=1e-3",
    "training.batch_size=4",
    "training.progress=off",
    "training.max_tokens_per_microbatch=30",  # several micro-batches
    "training.checkpoint_every=1",
    "training.keep_last=9",
]

BAD = 3
"""The step whose loss or gradient is not finite, counted from 1."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("non-finite")
    runs.prepare(made)
    return made


class Poison:
    """Makes one step's loss, or only its gradient, NaN: in the last micro-batch of the first process."""

    def __init__(self, patch: pytest.MonkeyPatch, what: str) -> None:
        import os

        self.step = 0
        run_batch, micro_batch, aggregate = step.run_batch, step._micro_batch, step.aggregate
        seen: list[int] = []

        def counted(*arguments: Any, **options: Any) -> Any:
            self.step += 1
            seen.clear()
            return run_batch(*arguments, **options)

        def here() -> bool:
            return self.step == BAD and os.environ.get("RANK", "0") == "0" and len(seen) == 1

        def poisoned(*arguments: Any) -> Any:
            seen.append(1)
            loss, *rest = micro_batch(*arguments)
            return (loss * math.nan if here() and what == "loss" else loss, *rest)

        def infinite(loss: torch.Tensor, *arguments: Any) -> torch.Tensor:
            value = aggregate(loss, *arguments)
            return value + (value - value.detach()) * math.inf if here() else value

        patch.setattr(step, "run_batch", counted)
        patch.setattr(step, "_micro_batch", poisoned)
        patch.setattr(step, "aggregate", infinite)


class Absent:
    """A run that does nothing at all in that step."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        take = trainer.Trainer._take_step

        def _step(self: Any, groups: Any) -> Any:
            if self.state.step == BAD - 1:
                return step.Pass({}, 0, 0, 0), 0.0
            return take(self, groups)

        patch.setattr(trainer.Trainer, "_take_step", _step)


def trained(folder: Path, out: str, at: int) -> dict[str, torch.Tensor]:
    """Weights and optimiser state in the checkpoint of a step."""
    from safetensors.torch import load_file

    found: dict[str, torch.Tensor] = {}
    for path in (folder / out / f"checkpoints/step-{at:08}").glob("trained-*"):
        found |= load_file(path)
    return found


@pytest.mark.parametrize("what", ["loss", "gradient"])
@pytest.mark.parametrize("mode", ["single", "ddp", "zero1", "zero2", "zero3", "fsdp"])
def test_the_step_is_left_out_as_if_it_had_never_been(folder: Path, mode: str, what: str) -> None:
    """Weights and optimiser state are bit for bit as before it, and what follows is what follows without it."""
    if mode in ("ddp", "zero1", "zero2") and what == "gradient":
        pytest.skip("as in single and zero3")
    more = [*MORE, f"distributed={mode}", "training.non_finite=skip"]

    def train(out: str) -> None:
        if mode == "single":
            runs.train(folder, "dpo", out, *more)
        else:
            forks.train(folder, "dpo", out, *more, "distributed.timeout=20")

    if not (folder / f"{mode}-absent").exists():
        with pytest.MonkeyPatch.context() as patch:
            Absent(patch)
            train(f"{mode}-absent")
    with pytest.MonkeyPatch.context() as patch:
        Poison(patch, what)
        train(f"{mode}-{what}")
    before, after = (trained(folder, f"{mode}-{what}", at) for at in (BAD - 1, BAD))
    assert runs.identical(before, after)
    assert runs.identical(trained(folder, f"{mode}-absent", 6), trained(folder, f"{mode}-{what}", 6))
    assert not runs.identical(after, trained(folder, f"{mode}-{what}", 6))
    lines = runs.metrics(folder, f"{mode}-{what}")
    assert [line.get("non_finite_steps", 0) for line in lines] == [0, 0, 1, 1, 1, 1]
    assert all(math.isfinite(line["loss"]) for line in lines if line["step"] != BAD)


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_a_warning_or_an_error_names_the_records(folder: Path, what: str, caplog: pytest.LogCaptureFixture) -> None:
    with pytest.MonkeyPatch.context() as patch, caplog.at_level(logging.WARNING):
        Poison(patch, what)
        runs.train(folder, "dpo", f"warned-{what}", *MORE, "training.non_finite=skip")
    said = [r.getMessage() for r in caplog.records if "left out" in r.getMessage()]
    assert len(said) == 1
    assert f"step {BAD} left out (training.non_finite=skip): the {what}" in said[0]
    assert "preferences.jsonl:" in said[0]
    with pytest.MonkeyPatch.context() as patch:
        Poison(patch, what)
        with pytest.raises(NonFiniteError, match=rf"the {what} .*not finite.*preferences\.jsonl:\d+"):
            runs.train(folder, "dpo", f"stopped-{what}", *MORE)
    state = json.loads((folder / f"stopped-{what}/metrics.jsonl").read_text().splitlines()[-1])
    assert state["step"] == BAD - 1
