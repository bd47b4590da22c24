"""What a run knows of itself beside its weights, and how the whole of it goes to disk and comes back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from alignlab.core import AlignlabError, Group, Response
from alignlab.models import Reference
from alignlab.training.processes import Processes

REFERENCE = "reference.pt"
"""The reference's weights, where it has been refreshed."""


@dataclass
class State:
    """Where a run stands. Data order and sampling are functions of the seed and of these numbers.

    Attributes:
        step: optimiser steps done.
        iteration: iterations begun: batches drawn from the data, or rounds of sampling.
        position: minibatches of the current iteration that are done.
        pending: the current iteration's groups, scored and prepared, while some of them are still to be trained on.
        trained_tokens, generated_tokens: response tokens trained on and sampled, over all processes.
        sampled: how many of them were sampled for the current iteration.
        seconds: time spent, start-up not counted, over all sittings.
        best: the best value of the watched metric so far.
        bad_evaluations: evaluations since then.
        reward: mean reward of the current iteration's samples.
        report: the algorithm's figures of the current iteration.
        algorithm: what the algorithm wants to keep.
    """

    step: int = 0
    iteration: int = 0
    position: int = 0
    trained_tokens: int = 0
    generated_tokens: int = 0
    sampled: int = 0
    seconds: float = 0.0
    best: float | None = None
    bad_evaluations: int = 0
    reward: float | None = None
    report: dict[str, float] = field(default_factory=dict)
    algorithm: dict[str, float] = field(default_factory=dict)
    pending: list[Group] = field(default_factory=list)


def save_state(folder: Path, state: State, processes: Processes, reference: Reference | None = None) -> None:
    """Write everything a run needs to go on bit-identically. Called by all processes."""
    processes.accelerator.save_state(str(folder), safe_serialization=True)
    if processes.is_main:
        torch.save(asdict(state), folder / "state.pt")
        if reference is not None and (weights := reference.state()):
            torch.save(weights, folder / REFERENCE)


def load_state(folder: Path, processes: Processes, reference: Reference | None = None) -> State:
    """Read it back, into what was given to `register`."""
    try:
        processes.accelerator.load_state(str(folder))
        raw: dict[str, Any] = torch.load(folder / "state.pt", weights_only=True)
        if reference is not None and (folder / REFERENCE).exists():
            reference.load_state(torch.load(folder / REFERENCE, weights_only=True))
    except (OSError, RuntimeError, KeyError, ValueError) as error:
        raise AlignlabError(f"{folder}: this checkpoint does not fit the run: {error}") from error
    pending = [Group(**{**g, "responses": [Response(**r) for r in g["responses"]]}) for g in raw.pop("pending")]
    return State(**raw, pending=pending)


def register(processes: Processes, model: torch.nn.Module) -> None:
    """Let Accelerate's checkpoints hold the trained weights only: a frozen base is not saved with every adapter."""
    from safetensors.torch import load_file, save_file

    def trained() -> dict[str, torch.nn.Parameter]:
        return {n: p for n, p in model.named_parameters() if p.requires_grad}

    def save(models: Sequence[Any], weights: list[Any], folder: str) -> None:
        if processes.is_main:
            save_file({n: p.detach().contiguous() for n, p in trained().items()}, Path(folder) / "trained.safetensors")
        weights.clear()

    def load(models: list[Any], folder: str) -> None:
        found = load_file(Path(folder) / "trained.safetensors")
        mine = trained()
        if found.keys() != mine.keys():
            raise ValueError(f"it holds {len(found)} trained tensors, the model has {len(mine)}")
        with torch.no_grad():
            for name, parameter in mine.items():
                parameter.copy_(found[name])
        models.clear()

    processes.accelerator.register_save_state_pre_hook(save)
    processes.accelerator.register_load_state_pre_hook(load)
