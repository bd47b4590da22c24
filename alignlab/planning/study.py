"""The run that a config describes, as shapes: what its parts need."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch

from alignlab.core import ConfigError
from alignlab.core.memory import usual_tokens
from alignlab.models import FullFineTuning, LoRA, ModelSettings
from alignlab.planning.memory import Memory, Optimizer, Setting, device_memory, optimizer_of
from alignlab.planning.settings import PlanSettings
from alignlab.planning.shapes import Inventory, Shapes, bare_bytes, extrapolate, read_config, saved_dtype
from alignlab.planning.trace import Generation, Passes, Workload, trace_generation, trace_passes
from alignlab.rollout import RolloutSettings
from alignlab.training.run import RunConfig

FEW, MORE = 2, 4
"""Layers of the models that are traced; everything is linear in them from there on."""


@dataclass(frozen=True)
class Variant:
    """What is trained, on what base, and whether activations are recomputed."""

    adapter: str
    quantization: str
    checkpointing: bool

    @property
    def name(self) -> str:
        if self.adapter == "none":
            return "full"
        return {"none": "LoRA", "nf4": "QLoRA", "int8": "LoRA, int8"}[self.quantization]

    @property
    def words(self) -> str:
        """As a command has them."""
        found = [f"adapter={self.adapter}"]
        if self.quantization != "none":
            found.append(f"quantization={self.quantization}")
        if self.checkpointing:
            found.append("model.gradient_checkpointing=true")
        return " ".join(found)


@dataclass(frozen=True)
class Needs:
    """What a variant needs, in a process that holds everything; `fixed`: what of the passes is not in the layers."""

    inventory: Inventory
    passes: Passes
    fixed: Passes
    generation: Generation | None


class Study:
    """A run as configured, and its variants.

    Args:
        checked: the run's sections.
        optimizer: the optimiser's section.
        settings: the plan's own keys.
        on_cpu: whether processes compute on CPUs.
    """

    def __init__(self, checked: RunConfig, optimizer: dict[str, Any], settings: PlanSettings, on_cpu: bool) -> None:
        self.checked, self.settings, self.on_cpu = checked, settings, on_cpu
        self.config, self.saved = read_config(checked.model)
        self._optimizer = optimizer
        self._found: dict[Any, Needs] = {}

    @cached_property
    def optimizer(self) -> Optimizer:
        return optimizer_of(self._optimizer)

    @property
    def layers(self) -> int:
        return int(self.config.get_text_config().num_hidden_layers)

    @property
    def asked(self) -> Variant:
        """The variant that the config names."""
        c = self.checked
        return Variant("none" if c.adapter.trains_base else "lora", c.quantization.kind, c.model.gradient_checkpointing)

    @property
    def asked_devices(self) -> int:
        mode, processes = self.checked.distributed.mode, self.checked.distributed.processes
        return 1 if mode == "single" else processes or self.settings.gpus or 1

    @property
    def rollout(self) -> RolloutSettings:
        """What is sampled; of a user's own engine, the local engine's defaults are assumed."""
        engine = self.checked.rollout
        return engine if isinstance(engine, RolloutSettings) else RolloutSettings(temperature=engine.temperature)

    # ------------------------------------------------------------------ the workload

    @property
    def samples(self) -> bool:
        """Whether responses are sampled."""
        return self.checked.source.kind == "rollout"

    @property
    def responses(self) -> int:
        """Of each group."""
        if self.settings.responses:
            return self.settings.responses
        source = self.checked.source
        if self.samples:
            return source.group_size + (1 if source.keep else 0)
        return 2 if self.checked.algorithm.unit in ("pair", "group") else 1

    @property
    def max_tokens_per_microbatch(self) -> int:
        """Of a run on such a device."""
        return self.checked.training.max_tokens_per_microbatch or usual_tokens(self.on_cpu)

    def workload(self, max_tokens_per_microbatch: int | None = None, devices: int = 1) -> Workload:
        """A micro-batch: as many rows as the token budget holds, and no more than a process's share of a step."""
        c, s = self.checked, self.settings
        response = min(self.rollout.max_new_tokens, s.response_tokens) if self.samples else s.response_tokens
        one = Workload(
            1,
            s.prompt_tokens,
            response,
            self.responses,
            {"no": None, "bf16": torch.bfloat16, "fp16": torch.float16}[c.training.mixed_precision],
            self.rollout.temperature if self.samples else 1.0,
        )
        share = math.ceil(c.training.batch_size / devices)
        return replace(
            one, rows=max(1, min((max_tokens_per_microbatch or self.max_tokens_per_microbatch) // one.length, share))
        )

    def micro_batches(self, work: Workload, devices: int = 1) -> int:
        return math.ceil(math.ceil(self.checked.training.batch_size / devices) / work.rows)

    def dtype(self, variant: Variant) -> torch.dtype:
        """Of the weights that are not quantised, as `load_model` has them."""
        name = self.checked.model.dtype
        if name != "auto":
            return getattr(torch, name)  # type: ignore[no-any-return]
        if variant.quantization != "none":
            return torch.float32
        return saved_dtype(self.config, self.on_cpu)

    def _compute_dtype(self) -> torch.dtype:
        named = self.checked.quantization.compute_dtype
        if named != "auto":
            return getattr(torch, named)  # type: ignore[no-any-return]
        return torch.float32 if self.on_cpu else torch.bfloat16

    # ------------------------------------------------------------------ needs

    def needs(self, variant: Variant, max_tokens_per_microbatch: int | None = None, devices: int = 1) -> Needs:
        """What a variant needs, from models of few layers; all of them where layers differ."""
        work = self.workload(max_tokens_per_microbatch, devices)
        key = (variant, work)
        if key not in self._found:
            uneven = self.checked.model.freeze or self.checked.model.freeze_layers or self.layers <= MORE
            if not uneven:
                low, high = self._trace(variant, work, FEW), self._trace(variant, work, MORE)
                found = [extrapolate(a, b, (FEW, MORE), self.layers) for a, b in zip(low[:2], high[:2], strict=True)]
                fixed = extrapolate(low[1], high[1], (FEW, MORE), 0)
                generation = low[2] and extrapolate(low[2], high[2], (FEW, MORE), self.layers)
                whole = sum(p.numel() for p in self._shapes(replace(variant, adapter="none", quantization="none")).model
                            .network.parameters())  # fmt: skip
                uneven = abs(whole - found[0].parameters) > 1e-6 * whole
            if uneven:
                inventory, passes, generation = self._trace(variant, work, None)
                found, fixed = [inventory, passes], Passes()
            self._found[key] = Needs(found[0], found[1], fixed, generation)
        return self._found[key]

    def _shapes(self, variant: Variant, layers: int | None = None) -> Shapes:
        c = self.checked
        model = c.model.model_copy(update={"gradient_checkpointing": variant.checkpointing})
        own = variant.adapter == "lora" and c.algorithm.critic == "own" and "value" in c.algorithm.reads
        if own and variant.checkpointing:
            raise ConfigError("model.gradient_checkpointing: not with an adapter and algorithm.critic=own")
        adapter = c.adapter
        if (variant.adapter == "none") != adapter.trains_base:
            adapter = FullFineTuning() if variant.adapter == "none" else LoRA()
        return Shapes(
            self.config,
            model,
            adapter,
            variant.quantization,
            c.algorithm,
            self.dtype(variant),
            compute=self._compute_dtype(),
            saved=self.saved if variant.adapter == "lora" else None,
            layers=layers,
            reference=self.has_reference,
            double=c.quantization.double_quant,
        )

    @property
    def has_reference(self) -> bool:
        source = self.checked.source
        return "ref_logp" in self.checked.algorithm.needs or (self.samples and source.policy == "reference")

    @cached_property
    def scorers(self) -> float:
        """Bytes of the models that score, which every device has whole, in the precision they were saved in."""
        total = 0.0
        for settings in _models(self.checked.scorers):
            config, _ = read_config(settings)
            total += bare_bytes(config, settings, self.on_cpu)
        return total

    def _trace(self, variant: Variant, work: Workload, layers: int | None) -> tuple[Inventory, Passes, Any]:
        shapes = self._shapes(variant, layers)
        generation = None
        if self.samples:
            rollout = self.rollout
            k = self.checked.source.group_size
            rows = max(1, rollout.max_batch_tokens // (work.prompt + rollout.max_new_tokens))
            prompts = self.checked.source.rollout_batch_size or self.checked.training.batch_size
            generation = trace_generation(shapes, max(1, min(rows // k, prompts)), min(k, rows), work, rollout)
        return shapes.inventory(), trace_passes(shapes, work), generation

    def memory(
        self,
        variant: Variant,
        mode: str,
        devices: int,
        max_tokens_per_microbatch: int | None = None,
        per_device: int | None = None,
    ) -> Memory:
        """On one of so many devices. `per_device`: devices among which a step's groups are divided for the workload,
        where tables shall differ in the mode alone."""
        among = per_device or devices
        needs = self.needs(variant, max_tokens_per_microbatch, among)
        critic = self.checked.algorithm.critic == "own" and "value" in self.checked.algorithm.reads
        setting = Setting(
            mode,
            devices,
            self.micro_batches(self.workload(max_tokens_per_microbatch, among), among),
            critic and variant.adapter == "none",
            self.checked.training.save_model == "merged" and variant.adapter == "lora",
            self.on_cpu,
            self.scorers,
        )
        return device_memory(needs.inventory, needs.passes, needs.generation, self.optimizer, setting)


def _models(scorers: Iterable[Any]) -> Iterator[ModelSettings]:
    """The models that scorers load, also within a scorer made of others."""
    for scorer in scorers:
        settings = getattr(scorer, "settings", None)
        if isinstance(settings, ModelSettings):
            yield settings
        members = getattr(scorer, "members", None)
        if isinstance(members, dict):
            yield from _models(members.values())
