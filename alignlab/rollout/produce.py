"""Sample responses to prompts, score or label them, and write them down: a data set made from a policy."""

from __future__ import annotations

import sys
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from pydantic import Field

from alignlab.config import build, section
from alignlab.core import ConfigError, Group, Scorer
from alignlab.core.settings import Settings
from alignlab.data import DataSettings, load, write_jsonl
from alignlab.data.groups import group_to_record
from alignlab.models import ModelSettings, QuantizationSettings, load_model
from alignlab.rollout.local import LocalEngine
from alignlab.rollout.monte_carlo import MonteCarloLabels
from alignlab.rollout.settings import RolloutSettings
from alignlab.rollout.vllm.engine import VllmEngine
from alignlab.rollout.vllm.run import VllmRun


class ProduceSettings(Settings):
    """How much to sample."""

    group_size: int = Field(2, ge=1)
    rounds: int = Field(1, ge=1)
    threads: int | None = Field(None, ge=1)
    seed: int = 0


def produce(config: dict[str, Any], out: Path) -> dict[str, Any]:
    """Write `groups.jsonl` in `out`: `rounds` times over the prompts, `group_size` responses each, with columns.

    Returns:
        groups, generated_tokens and seconds.
    """
    wanted = section(ProduceSettings, {k: config[k] for k in ProduceSettings.model_fields}, "")
    settings = section(ModelSettings, config["model"], "model")
    quantization = section(QuantizationSettings, config.get("quantization", {}), "quantization")
    rollout = section(RolloutSettings, config["rollout"], "rollout")
    scorers: list[Scorer] = [build(config["scoring"], "scoring")] if config["scoring"] else []
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
    if rollout.vllm is not None and quantization.kind != "none":
        raise ConfigError(
            f"quantization={quantization.kind}: a vLLM server samples from the base as it is: leave it out"
        )
    server = VllmRun(rollout, model, settings, out) if rollout.vllm is not None else None
    found: list[Group] = []
    with server or nullcontext():
        started = time.monotonic()
        engine = LocalEngine(model, rollout)
        if server is not None:
            server.push(model)
            engine = VllmEngine(model, rollout, server)
        for scorer in scorers:
            if isinstance(scorer, MonteCarloLabels):
                scorer.attach(engine, model.tokenizer)
        for round_ in range(wanted.rounds):
            groups = engine.sample(prompts, wanted.group_size, wanted.seed + round_)
            for scorer in scorers:
                scorer.score(groups)
            found.extend(groups)
    write_jsonl(out / "groups.jsonl", [group_to_record(g) for g in found])
    tokens = sum(len(r.token_ids) for g in found for r in g.responses)
    return {"groups": len(found), "generated_tokens": tokens, "seconds": round(time.monotonic() - started, 3)}
