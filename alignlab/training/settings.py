"""The `training`, `distributed` and `source` sections of the config."""

from __future__ import annotations

import re
from typing import Literal

from pydantic import Field, ValidationInfo, field_validator

from alignlab.core.settings import Settings

TIMES = {"s": 1.0, "min": 60.0, "h": 3600.0}
"""Units of time, in seconds."""

DIVIDING = ("fsdp", "zero3", "zero3_offload")
"""Modes in which no process holds all weights."""


class TrainingSettings(Settings):
    """How long, in what portions, watched how. Batch sizes and limits are global, over all processes."""

    steps: int | None = Field(None, ge=1, le=10**9)
    epochs: float | None = Field(None, gt=0)
    max_trained_tokens: int | None = Field(None, ge=1)
    max_generated_tokens: int | None = Field(None, ge=1)
    max_seconds: float | None = Field(None, gt=0)
    batch_size: int = Field(32, ge=1)
    max_tokens_per_microbatch: int | None = Field(None, ge=1)
    reference_cache: str | None = None
    max_grad_norm: float | None = Field(1.0, gt=0)
    mixed_precision: Literal["auto", "no", "bf16", "fp16", "pure"] = "auto"
    float32_matmul: Literal["highest", "high", "medium"] = "high"
    non_finite: Literal["stop", "skip"] = "stop"
    seed: int = Field(0, ge=0, lt=2**63)
    eval_every: int | None = Field(None, ge=1)
    patience: int | None = Field(None, ge=1)
    metric: str = "eval/loss"
    metric_mode: Literal["min", "max"] = "min"
    final: Literal["last", "best"] = "last"
    checkpoint_every: int | str | None = "10min"
    keep_last: int = Field(2, ge=1)
    resume: Literal["auto", "despite_changes", "never"] = "auto"
    log_every: int = Field(1, ge=1)
    progress: Literal["auto", "rich", "plain", "off"] = "auto"
    threads: int | None = Field(None, ge=1, le=1024)
    save_model: Literal["adapter", "merged"] = "adapter"

    @property
    def resumes(self) -> bool:
        """Whether what is in the run's folder is gone on with."""
        return self.resume != "never"

    @property
    def limits(self) -> dict[str, float]:
        """What ends the run, by key: the limits that are given, or one epoch where none is."""
        names = ("steps", "epochs", "max_trained_tokens", "max_generated_tokens", "max_seconds")
        given = {name: getattr(self, name) for name in names if getattr(self, name) is not None}
        return given or {"epochs": 1.0}

    @property
    def keeps_best(self) -> bool:
        """Whether the checkpoint with the best metric is kept."""
        return self.final == "best" or (self.eval_every is not None and self.checkpoint_steps is not None)

    @property
    def checkpoint_steps(self) -> int | None:
        """Optimiser steps between checkpoints; None where it goes by time."""
        return self.checkpoint_every if isinstance(self.checkpoint_every, int) else None

    @property
    def checkpoint_seconds(self) -> float | None:
        """Time between checkpoints, in seconds; None where it goes by steps."""
        if not isinstance(self.checkpoint_every, str):
            return None
        unit = self.checkpoint_every.lstrip("0123456789.")
        return float(self.checkpoint_every.removesuffix(unit)) * TIMES[unit]

    @field_validator("checkpoint_every")
    @classmethod
    def _steps_or_time(cls, value: int | str | None) -> int | str | None:
        whole = value is None or (isinstance(value, int) and value >= 1)
        if whole or re.fullmatch(rf"(\d+(\.\d+)?)({'|'.join(TIMES)})", str(value)):
            return value
        raise ValueError("must be steps, as in 100, or a time, as in 90s, 10min or 2h")

    @field_validator("mixed_precision", "progress", mode="before")
    @classmethod
    def _bare_word(cls, value: object, info: ValidationInfo) -> object:
        """YAML takes a bare `no` or `off` for false."""
        return {"mixed_precision": "no", "progress": "off"}[str(info.field_name)] if value is False else value


class DistributedSettings(Settings):
    """Over how many processes, and what of the model each holds."""

    mode: Literal["single", "ddp", "fsdp", "zero1", "zero2", "zero3", "zero3_offload"] = "single"
    processes: int | None = Field(None, ge=1, le=4096)
    timeout: float = Field(1800.0, gt=0)

    @property
    def divides(self) -> bool:
        """Whether no process holds all weights."""
        return self.mode in DIVIDING


class SourceSettings(Settings):
    """Where the groups come from: the data, or sampled from a policy for the data's prompts."""

    kind: Literal["data", "rollout"] = "data"
    rollout_batch_size: int | None = Field(None, ge=1)
    group_size: int = Field(4, ge=1)
    policy: Literal["current", "reference"] = "current"
    ppo_epochs: int = Field(1, ge=1)
    keep: bool = False
    ref_update_interval: int | None = Field(None, ge=1)
    ref_update_tau: float = Field(1.0, gt=0, le=1)
