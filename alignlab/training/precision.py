"""Precision of a run: from the config and the device to what weights are held in and products are made in; and, once
the engine stands, what they really are."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from alignlab.core import ConfigError, Group, Response
from alignlab.models import PackedModel, Reference, evaluating
from alignlab.models.precision import hold_as_computed, products, use_masters
from alignlab.models.quantization import has_bfloat16, name_of, quantization_of
from alignlab.training.settings import TrainingSettings

if TYPE_CHECKING:
    from alignlab.training.distributed.engine import Engine

log = logging.getLogger(__name__)

HALF = {"bf16": torch.bfloat16, "fp16": torch.float16}

PURE = (
    "training.mixed_precision=pure: weights and optimiser states stay in {dtype}: updates smaller than about 1/256 of "
    "a weight are lost, and small learning rates change next to nothing. Give training.mixed_precision=auto, or "
    "optimizer=adamw_kahan, which keeps what rounding takes away"
)


def resolve(setting: str, device: torch.device, weights: torch.dtype, has: bool | None = None) -> torch.dtype | None:
    """What products are made in, from `training.mixed_precision`; None: in what the weights are held in.

    "auto" is bfloat16 on GPUs that have it in hardware, and also where the model's weights are in bfloat16 on a CPU:
    that is never so unless it was asked for. On GPUs without bfloat16 a model in float16 is trained as with
    "fp16", with losses scaled; `observe` refuses float16 products without. With "pure" weights stay in what the model
    was loaded in, else they are float32.

    Args:
        weights: what the model is loaded in.
        has: whether the device computes in bfloat16; None: it is asked.

    Raises:
        ConfigError: this device does not have it.
    """
    has = has_bfloat16(device) if has is None else has
    if setting == "auto":
        if weights == torch.float16 and device.type == "cuda" and not has:
            return torch.float16
        wanted = device.type == "cuda" or (device.type == "cpu" and weights == torch.bfloat16)
        return torch.bfloat16 if wanted and has and weights != torch.float64 else None
    if setting == "bf16" and not has:
        raise ConfigError("training.mixed_precision=bf16: this GPU does not have bfloat16: give fp16, no or auto")
    if setting == "fp16" and device.type != "cuda":
        raise ConfigError("training.mixed_precision=fp16: needs a GPU: give bf16, no or auto")
    return HALF.get(setting)


def scaling(setting: str, weights: torch.dtype) -> str:
    """For `Processes`: the setting, or "fp16" where it comes to float16 products, whose losses are scaled."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return "fp16" if setting == "auto" and resolve(setting, device, weights) == torch.float16 else setting


@dataclass(frozen=True)
class Precision:
    """What a run is to compute in.

    Attributes:
        compute: dtype of products; None: that of the weights.
        masters: whether trained weights are float32 or better.
        autocasts: whether the model makes its products so by itself; else the engine does, in all of the model.
    """

    compute: torch.dtype | None
    masters: bool
    autocasts: bool

    @classmethod
    def of(
        cls, setting: str, mode: str, weights: torch.dtype, device: torch.device, has: bool | None = None
    ) -> Precision:
        """That of a run in a mode of `distributed`; the rest as in `resolve`."""
        compute = resolve(setting, device, weights, has)
        return cls(compute, setting != "pure", compute is None or mode != "fsdp")

    @property
    def name(self) -> str:
        """For identities of what was computed: another name, other numbers."""
        return "no" if self.compute is None else f"{name(self.compute)}{'' if self.autocasts else ' throughout'}"

    def products_in(self, weights: torch.dtype, trains_base: bool) -> torch.dtype:
        """What a model that is loaded in `weights` makes its products in; an adapter leaves its base as it is."""
        held = torch.promote_types(weights, torch.float32) if self.masters and trains_base else weights
        return self.compute or held

    def apply(self, model: PackedModel, reference: Reference | None, moves_softly: bool) -> None:
        """Put it into a model that is complete, before an engine and an optimiser get it.

        Args:
            reference: a copy of the model is held in what computes the same as the model does.
            moves_softly: the reference is a running mean of the policy, which needs all its bits.
        """
        held = {model, reference.held_in} if reference is not None else {model}
        for part in held:
            part.compute_dtype, part.autocasts = self.compute, self.autocasts
        if self.masters:
            use_masters(model)
        if reference is not None and not reference.shares_weights:
            if moves_softly and any(p.requires_grad and p.dtype.itemsize < 4 for p in model.network.parameters()):
                raise ConfigError(
                    "source.ref_update_tau: a reference in half precision would lose most of each small move: give "
                    "source.ref_update_tau=1, or training.mixed_precision=auto"
                )
            hold_as_computed(reference.held_in, model, moves_softly)


def set_float32_products(settings: TrainingSettings, device: torch.device) -> None:
    """How exact products of float32 numbers are, on a GPU; CPUs make them exact."""
    if device.type == "cuda":
        torch.set_float32_matmul_precision(settings.float32_matmul)


def warn_of_rounding(model: PackedModel, optimizer: torch.optim.Optimizer) -> str | None:
    """What to say where updates are lost to rounding: half precision is trained, and nothing compensates for it."""
    half = {p.dtype for p in model.parameters() if p.requires_grad and p.is_floating_point() and p.dtype.itemsize < 4}
    compensates = any(optimizer.defaults.get(k) for k in ("kahan_sum", "bf16_stochastic_round"))
    return PURE.format(dtype=names(half)) if half and not compensates else None


def observe(engine: Engine, reads: Iterable[str]) -> dict[str, str]:
    """What a run holds and computes in, by a look at the weights and a forward pass; called by all processes.

    Returns:
        dtypes by name, for people and for `result.json`: "weights" (trained), "frozen", "products", "heads" (with few
        outputs), "reduced" (gradients, between processes).

    Raises:
        ConfigError: it is not what was asked for.
    """
    model = engine.model
    limit = min(8, model.max_length or 8) // 2
    group = Group([1] * limit, [Response([1] * limit)])
    with evaluating(model), torch.no_grad(), products(model) as seen:
        engine(model.lay_out([group]), tuple(reads), 1.0)
    weights = {p.dtype for p in engine.trained().values()}
    frozen = {p.dtype for p in model.parameters() if not p.requires_grad and p.is_floating_point()}
    found = {"weights": weights, "frozen": frozen, "products": seen.trunk, "heads": seen.heads}
    if engine.processes.world > 1:
        found["reduced"] = engine.reduced_in()
    wanted = engine.precision
    half = set(HALF.values())
    for key, dtypes in found.items():
        full = key in ("heads", "reduced") or (key == "weights" and wanted.masters)
        if full and dtypes & half:
            raise ConfigError(f"precision: {key} were to be float32, but are {names(dtypes)} with {engine.name}")
    asked = weights | frozen if wanted.compute is None else {wanted.compute}
    if seen.trunk and (not asked & seen.trunk or seen.trunk - asked - _others(model)):
        raise ConfigError(
            f"training.mixed_precision: products were to be {names(asked)}, but are {names(seen.trunk)} with "
            f"{engine.name}"
        )
    if (
        torch.float16 in seen.trunk
        and engine.processes.accelerator.scaler is None
        and quantization_of(model.base) is None
    ):
        raise ConfigError(
            "model.dtype=float16: products would be float16, and losses are not scaled: small gradients would "
            "become 0: give training.mixed_precision=fp16 on a GPU, or model.dtype=bfloat16 or float32"
        )
    return {key: names(dtypes) for key, dtypes in found.items() if dtypes}


def _others(model: PackedModel) -> set[torch.dtype]:
    """What else products of a model are made in, whatever was asked for. A base in 4 bits has a dtype of its own for
    them, one in another quantisation is multiplied by its library, and routers of experts are often float32."""
    config, found = quantization_of(model.base), set[torch.dtype]()
    if config is not None and name_of(config) in ("nf4", "fp4"):
        found.add(getattr(torch, str(config.get("bnb_4bit_compute_dtype")).removeprefix("torch."), torch.float32))
    elif config is not None:
        found |= {torch.float32, torch.bfloat16, torch.float16, torch.int8}
    if any("expert" in key for key in model.config.to_dict()):
        found.add(torch.float32)
    return found


def check_states(engine: Engine) -> bool:
    """After the first step: beside float32 weights, the optimiser's states are float32 too, or integers that it packs
    them in.

    Returns:
        Whether there were any yet.

    Raises:
        ConfigError: they are not.
    """
    states: Any = engine.optimizer.state
    coarse = {
        value.dtype
        for state in states.values()
        for value in state.values()
        if isinstance(value, torch.Tensor) and value.is_floating_point() and value.dim() and value.dtype.itemsize < 4
    }
    if coarse and engine.precision.masters:
        raise ConfigError(f"optimizer: its states were to be float32, but are {names(coarse)} with {engine.name}")
    return bool(states)


def in_words(found: dict[str, str], device: torch.device) -> str:
    """One plain line, as in "weights float32, products bfloat16, gradients reduced in float32"."""
    parts = [f"weights {found['weights']}"]
    if "frozen" in found and found["frozen"] != found["weights"]:
        parts.append(f"frozen weights {found['frozen']}")
    parts.append(f"products {found.get('products', found['weights'])}")
    if "heads" in found and found["heads"] != found.get("products"):
        parts.append(f"heads {found['heads']}")
    if "reduced" in found:
        parts.append(f"gradients reduced in {found['reduced']}")
    if device.type == "cuda" and "float32" in " ".join(parts[1:]):
        level = torch.get_float32_matmul_precision()
        parts.append(
            f"float32 products {'exact' if level == 'highest' else 'in TF32'} (training.float32_matmul={level})"
        )
    return ", ".join(parts)


def name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def names(dtypes: Iterable[torch.dtype]) -> str:
    return " and ".join(sorted(map(name, dtypes)))
