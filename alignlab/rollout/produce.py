"""Sample responses to prompts, score or label them, write them down: a data set made from a policy."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

import torch
from pydantic import Field

from alignlab.build import section
from alignlab.core import ConfigError, Group, NeedsPolicy, NeedsSampler, RolloutContext
from alignlab.core.settings import Settings
from alignlab.data import DataSettings, load, write_jsonl
from alignlab.data.groups import group_to_record
from alignlab.models import ModelSettings, QuantizationSettings, load_model
from alignlab.rollout import build_engine, build_environment, check_samples
from alignlab.rollout.policy import Policy
from alignlab.scoring import build_scorers, run_scorer


class ProduceSettings(Settings):
    """How much to sample."""

    group_size: int = Field(2, ge=1)
    rounds: int = Field(1, ge=1)
    threads: int | None = Field(None, ge=1)
    seed: int = 0


def produce(config: dict[str, Any], out: Path) -> dict[str, Any]:
    """Write `groups.jsonl` in `out`: `rounds` times over the prompts, `group_size` responses each, with columns.

    Returns:
        groups, generated_tokens (without those that scorers draw) and seconds.
    """
    wanted = section(ProduceSettings, {k: config[k] for k in ProduceSettings.model_fields}, "")
    settings = section(ModelSettings, config["model"], "model")
    quantization = section(QuantizationSettings, config.get("quantization", {}), "quantization")
    engine, environment = build_engine(config["rollout"]), build_environment(config.get("environment"))
    engine.check({"model": settings, "quantization": quantization, "environment": environment}, None)
    scorers = build_scorers(config["scoring"])
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"out={out}: cannot be written: {error.strerror}") from error
    if wanted.threads:
        torch.set_num_threads(wanted.threads)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = load_model(settings, trainable=False, quantization=quantization, device=device)
    for note in model.notes:
        print(f"note: {note}", file=sys.stderr)
    prompts = load(section(DataSettings, config["data"], "data"), model.tokenizer).train
    for part in (*scorers, environment):
        if isinstance(part, NeedsPolicy):
            part.bind(Policy(model), model.tokenizer)
    found: list[Group] = []
    tokens = 0
    with engine.start(RolloutContext(model, settings, out)):
        started = time.monotonic()
        sampler = engine.sampler(model)
        for scorer in scorers:
            if isinstance(scorer, NeedsSampler):
                scorer.bind_sampler(sampler)
        for round_ in range(wanted.rounds):
            seed, before = wanted.seed + round_, sampler.generated_tokens
            if environment is None:
                groups = sampler.sample(prompts, wanted.group_size, seed)
            else:
                groups = environment.rollout(sampler, prompts, wanted.group_size, seed)
            check_samples(prompts, groups, wanted.group_size, engine, environment)
            tokens += sampler.generated_tokens - before
            for scorer in scorers:
                run_scorer(scorer, groups)
            found.extend(groups)
    write_jsonl(out / "groups.jsonl", [group_to_record(g) for g in found])
    return {"groups": len(found), "generated_tokens": tokens, "seconds": round(time.monotonic() - started, 3)}
