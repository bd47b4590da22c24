"""Sample responses to prompts, score or label them, write them down: a data set made from a policy."""

from __future__ import annotations

import hashlib
import json
import os
import sys
import time
from collections.abc import Iterable, Mapping
from glob import escape, glob
from os.path import isfile  # unlike Path's, False for names that are too long
from pathlib import Path
from typing import Any

import torch
from pydantic import Field

from alignlab.build import section
from alignlab.core import ConfigError, Group, RolloutContext
from alignlab.core.files import write_json
from alignlab.core.parts import bind_all, calling, drawn, generated_tokens, give_sampler, sampler_of, score, started
from alignlab.core.settings import Settings
from alignlab.data import DataSettings, load, write_jsonl
from alignlab.data.groups import group_to_record
from alignlab.models import ModelSettings, QuantizationSettings, check_tokens, load_model, outline_of
from alignlab.rollout import build_engine, build_environment
from alignlab.rollout.policy import Policy
from alignlab.scoring import build_scorers

GROUPS, MADE_FROM = "groups.jsonl", "sample.json"


class ProduceSettings(Settings):
    """How much to sample."""

    group_size: int = Field(2, ge=1)
    rounds: int = Field(1, ge=1)
    threads: int | None = Field(None, ge=1)
    seed: int = 0


def produce(config: dict[str, Any], out: Path) -> dict[str, Any]:
    """Write `groups.jsonl` in `out`: `rounds` times over the prompts, `group_size` responses each, with columns.

    What it was made from stands beside it, in `sample.json`.

    Returns:
        groups, generated_tokens (without those that scorers draw) and seconds; `already_done` where that had been made.

    Raises:
        ConfigError: a setting is unknown or impossible, or `out` holds groups of another model or other settings.
    """
    wanted = section(ProduceSettings, {k: config[k] for k in ProduceSettings.model_fields}, "")
    settings = section(ModelSettings, config["model"], "model")
    quantization = section(QuantizationSettings, config.get("quantization", {}), "quantization")
    engine, environment = build_engine(config["rollout"]), build_environment(config.get("environment"))
    with calling(engine, "check"):
        engine.check({"model": settings, "quantization": quantization, "environment": environment}, None)
    scorers = build_scorers(config["scoring"])
    data = section(DataSettings, config["data"], "data")
    made_from = {"settings": _digests(config), "files": _files([settings.path, *data.paths])}
    if (done := _claim(out, made_from)) is not None:
        return done | {"already_done": True}
    if wanted.threads:
        torch.set_num_threads(wanted.threads)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    found: list[Group] = []
    tokens = 0
    held = float(outline_of(settings).nbytes) if device == "cuda" else 0.0
    with started(engine, RolloutContext(settings, out, device=device, held=held)):  # first: it may share the GPU
        model = load_model(settings, trainable=False, quantization=quantization, device=device)
        for note in model.notes:
            print(f"note: {note}", file=sys.stderr)
        prompts = load(data, model.tokenizer).train
        check_tokens(prompts, int(model.config.vocab_size))
        bind_all((*scorers, environment), Policy(model))
        begun = time.monotonic()
        sampler = sampler_of(engine, model)
        give_sampler(scorers, sampler)
        for round_ in range(wanted.rounds):
            seed, before = wanted.seed + round_, generated_tokens(sampler)
            groups = drawn(sampler, environment, prompts, wanted.group_size, seed)
            tokens += generated_tokens(sampler) - before
            for scorer in scorers:
                score(scorer, groups)
            found.extend(groups)
    result = {"groups": len(found), "generated_tokens": tokens, "seconds": round(time.monotonic() - begun, 3)}
    write_jsonl(out / GROUPS, [group_to_record(g) for g in found])
    write_json(out / MADE_FROM, made_from | {"result": result})
    return result


def _claim(out: Path, made_from: dict[str, Any]) -> dict[str, Any] | None:
    """Take the folder; the result where the same groups have been made there."""
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"out={out}: cannot be written: {error.strerror}") from error
    if (out / GROUPS).exists():
        try:
            known = dict(json.loads((out / MADE_FROM).read_text(encoding="utf-8")))
            sections = [(dict(known[name]), made_from[name]) for name in ("settings", "files")]
        except (OSError, ValueError, KeyError, TypeError):
            known, sections = {}, []
        different = [k for old, new in sections for k in sorted(old.keys() | new.keys()) if old.get(k) != new.get(k)]
        if different or not known:
            what = f"groups made with another {', '.join(different[:5])}" if known else "groups made by something else"
            raise ConfigError(f"out={out}: holds {what}: choose another out=DIR, or delete {out / GROUPS}")
        if isinstance(known.get("result"), dict):
            return dict(known["result"])
    write_json(out / MADE_FROM, made_from)
    return None


def _digests(config: Mapping[str, Any]) -> dict[str, str]:
    """A hash of each setting that decides what is sampled, by its command-line key: they may hold keys of endpoints."""
    flat: dict[str, str] = {}

    def walk(value: Any, key: str) -> None:
        if isinstance(value, Mapping):
            for name, inner in value.items():
                walk(inner, f"{key}.{name}" if key else str(name))
        else:
            flat[key] = hashlib.sha256(json.dumps(value, default=str).encode()).hexdigest()[:16]

    walk({name: value for name, value in config.items() if name not in ("out", "name", "threads", "tracker")}, "")
    return flat


def _files(paths: Iterable[str]) -> dict[str, list[int]]:
    """Size and time of change, in nanoseconds, of the files that a model or records are read from."""
    found = (file for path in paths for file in (path, *glob(f"{escape(path)}/*")) if isfile(file))
    return {file: [os.stat(file).st_size, os.stat(file).st_mtime_ns] for file in found}
