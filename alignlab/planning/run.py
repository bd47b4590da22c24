"""The run that a config describes: what it needs, as configured and with other adapters and bases."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from pydantic import Field

from alignlab.build import section
from alignlab.core import AdapterKind
from alignlab.core.memory import usual_tokens
from alignlab.core.settings import Settings
from alignlab.models import FullFineTuning, LoRA, ModelSettings
from alignlab.models.outline import dtype_of
from alignlab.planning.memory import Memory, Optimizer, device_memory, optimizer_of
from alignlab.planning.shapes import Shapes, network, read_config, shortened
from alignlab.planning.trace import Needs, Sampling, Workload, extrapolate, trace
from alignlab.rollout import RolloutSettings
from alignlab.training.precision import Precision
from alignlab.training.run_config import check

FEW, MORE = 2, 4
"""Layers of the models that are traced; everything is linear in them from there on."""


class PlanSettings(Settings):
    """The keys of `configs/plan.yaml` beside those of a run: on what, for data of what lengths."""

    gpu: str | float | None = None
    gpus: int | None = Field(None, ge=1)
    prompt_tokens: int = Field(256, ge=1)
    response_tokens: int = Field(256, ge=1)
    responses: int | None = Field(None, ge=1)
    peak_tflops: float | None = Field(None, gt=0)
    share_of_peak: float = Field(0.4, gt=0, le=1)


@dataclass(frozen=True)
class Variant:
    """What is trained, on what base, and whether activations are recomputed.

    Attributes:
        adapter: "none", or "lora" for the run's own kind of adapter, LoRA where it has none.
        quantization: of the base, as in `QuantizationSettings.kind`.
    """

    adapter: str
    quantization: str
    checkpointing: bool

    def overrides(self, asked: Variant) -> dict[str, str]:
        """What makes a run of it, beside the overrides of the one that was asked for."""
        found = {
            "adapter": self.adapter,
            "quantization": self.quantization,
            "model.gradient_checkpointing": str(self.checkpointing).lower(),
        }
        given = (asked.adapter, asked.quantization, str(asked.checkpointing).lower())
        return {key: value for (key, value), other in zip(found.items(), given, strict=True) if value != other}


class PlannedRun:
    """A run as configured, and its variants.

    Args:
        config: the resolved config, with the keys of `PlanSettings`.
        on_cpu: whether processes compute on CPUs.

    Raises:
        ConfigError: as a run of the config would, and where the model has no config that can be read.
    """

    def __init__(self, config: dict[str, Any], on_cpu: bool) -> None:
        self.settings = section(PlanSettings, {k: config[k] for k in PlanSettings.model_fields}, "")
        self.checked, self.on_cpu, self._optimizer = check(config), on_cpu, config["optimizer"]
        c, algorithm = self.checked, self.checked.algorithm
        self.config, self.saved = read_config(c.model)
        self.layers = int(self.config.get_text_config().num_hidden_layers)
        adapter = "none" if c.adapter.trains_base else "lora"
        self.asked = Variant(adapter, c.quantization.kind, c.model.gradient_checkpointing)
        self.adapter: AdapterKind = LoRA() if c.adapter.trains_base else c.adapter
        self.devices = 1 if c.distributed.mode == "single" else c.distributed.processes or self.settings.gpus or 1
        self.samples = c.samples
        self.rollout, self.notes = RolloutSettings(temperature=c.rollout.temperature), list[str]()
        if isinstance(c.rollout, RolloutSettings):
            self.rollout = c.rollout
        elif c.samples:
            self.notes.append(f"sampling is planned as that of rollout=local: {type(c.rollout).__name__} is not known")
        self.has_reference = "ref_logp" in algorithm.needs or (self.samples and c.source.policy == "reference")
        self.own_critic = algorithm.critic == "own" and "value" in algorithm.reads
        self.max_tokens_per_microbatch = c.training.max_tokens_per_microbatch or usual_tokens(on_cpu)
        self._needs: dict[tuple[Variant, Workload, Precision], Needs] = {}

    def name(self, variant: Variant) -> str:
        """For people, as in "full", "LoRA", "QLoRA"."""
        kind = type(self.adapter).__name__
        return (
            {"none": kind, "nf4": f"Q{kind}", "int8": f"{kind}, int8"}[variant.quantization]
            if variant.adapter == "lora"
            else "full"
        )

    @cached_property
    def optimizer(self) -> Optimizer:
        return optimizer_of(self._optimizer)

    @cached_property
    def scorers(self) -> float:
        """Bytes of the models that score, which every device has whole."""
        total = 0
        for settings in _models(self.checked.scorers):
            config, _ = read_config(settings)
            model = network(config, "score", 1, dtype_of(config, settings, self.on_cpu), settings)
            total += sum(p.nbytes for p in model.parameters())
        return float(total)

    # ------------------------------------------------------------------ the workload

    @property
    def responses(self) -> int:
        """Of each group."""
        source = self.checked.source
        usual = 2 if self.checked.algorithm.unit in ("pair", "group") else 1
        return self.settings.responses or (source.group_size + bool(source.keep) if self.samples else usual)

    @property
    def share(self) -> int:
        """Groups of a step on each device."""
        return math.ceil(self.checked.training.batch_size / self.devices)

    def workload(self, max_tokens_per_microbatch: int | None = None) -> Workload:
        """A micro-batch: as many rows as it may have tokens, and no more than a device's share of a step."""
        s = self.settings
        response = min(self.rollout.max_new_tokens, s.response_tokens) if self.samples else s.response_tokens
        temperature = self.rollout.temperature if self.samples else 1.0
        one = Workload(1, s.prompt_tokens, response, self.responses, temperature)
        tokens = max_tokens_per_microbatch or self.max_tokens_per_microbatch
        return replace(one, rows=max(1, min(tokens // one.length, self.share)))

    @property
    def sampled_rows(self) -> int:
        """Responses that are sampled at a time."""
        rollout = self.rollout
        return max(1, rollout.max_batch_tokens // (self.settings.prompt_tokens + rollout.max_new_tokens))

    def _sampling(self) -> Sampling | None:
        if not self.samples:
            return None
        source, each = self.checked.source, self.checked.source.group_size
        prompts = min(self.sampled_rows // each, source.rollout_batch_size or self.checked.training.batch_size)
        return Sampling(max(1, prompts), min(each, self.sampled_rows), self.rollout)

    # ------------------------------------------------------------------ needs

    def needs(self, variant: Variant, max_tokens_per_microbatch: int | None = None, mode: str = "single") -> Needs:
        """What a variant needs, from models of few layers; from one of all its layers where these differ."""
        work, precision = self.workload(max_tokens_per_microbatch), self.precision(variant, mode)
        key = (variant, work, precision)
        if key not in self._needs:

            def traced(layers: int | None) -> Needs:
                return trace(self.shapes(variant, layers, precision), work, self._sampling())

            alike = self._alike
            self._needs[key] = (
                extrapolate(traced(FEW), traced(MORE), (FEW, MORE), self.layers) if alike else traced(None)
            )
        return self._needs[key]

    @cached_property
    def _alike(self) -> bool:
        """Whether all layers are: none is frozen alone, and all together have as many numbers as the first ones say."""
        model = self.checked.model
        if model.freeze or model.freeze_layers or self.layers <= MORE:
            return False

        def numbers(layers: int | None) -> int:
            made = network(shortened(self.config, layers), "policy", 1, torch.float32, model)
            return sum(p.numel() for p in made.parameters())

        few, more = numbers(FEW), numbers(MORE)
        return (more - few) * (self.layers - MORE) == (numbers(None) - more) * (MORE - FEW)

    def precision(self, variant: Variant, mode: str = "single") -> Precision:
        """What is held and computed in: of a GPU, that it has bfloat16."""
        device = torch.device("cpu" if self.on_cpu else "cuda")
        return Precision.of(self.checked.training.mixed_precision, mode, self.dtype(variant), device, has=True)

    def shapes(self, variant: Variant, layers: int | None = None, precision: Precision | None = None) -> Shapes:
        """The model of a variant, without contents.

        Raises:
            ConfigError: there is no such model.
        """
        c = self.checked
        return Shapes(
            self.config,
            c.model.model_copy(update={"gradient_checkpointing": variant.checkpointing}),
            self.adapter if variant.adapter == "lora" else FullFineTuning(),
            c.quantization.model_copy(update={"kind": variant.quantization}),
            c.algorithm,
            self.dtype(variant),
            saved=self.saved if variant.adapter == "lora" else None,
            layers=layers,
            reference=self.has_reference,
            on_cpu=self.on_cpu,
            precision=precision or self.precision(variant),
        )

    def dtype(self, variant: Variant) -> torch.dtype:
        """Of the weights that are not quantised, as `load_model` has them."""
        if self.checked.model.dtype == "auto" and variant.quantization != "none":
            return torch.float32 if self.on_cpu else torch.bfloat16
        return dtype_of(self.config, self.checked.model, self.on_cpu)

    def memory(self, variant: Variant, mode: str, devices: int, max_tokens_per_microbatch: int | None = None) -> Memory:
        """On one of so many devices, with the micro-batches of the run as configured: only the mode differs."""
        return device_memory(
            self.needs(variant, max_tokens_per_microbatch, mode),
            self.optimizer,
            mode,
            devices,
            micro_batches=math.ceil(self.share / self.workload(max_tokens_per_microbatch).rows),
            merged=self.checked.training.save_model == "merged" and variant.adapter == "lora",
            scorers=self.scorers,
            on_cpu=self.on_cpu,
        )


def _models(scorers: Iterable[Any]) -> Iterator[ModelSettings]:
    """The models that scorers load, also within a scorer made of others."""
    for scorer in scorers:
        settings = getattr(scorer, "settings", None)
        if isinstance(settings, ModelSettings):
            yield settings
        members = getattr(scorer, "members", None)
        if isinstance(members, dict):
            yield from _models(members.values())
