"""Sample responses to prompts, score or label them, write them down: a data set made from a policy."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

import torch
from pydantic import Field

from alignlab.build import section
from alignlab.core import ConfigError, Group, RolloutContext
from alignlab.core.parts import bind_all, calling, drawn, generated_tokens, give_sampler, sampler_of, score, started
from alignlab.core.settings import Settings
from alignlab.data import DataSettings, load, write_jsonl
from alignlab.data.groups import group_to_record
from alignlab.models import ModelSettings, QuantizationSettings, check_tokens, load_model
from alignlab.rollout import build_engine, build_environment
from alignlab.scoring import build_scorers


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
    with calling(engine, "check"):
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
    check_tokens(prompts, int(model.config.vocab_size))
    bind_all((*scorers, environment), model)
    found: list[Group] = []
    tokens = 0
    with started(engine, RolloutContext(model, settings, out)):
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
    write_jsonl(out / "groups.jsonl", [group_to_record(g) for g in found])
    return {"groups": len(found), "generated_tokens": tokens, "seconds": round(time.monotonic() - begun, 3)}
