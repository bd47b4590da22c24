"""Base of every settings class: typed, ranged, closed to unknown keys.

The YAML files in `configs/` give each setting its default and its one-line meaning; the classes give its type and
range. `alignlab.config` turns what pydantic finds wrong into one line with the key as written on the command line.
"""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict

RENAMED = {
    "adapter.kind": "adapter._target_, or adapter=lora, adapter=none",
    "adapter.rank": "adapter.r",
    "comparison.pairs.samples": "comparison.pairs.group_size",
    "data.format": "data.parser",
    "rollout.token_budget": "rollout.max_batch_tokens",
    "samples": "group_size",
    "search": "environment",
    "search.beams": "environment.beams",
    "search.expand": "environment.expand",
    "search.scorer": "environment.scorer",
    "search.step_separator": "environment.step_separator",
    "search.step_token": "environment.step_token",
    "scoring.token_budget": "scoring.max_tokens_per_microbatch",
    "source.passes": "source.ppo_epochs",
    "source.prompts": "source.rollout_batch_size",
    "source.refresh": "source.ref_update_interval",
    "source.refresh_weight": "source.ref_update_tau",
    "source.samples": "source.group_size",
    "token_budget": "max_tokens_per_microbatch",
    "training.min_lr": "schedule.min_lr",
    "training.schedule": "schedule, a config group: schedule=linear",
    "training.token_budget": "training.max_tokens_per_microbatch",
    "training.warmup": "schedule.warmup",
}
"""Keys as they were once called, or as other tools call them → as they are called here."""


def renamed(key: str) -> str:
    """What to add to "unknown key" where the key has another name now; "" where it has none."""
    return f": it is called {RENAMED[key]}" if key in RENAMED else ""


class Settings(BaseModel):
    """A section of the config."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, protected_namespaces=(), arbitrary_types_allowed=True, allow_inf_nan=False
    )
