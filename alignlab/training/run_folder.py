"""A run's folder: what tells that it has begun and that it is over, and whose it is. Without torch: commands that
compute nothing ask for the state of runs."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from alignlab.config import read_yaml
from alignlab.core import AlignlabError, ConfigError
from alignlab.core.files import write_config
from alignlab.core.secrets import without_secrets
from alignlab.training.callbacks.pruning import PRUNED
from alignlab.training.settings import TrainingSettings

BUDGET = "token_budget.json"
"""The token budget in use, once memory has run out."""

REFERENCE_CACHE = "cache"
"""In the folder of a sweep or a comparison: what references have said of the data, for all of its runs."""

MAY_CHANGE = ("tracker", "callbacks", "out", "name", "distributed")
MAY_CHANGE_TRAINING = (
    *("progress", "log_every", "threads", "keep_last", "checkpoint_every", "resume"),
    *("max_tokens_per_microbatch", "reference_cache"),
)
MAY_CHANGE_VLLM = ("url", "shared_dir", "python", "port", "devices", "memory", "arguments", "start_timeout", "timeout")
"""What may differ between a run and its continuation."""

RESULT = "result.json"
"""Written last, when a run is finished."""

SECTIONS = ("algorithm", "model", "adapter", "training")
"""Of a run's config: without these it is none."""

ANEW = "choose another out=DIR, or start anew with training.resume=never, which removes what the folder holds"

BEGUN = ("checkpoints", "metrics.jsonl", "model", RESULT)
"""What a run leaves once it has trained; a folder without any of these holds nothing that could be continued."""


def claim(out: Path, config: dict[str, Any], settings: TrainingSettings) -> None:
    """Take the folder: a new one, or that of the same run to be continued.

    Raises:
        ConfigError: it holds a run with other settings.
    """
    saved = out / "config.yaml"
    try:
        out.mkdir(parents=True, exist_ok=True)
        if settings.resume == "never":
            for name in ("checkpoints", "model"):
                shutil.rmtree(out / name, ignore_errors=True)
            for name in (RESULT, "metrics.jsonl", "samples.jsonl", "evaluation.json", "wandb_id", BUDGET, PRUNED):
                (out / name).unlink(missing_ok=True)
        elif saved.exists() and any((out / name).exists() for name in BEGUN):
            before, now = fingerprint(read_yaml(saved, *SECTIONS, advice=ANEW)), fingerprint(config)
            different = sorted(k for k in before.keys() | now.keys() if before.get(k) != now.get(k))
            if different:
                raise ConfigError(
                    f"out={out}: this folder holds a run with another {', '.join(different[:5])}: choose another "
                    "out=DIR, or training.resume=never to start it anew"
                )
        write_config(saved, config)
    except OSError as error:
        raise AlignlabError(f"out={out}: cannot be written: {error.strerror}") from error


def fingerprint(config: dict[str, Any]) -> dict[str, Any]:
    """The settings that decide what a run computes, flat, by command-line key. Secrets do not: they may change."""
    flat: dict[str, Any] = {}

    def walk(value: Any, key: str) -> None:
        if isinstance(value, dict):
            for k, v in value.items():
                walk(v, f"{key}.{k}" if key else str(k))
        else:
            flat[key] = value

    walk(without_secrets({k: v for k, v in config.items() if k not in MAY_CHANGE}), "")
    free = {f"training.{n}" for n in MAY_CHANGE_TRAINING} | {f"rollout.vllm.{n}" for n in MAY_CHANGE_VLLM}
    return {k: v for k, v in flat.items() if k not in free}
