"""What fits on how many devices, and the cheapest of it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, replace

from alignlab.core import ConfigError
from alignlab.planning.devices import Device
from alignlab.planning.memory import MODES, Memory
from alignlab.planning.run import PlannedRun, Variant

COUNTS = (1, 2, 4, 8, 16, 32, 64)
USABLE = 0.95
"""Share of a device's memory that can be filled: allocators leave gaps."""


@dataclass(frozen=True)
class Choice:
    """A setting that a run could have, with what it needs on each device."""

    variant: Variant
    mode: str
    devices: int
    max_tokens_per_microbatch: int
    memory: Memory

    def overrides(self, run: PlannedRun) -> dict[str, str]:
        """What makes a run of it, beside the overrides of the run that was asked for."""
        processes = {"distributed.processes": str(self.devices)} if self.mode != "single" else {}
        tokens = {"training.max_tokens_per_microbatch": str(self.max_tokens_per_microbatch)}
        return {**self.variant.overrides(run.asked), "distributed": self.mode, **processes, **tokens}


def fits(memory: Memory, device: Device) -> bool:
    """Whether it does; states of a paged optimiser may be on the host."""
    return memory.total - memory.paged <= USABLE * device.memory


def variants(run: PlannedRun) -> list[Variant]:
    """Full fine-tuning, an adapter, and an adapter on a quantised base, with the rest as asked."""
    asked = run.asked
    few_bits = asked.quantization if asked.quantization != "none" else "nf4"
    full, lora = Variant("none", "none", asked.checkpointing), Variant("lora", "none", asked.checkpointing)
    return [*([] if run.saved else [full]), lora, Variant("lora", few_bits, asked.checkpointing)]


def choices(run: PlannedRun, variant: Variant, max_tokens_per_microbatch: int | None = None) -> Iterator[Choice]:
    """From the cheapest: fewest devices, then the simplest mode."""
    tokens = max_tokens_per_microbatch or run.max_tokens_per_microbatch
    for count in COUNTS:
        for mode in _modes(run, count):
            yield Choice(variant, mode, count, tokens, run.memory(variant, mode, count, tokens))


def _modes(run: PlannedRun, devices: int) -> Iterator[str]:
    """Those that can be had, from the simplest."""
    for mode in MODES if devices > 1 else ("single", "zero3_offload"):
        if devices > 1 and mode == "single":
            continue
        with suppress(ConfigError):
            run.checked.check_mode(mode)
            yield mode


def cheapest(
    run: PlannedRun, device: Device, variant: Variant, max_tokens_per_microbatch: int | None = None
) -> Choice | None:
    """What fits on the fewest devices; of those the simplest mode."""
    return next((c for c in choices(run, variant, max_tokens_per_microbatch) if fits(c.memory, device)), None)


def rescue(run: PlannedRun, device: Device) -> Choice | None:
    """Where nothing asked for fits: one row at a time, then recomputed activations, then an adapter, then a quantised
    base; the first that helps."""
    asked = run.asked
    tried = [asked, replace(asked, checkpointing=True), Variant("lora", "none", True), Variant("lora", "nf4", True)]
    if run.own_critic:  # it cannot be recomputed on an adapter
        tried = [v for v in tried if v.adapter == "none" or not v.checkpointing] + [Variant("lora", "nf4", False)]
    row = run.workload().length
    found = (cheapest(run, device, variant, row) for variant in dict.fromkeys(tried))
    return next((choice for choice in found if choice is not None), None)
