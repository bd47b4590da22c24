"""What fits on how many devices, and the cheapest of it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from alignlab.planning.devices import Device
from alignlab.planning.memory import MODES, Memory
from alignlab.planning.study import Study, Variant
from alignlab.training.distributed.zero import ELEMENTWISE

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

    def fits(self, device: Device) -> bool:
        return fits(self.memory, device)

    @property
    def words(self) -> list[str]:
        """As a command has them."""
        processes = [f"distributed.processes={self.devices}"] if self.mode != "single" else []
        spread = [
            f"distributed={self.mode}",
            *processes,
            f"training.max_tokens_per_microbatch={self.max_tokens_per_microbatch}",
        ]
        return [*self.variant.words.split(), *spread]


def fits(memory: Memory, device: Device) -> bool:
    """Whether it does; states of a paged optimiser may be on the host."""
    return memory.total - memory.paged <= USABLE * device.memory


def variants(study: Study) -> list[Variant]:
    """Full fine-tuning, an adapter, and an adapter on a quantised base, with the rest as asked."""
    asked = study.asked
    few = asked.quantization if asked.quantization != "none" else "nf4"
    found = [Variant("none", "none", asked.checkpointing), Variant("lora", "none", asked.checkpointing)]
    return [*([] if study.saved else found[:1]), found[1], Variant("lora", few, asked.checkpointing)]


def modes(study: Study, devices: int) -> Iterator[str]:
    """Those that can be had, from the simplest."""
    for mode in MODES:
        if devices == 1 and mode not in ("single", "zero3_offload"):
            continue
        if devices > 1 and mode == "single":
            continue
        if mode.startswith("zero") and study.optimizer.name not in ELEMENTWISE:
            continue
        if mode not in ("single", "ddp") and study.checked.training.mixed_precision == "fp16":
            continue
        yield mode


def choices(study: Study, variant: Variant, max_tokens_per_microbatch: int | None = None) -> Iterator[Choice]:
    """From the cheapest: fewest devices, then the simplest mode."""
    budget = max_tokens_per_microbatch or study.max_tokens_per_microbatch
    for count in COUNTS:
        for mode in modes(study, count):
            yield Choice(
                variant,
                mode,
                count,
                budget,
                study.memory(variant, mode, count, max_tokens_per_microbatch, per_device=1),
            )


def cheapest(
    study: Study, device: Device, among: list[Variant], max_tokens_per_microbatch: int | None = None
) -> Choice | None:
    """What fits on the fewest devices; of those the simplest mode; of those the least done to save memory: whichever
    comes first of `among`."""
    found = [
        choice
        for variant in among
        if (choice := next((c for c in choices(study, variant, max_tokens_per_microbatch) if c.fits(device)), None))
        is not None
    ]
    return min(found, key=lambda c: (c.devices, MODES.index(c.mode)), default=None)


def rescue(study: Study, device: Device) -> Choice | None:
    """Where nothing asked for fits: one row at a time, then recomputed activations, then an adapter, then a quantised
    base; the first that helps."""
    asked, row = study.asked, study.workload().length
    least = [
        asked,
        replace(asked, checkpointing=True),
        Variant("lora", "none", True),
        Variant("lora", "nf4", True),
    ]
    critic = study.checked.algorithm
    if critic.critic == "own" and "value" in critic.reads:  # cannot recompute on an adapter
        least = [v for v in least if v.adapter == "none" or not v.checkpointing] + [Variant("lora", "nf4", False)]
    for variant in dict.fromkeys(least):
        if (choice := cheapest(study, device, [variant], row)) is not None:
            return choice
    return None
