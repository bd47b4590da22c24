"""A run's folder: what tells that it has begun and that it is over, and whose it is. Without torch: commands that
compute nothing ask for the state of runs."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from alignlab.config import read_yaml
from alignlab.core import AlignlabError, ConfigError
from alignlab.core.files import discard, restore, write_config
from alignlab.core.secrets import without_secrets
from alignlab.training import provenance
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
LIMITS = ("steps", "epochs", "max_trained_tokens", "max_generated_tokens", "max_seconds")
"""What may become more: then the run goes on from where it was over."""

MAY_CHANGE_VLLM = (
    *("url", "shared_dir", "python", "port", "devices", "tensor_parallel", "replicas", "memory", "sleep", "transfer"),
    *("arguments", "start_timeout", "timeout"),
)
"""What may differ between a run and its continuation."""

RESULT = "result.json"
"""Written last, when a run is finished."""

SECTIONS = ("algorithm", "model", "adapter", "training")
"""Of a run's config: without these it is none."""

ANEW = "choose another out=DIR, or start anew with training.resume=never, which removes what the folder holds"

BEGUN = ("checkpoints", "metrics.jsonl", "model", RESULT)
"""What a run leaves once it has trained; a folder without any of these holds nothing that could be continued."""


def finished(out: Path, config: dict[str, Any]) -> dict[str, Any] | None:
    """The result of the run with these settings in a folder that has its model; None where something is left to do."""
    try:
        same = fingerprint(read_yaml(out / "config.yaml")) == fingerprint(config)
        result = json.loads((out / RESULT).read_text())
    except (AlignlabError, OSError, ValueError):
        return None
    whole = isinstance(result, dict) and {"step", "trained_tokens", "generated_tokens", "seconds"} <= result.keys()
    return result if same and whole and (out / "model").is_dir() else None


def claim(out: Path, config: dict[str, Any], settings: TrainingSettings, data_files: Iterable[Path] = ()) -> None:
    """Take the folder: a new one, or that of the same run to be continued, perhaps to be longer.

    Raises:
        ConfigError: it holds a run with other settings, or on other data.
        StorageError: it cannot be written.
    """
    saved = out / "config.yaml"
    try:
        out.mkdir(parents=True, exist_ok=True)
        restore(out / "model")
        if not settings.resumes:
            _remove(out, RESULT, "metrics.jsonl", "samples.jsonl", "evaluation.json", "wandb_id", BUDGET, PRUNED)
            for name in ("checkpoints", "model"):
                discard(out / name)
        elif saved.exists() and any((out / name).exists() for name in BEGUN):
            _check_same(out, fingerprint(read_yaml(saved, *SECTIONS, advice=ANEW)), fingerprint(config))
            if any(out.glob("checkpoints/step-*")):
                provenance.check_data(out, data_files, settings.resume)
                for change in provenance.changed_versions(out):
                    print(f"note: {out}: since this run was last at work: {change}", file=sys.stderr)
            _remove(out, RESULT, "evaluation.json")  # of the shorter run, or of a model that is gone
        write_config(saved, config)
    except OSError as error:
        raise AlignlabError(f"out={out}: cannot be written: {error.strerror}") from error


def _check_same(out: Path, before: dict[str, Any], now: dict[str, Any]) -> None:
    """Refuse to go on with other settings, but for limits that make the run longer."""
    limits = [f"training.{name}" for name in LIMITS]
    # One epoch where no limit is given: see `TrainingSettings.limits`.
    before, now = (s if any(s.get(k) for k in limits) else {**s, "training.epochs": 1.0} for s in (before, now))
    different = sorted(k for k in before.keys() | now.keys() if before.get(k) != now.get(k))
    anew = "choose another out=DIR, or training.resume=never to start it anew"
    if others := [k for k in different if k not in limits]:
        raise ConfigError(f"out={out}: this folder holds a run with another {', '.join(others[:5])}: {anew}")
    if not different:
        return
    told = ", ".join(f"{k}={_shown(before.get(k))}" for k in different)
    if all((now.get(k) or math.inf) < (before.get(k) or math.inf) for k in different):
        raise ConfigError(f"out={out}: this folder holds a run with {told}, which can be made longer only: {anew}")
    if (out / RESULT).exists() and not any(out.glob("checkpoints/step-*")):
        raise ConfigError(
            f"out={out}: this folder holds a finished run with {told} and no checkpoint to go on from "
            f"(training.checkpoint_every=null writes none at the end): {anew}"
        )
    wanted = ", ".join(f"{k}={_shown(now.get(k))}" for k in different)
    print(f"note: {out}: a run with {told} goes on with {wanted}, and with its schedule from here on", file=sys.stderr)


def _shown(value: Any) -> str:
    return "null" if value is None else str(value)


def _remove(out: Path, *names: str) -> None:
    for name in names:
        (out / name).unlink(missing_ok=True)


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
