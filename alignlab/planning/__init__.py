"""`alignlab plan`: what a run needs and where it fits, before anything is loaded."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

from alignlab.config import section
from alignlab.planning.devices import Device, Speed, find_device, speed
from alignlab.planning.fit import COUNTS, USABLE, Choice, cheapest, choices, fits, rescue, variants
from alignlab.planning.memory import GB, MODES, Memory
from alignlab.planning.published import published_case
from alignlab.planning.settings import PlanSettings
from alignlab.planning.study import Study, Variant
from alignlab.training.run import check

PUBLISHED = "llama-65b"
"""The model whose plan has QLoRA's published case beside it."""


def plan(config: dict[str, Any], words: Sequence[str] = (), table: bool = True) -> dict[str, Any]:
    """What the run of a resolved config needs.

    Args:
        words: the command's, for the one that it recommends.
        table: whether to look at other settings too.

    Returns:
        Plain values, as `--json` prints them; memory in GB (10^9 bytes).

    Raises:
        ConfigError: as a run of the config would, and where the model has no config that can be read.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # libraries' own, on their own names
        return _plan(config, words, table)


def _plan(config: dict[str, Any], words: Sequence[str], table: bool) -> dict[str, Any]:
    settings = section(PlanSettings, {k: config[k] for k in PlanSettings.model_fields}, "")
    device = find_device(settings.gpu)
    study = Study(check(config), config["optimizer"], settings, device.name == "cpu")
    mode, count = study.checked.distributed.mode, study.asked_devices
    memory = study.memory(study.asked, mode, count)
    found: dict[str, Any] = {
        "run": _run(study, mode, count),
        "device": {"name": device.name, "memory_gb": round(device.memory / GB, 1), "tflops": device.tflops},
        "memory": _memory(study, memory, device),
        "speed": _speed(study, device, settings, count),
        "counts": list(COUNTS),
        "fits": [],
        "cheapest": None,
        "published": published_case() if table and config["model"]["path"] == PUBLISHED else None,
    }
    if table:
        found["fits"] = _fits(study, device)
        found["cheapest"] = _cheapest(study, device, words)
    return found


def _run(study: Study, mode: str, count: int) -> list[str]:
    what = study.needs(study.asked, devices=count).inventory
    work = study.workload(devices=count)
    c = study.checked
    share = f"{what.trained:,.0f} trained" if what.trained < what.parameters else "all trained"
    kinds = {"nf4": "4-bit", "int8": "8-bit", "none": ""}
    base = kinds[c.quantization.kind] or str(study.dtype(study.asked)).removeprefix("torch.")
    each = f"{work.responses} response{'s' if work.responses > 1 else ''} of {work.response}"
    return [
        f"{type(c.algorithm).__name__} on {c.model.path}: {what.parameters:,.0f} parameters, {share}, base in {base}",
        f"distributed={mode} on {count}; a micro-batch: {work.rows} row(s) of {work.length} tokens (prompt "
        f"{work.prompt}, {each}); {study.micro_batches(work, count)} a step",
    ]


def _memory(study: Study, memory: Memory, device: Device) -> dict[str, Any]:
    def gb(values: dict[str, float]) -> dict[str, float]:
        return {k: v / GB for k, v in values.items()}

    needs = study.needs(study.asked, devices=study.asked_devices)
    notes = []
    if needs.passes.saved and needs.fixed.saved:
        layers = (needs.passes.saved - needs.fixed.saved) / GB
        how = "kept by" if not study.asked.checkpointing else "at the borders of"
        notes.append(f"of the activations, {layers:.2f} GB are {how} the layers; the rest is of logits and masks")
    if needs.generation:
        notes.append(f"of sampling, {needs.generation.cache / GB:.2f} GB are keys and values")
    if memory.paged:
        notes.append(f"{memory.paged / GB:.2f} GB of optimiser states move to the host when the GPU is full")
    if memory.host:
        notes.append(f"on a node of 8 devices, the host holds {8 * memory.host / GB:,.1f} GB")
    verdict = "fits" if fits(memory, device) else "does not fit"
    notes.append(f"{verdict} {device.name}: {USABLE:.0%} of {device.memory / GB:,.1f} GB can be filled")
    return {
        "total": memory.total / GB,
        "fits": fits(memory, device),
        "peak": memory.peak,
        "held": gb(memory.held),
        "phases": {name: gb(items) for name, items in memory.phases.items()},
        "overhead": memory.overhead / GB,
        "host": memory.host / GB,
        "paged": memory.paged / GB,
        "notes": notes,
    }


def _speed(study: Study, device: Device, settings: PlanSettings, count: int) -> dict[str, Any]:
    needs = study.needs(study.asked, devices=count)
    what = needs.inventory
    rows = 0
    if study.samples:
        rows = max(1, study.rollout.max_batch_tokens // (study.workload().prompt + study.rollout.max_new_tokens))
    found: Speed = speed(
        device,
        what.parameters,
        what.trained,
        what.weights,
        checkpointing=study.asked.checkpointing,
        reference=study.has_reference,
        rows=rows,
        cache_bytes=needs.generation.cache if needs.generation else 0.0,
        tflops=settings.peak_tflops,
        share=settings.share_of_peak,
    )
    lines = []
    if found.trained is None:
        lines.append(f"No speed: the peak of {device.name} is not known; give peak_tflops=")
    else:
        lines.append(
            f"An estimate, not measured: {found.trained * count:,.0f} tokens a second trained on {count} device(s): "
            f"{found.operations / 1e9:,.1f} Gflop a token, {settings.share_of_peak:.0%} of the peak."
        )
    if found.sampled is not None:
        lines.append(
            f"Sampled: {found.sampled * count:,.0f} tokens a second, by memory bandwidth, {rows} rows at a time."
        )
    per = {"trained": found.trained, "sampled": found.sampled}
    return {"tokens_per_second_per_device": per, "operations_per_token": found.operations, "lines": lines}


def _fits(study: Study, device: Device) -> list[dict[str, Any]]:
    rows: dict[tuple[str, str], dict[str, Any]] = {}
    names = [v.name for v in variants(study)]
    for variant in variants(study):
        for choice in choices(study, variant):
            row = rows.setdefault(
                (variant.name, choice.mode), {"trained": variant.name, "mode": choice.mode, "devices": {}}
            )
            row["devices"][str(choice.devices)] = {"gb": choice.memory.total / GB, "fits": choice.fits(device)}
    return sorted(rows.values(), key=lambda row: (names.index(row["trained"]), MODES.index(row["mode"])))


def _cheapest(study: Study, device: Device, words: Sequence[str]) -> dict[str, Any]:
    """The cheapest setting of what was asked, and of all; or what would help."""
    asked = cheapest(study, device, [study.asked])
    least = cheapest(study, device, variants(study))
    found: dict[str, Any] = {"asked": _described(asked, words), "any": _described(least, words), "instead": None}
    lines = []
    if asked is None:
        instead = rescue(study, device)
        found["instead"] = _described(instead, words)
        lines.append(f"{study.asked.name} does not fit on up to {COUNTS[-1]} of {device.name}.")
        if instead is not None:
            lines += ["This would:", f"  {found['instead']['command']}"]
        else:
            lines.append("Nor does anything else here: shorter prompts and responses, or larger devices, are needed.")
    else:
        lines += [f"Cheapest for {study.asked.name} ({_size(asked)}):", f"  {found['asked']['command']}"]
    if least is not None and (asked is None or least.devices < asked.devices):
        lines += [f"Cheapest of all ({least.variant.name}, {_size(least)}):", f"  {found['any']['command']}"]
    lines.append("Cheapest: fewest devices, then the simplest mode, then the least done to save memory.")
    return {**found, "lines": lines}


def _size(choice: Choice) -> str:
    return f"{choice.devices} device{'s' if choice.devices > 1 else ''}, {choice.memory.total / GB:.1f} GB each"


def _described(choice: Choice | None, words: Sequence[str]) -> dict[str, Any] | None:
    if choice is None:
        return None
    keys = {*PlanSettings.model_fields, "adapter", "quantization", "distributed", "distributed.processes"}
    keys |= {"training.max_tokens_per_microbatch", "model.gradient_checkpointing"}
    kept = [w for w in words if not w.startswith("-") and w.partition("=")[0] not in keys]
    kept = [w for w in kept if choice.variant.adapter != "none" or not w.startswith("adapter.")]
    kept = [w for w in kept if choice.variant.quantization != "none" or not w.startswith("quantization.")]
    return {
        "trained": choice.variant.name,
        "mode": choice.mode,
        "devices": choice.devices,
        "gb": choice.memory.total / GB,
        "host_gb_per_device": choice.memory.host / GB,
        "command": " ".join(["alignlab train", *kept, *choice.words]),
    }


__all__ = ["Variant", "plan"]
