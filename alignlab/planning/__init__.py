"""`alignlab plan`: what a run needs and where it fits, before anything is loaded."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from typing import Any

from alignlab.planning.devices import Device, find_device, speed
from alignlab.planning.memory import GB, MODES, Memory
from alignlab.planning.run import PlannedRun, PlanSettings
from alignlab.planning.search import COUNTS, USABLE, cheapest, choices, fits, rescue, variants

__all__ = ["PlanSettings", "plan"]


def plan(config: dict[str, Any], overrides: Sequence[str] = (), table: bool = True) -> dict[str, Any]:
    """What the run of a resolved config needs.

    Args:
        overrides: the command's, for the command that it recommends.
        table: whether to look at other settings too.

    Returns:
        Plain values, as `--json` prints them; memory in GB (10^9 bytes).

    Raises:
        ConfigError: as a run of the config would, and where the model has no config that can be read.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # libraries' own, on their own names
        device = find_device(config["gpu"])
        run = PlannedRun(config, device.name == "cpu")
        memory = run.memory(run.asked, run.checked.distributed.mode, run.devices)
        return {
            "run": _run(run),
            "device": {"name": device.name, "memory_gb": round(device.memory / GB, 1), "tflops": device.tflops},
            "memory": _memory(run, memory, device),
            "speed": _speed(run, device),
            "counts": list(COUNTS),
            "fits": _fits(run, device) if table else [],
            "cheapest": _cheapest(run, device, overrides) if table else None,
        }


def _run(run: PlannedRun) -> list[str]:
    needs, work, c = run.needs(run.asked), run.workload(), run.checked
    share = f"{needs.trained:,.0f} trained" if needs.trained < needs.parameters else "all trained"
    base = {"nf4": "4-bit", "int8": "8-bit"}.get(run.asked.quantization) or str(run.dtype(run.asked))
    each = f"{work.responses} response{'s' if work.responses > 1 else ''} of {work.response}"
    return [
        f"{type(c.algorithm).__name__} on {c.model.path}: {needs.parameters:,.0f} parameters, {share}, base in "
        + base.removeprefix("torch."),
        f"distributed={c.distributed.mode} on {run.devices}; a micro-batch: {work.rows} row(s) of {work.length} tokens "
        f"(prompt {work.prompt}, {each}); {math.ceil(run.share / work.rows)} a step",
    ]


def _memory(run: PlannedRun, memory: Memory, device: Device) -> dict[str, Any]:
    def gb(values: dict[str, float]) -> dict[str, float]:
        return {k: v / GB for k, v in values.items()}

    notes = list(run.notes)
    if cache := run.needs(run.asked).cache:
        notes.append(f"of sampling, {cache / GB:.2f} GB are keys and values")
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
        **gb({"overhead": memory.overhead, "host": memory.host, "paged": memory.paged}),
        "notes": notes,
    }


def _speed(run: PlannedRun, device: Device) -> dict[str, Any]:
    needs, settings, rows = run.needs(run.asked), run.settings, run.sampled_rows if run.samples else 0
    found = speed(
        device,
        needs.parameters,
        needs.trained,
        needs.weights + needs.cache,
        checkpointing=run.asked.checkpointing,
        reference=run.has_reference,
        rows=rows,
        tflops=settings.peak_tflops,
        share=settings.share_of_peak,
    )
    lines = [f"No speed: the peak of {device.name} is not known; give peak_tflops="]
    if found.trained is not None:
        lines = [
            f"An estimate, not measured: {found.trained * run.devices:,.0f} tokens a second trained on {run.devices} "
            f"device(s): {found.operations / 1e9:,.1f} Gflop a token, {settings.share_of_peak:.0%} of the peak."
        ]
    if found.sampled is not None:
        sampled = f"{found.sampled * run.devices:,.0f} tokens a second"
        lines.append(f"Sampled: {sampled}, by memory bandwidth, {rows} rows at a time.")
    per_device = {"trained": found.trained, "sampled": found.sampled}
    return {"tokens_per_second_per_device": per_device, "operations_per_token": found.operations, "lines": lines}


def _fits(run: PlannedRun, device: Device) -> list[dict[str, Any]]:
    rows = []
    for variant in variants(run):
        every = list(choices(run, variant))
        for mode in MODES:
            mine = {str(c.devices): c.memory for c in every if c.mode == mode}
            cells = {count: {"gb": memory.total / GB, "fits": fits(memory, device)} for count, memory in mine.items()}
            rows += [{"trained": run.name(variant), "mode": mode, "devices": cells}] if cells else []
    return rows


def _cheapest(run: PlannedRun, device: Device, overrides: Sequence[str]) -> dict[str, Any]:
    """The cheapest setting of what was asked that fits, or else what would help, with the command that trains so."""
    asked = cheapest(run, device, run.asked)
    choice = asked or rescue(run, device)
    lines = ["Cheapest: fewest devices, then the simplest mode."]
    if asked is None:
        lines = [f"{run.name(run.asked)} does not fit on up to {COUNTS[-1]} of {device.name}.", "This would:"]
    if choice is None:
        lines[-1] = "Nor does anything else here: shorter prompts and responses, or larger devices, are needed."
        return {"fits_as_asked": False, "lines": lines}
    changed = choice.overrides(run)
    replaced = {*PlanSettings.model_fields, "distributed.processes", *changed}
    kept = [word for word in overrides if word.partition("=")[0] not in replaced]
    for group in ("adapter", "quantization"):  # settings of another one
        kept = [word for word in kept if group not in changed or not word.startswith(f"{group}.")]
    command = " ".join(["alignlab train", *kept, *(f"{key}={value}" for key, value in changed.items())])
    size = f"{choice.devices} device{'s' if choice.devices > 1 else ''}, {choice.memory.total / GB:.1f} GB each"
    return {
        "fits_as_asked": asked is not None,
        "trained": run.name(choice.variant),
        "mode": choice.mode,
        "devices": choice.devices,
        "gb": choice.memory.total / GB,
        "host_gb_per_device": choice.memory.host / GB,
        "command": command,
        "lines": [*lines, f"{run.name(choice.variant)} ({size}):", f"  {command}"],
    }
