"""Optimizers over a model's trained weights: as the config's `optimizer._target_` says, or AdamW at a learning rate."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch

from alignlab.build import build_type
from alignlab.core import ConfigError, require
from alignlab.models import PackedModel

ELEMENTWISE = ("AdamW", "Adam", "SGD")
"""Optimisers that treat every number alike: ZeRO gives them flat pieces of the weights."""

MakeOptimizer = Callable[[list[dict[str, Any]]], torch.optim.Optimizer]
"""From parameter groups, as torch's optimisers take them, to an optimiser."""


def parameter_groups(trained: Iterable[torch.nn.Parameter]) -> list[dict[str, Any]]:
    """Parameter groups as torch's optimisers take them: weight decay is for matrices alone."""
    trained = list(trained)
    groups: list[dict[str, Any]] = [
        {"params": [p for p in trained if p.dim() >= 2]},
        {"params": [p for p in trained if p.dim() < 2], "weight_decay": 0.0},
    ]
    return [g for g in groups if g["params"]]


def build_optimizer(values: dict[str, Any], groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    """The optimiser that `_target_` names, for parameter groups."""
    optimizer: torch.optim.Optimizer = build_type(torch.optim.Optimizer, values, "optimizer", groups)
    return optimizer


def check_mode(mode: str, mixed_precision: str, optimizer: torch.optim.Optimizer) -> None:
    """See that a mode of `distributed` can be had with an optimiser and a `training.mixed_precision`.

    Raises:
        ConfigError: it cannot.
    """
    zero = mode.startswith("zero")
    if mixed_precision == "fp16" and (zero or mode == "fsdp"):
        raise ConfigError(f"training.mixed_precision=fp16: not with distributed={mode}: use bf16")
    if mixed_precision == "pure" and zero:
        raise ConfigError(
            f"training.mixed_precision=pure: DeepSpeed keeps float32 weights whatever the model's are: give auto "
            f"with distributed={mode}, or use ddp or fsdp"
        )
    if zero and type(optimizer).__name__ not in ELEMENTWISE:
        raise ConfigError(
            f"optimizer: {type(optimizer).__name__} does not work on the flat pieces of weights that "
            f"distributed={mode} gives it: use optimizer=adamw or sgd, or distributed=fsdp or ddp"
        )
    if zero and optimizer.defaults.get("kahan_sum"):
        raise ConfigError(
            f"optimizer.kahan_sum: distributed={mode} keeps float32 weights, of which rounding takes nothing: use "
            "optimizer=adamw"
        )


def optimizer_of(model: PackedModel, lr: float | None, make: MakeOptimizer | None) -> torch.optim.Optimizer:
    """The optimizer of a trainer: AdamW with a learning rate, or what `make` makes."""
    groups = parameter_groups([p for p in model.parameters() if p.requires_grad])
    if make is not None:
        if lr is not None:
            raise ConfigError("lr: the optimizer has a learning rate already: give one of them")
        return make(groups)
    if lr is None:
        raise ConfigError("lr: must be given, as in lr=1e-5; or give an optimizer")
    require(isinstance(lr, int | float) and 0 <= lr < float("inf"), "lr", lr, "must be a number >= 0")
    return torch.optim.AdamW(groups, lr=lr, weight_decay=0.0)
