"""What one device holds in each mode, from what the whole model holds."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from alignlab.build import build
from alignlab.planning.shapes import Inventory
from alignlab.planning.trace import Generation, Passes
from alignlab.training.distributed.engine import BUCKET as EXCHANGED
from alignlab.training.distributed.zero import BUCKET as REDUCED
from alignlab.training.distributed.zero import LIVE as HELD
from alignlab.training.settings import DIVIDING

MODES = ("single", "ddp", "zero1", "zero2", "fsdp", "zero3", "zero3_offload")
"""From the simplest and fastest to the one that waits longest for others, or for the host."""

CONTEXT = 0.8e9
"""Bytes that a process takes on a GPU before anything is computed: CUDA's context and kernels, cuBLAS workspaces."""

NCCL = 0.5e9
"""Bytes of NCCL's channels, with more than one device."""

BUCKET = float(REDUCED)
"""Gradients that DeepSpeed reduces at a time (`reduce_bucket_size`), in numbers: a buffer made whole on a GPU."""

LIVE = float(HELD)
"""Weights that ZeRO-3 keeps gathered during a pass (`stage3_max_live_parameters`, `stage3_max_reuse_distance`)."""

GB = 1e9


@dataclass(frozen=True)
class Optimizer:
    """What an optimiser holds.

    Attributes:
        own: states of a weight's shape in its precision, as multiples of the weights.
        fixed: bytes for each number trained, whatever its precision.
        factored: one mean of squares for each row and column of a matrix (Adafactor), in float32.
        paged: its states move to the host when a GPU is full.
        temporary: of one tensor, while it is updated, as multiples of the tensor.
    """

    name: str
    own: float = 0.0
    fixed: float = 0.0
    factored: bool = False
    paged: bool = False
    temporary: float = 2.0

    def states(self, numbers: float, weights: float, inventory: Inventory) -> float:
        """Bytes for `numbers` trained numbers that take `weights` bytes."""
        if self.factored:
            share = numbers / inventory.trained if inventory.trained else 0.0
            return 4.0 * share * (inventory.factored + inventory.trained - inventory.matrices)
        return self.own * weights + self.fixed * numbers


def optimizer_of(values: dict[str, Any]) -> Optimizer:
    """Asked of the optimiser itself, after a step on a small matrix; Adafactor's depend on the shape."""
    name = str(values["_target_"]).rsplit(".", 1)[-1]
    if "Adafactor" in name:
        return Optimizer(name, factored=True, temporary=3.0)
    side = 512
    weight = torch.nn.Parameter(torch.zeros(side, side))
    made = build(values, "optimizer", [weight])
    weight.grad = torch.ones_like(weight)
    paged = "Paged" in name
    temporary = 0.0 if "bitsandbytes" in values["_target_"] else 2.0 if "Adam" in name else 1.0
    try:
        made.step()
    except Exception:  # one that steps on GPUs alone: as Adam in float32
        return Optimizer(name, fixed=8.0, paged=paged, temporary=temporary)
    held = [v for state in made.state.values() for v in state.values() if isinstance(v, torch.Tensor) and v.dim()]
    own = sum(v.numel() == weight.numel() and v.dtype == weight.dtype for v in held)
    # Tables that do not grow with the weights are left out.
    fixed = sum(v.nbytes for v in held if v.dtype != weight.dtype or side < v.numel() != weight.numel())
    if "bitsandbytes" in values["_target_"]:  # its states are 32 or 8 bits whatever the weights are
        return Optimizer(name, fixed=4.0 * own + fixed / weight.numel(), paged=paged, temporary=temporary)
    return Optimizer(name, own=float(own), fixed=fixed / weight.numel(), paged=paged, temporary=temporary)


@dataclass(frozen=True)
class Setting:
    """How a run is spread.

    Attributes:
        micro_batches: of a step, on each device.
        own_critic: a critic with a decoder of its own.
        merged: the adapter is folded into a copy of the model at the end.
        on_cpu: processes compute on CPUs: no context, no buffer before it is used, one tensor updated at a time.
        scorers: bytes of models that score.
    """

    mode: str = "single"
    devices: int = 1
    micro_batches: int = 2
    own_critic: bool = False
    merged: bool = False
    on_cpu: bool = False
    scorers: float = 0.0


@dataclass(frozen=True)
class Memory:
    """Bytes on one device.

    Attributes:
        held: always there: weights, reference, optimiser states, ...
        phases: what comes on top in each part of an iteration, itemised; the largest decides.
        overhead: of the framework.
        host: of the host's memory, for each device.
        paged: of the optimiser's states, what moves to the host when the device is full.
    """

    held: dict[str, float]
    phases: dict[str, dict[str, float]]
    overhead: float = 0.0
    host: float = 0.0
    paged: float = 0.0

    @property
    def peak(self) -> str:
        """The phase that needs most."""
        return max(self.phases, key=lambda name: sum(self.phases[name].values()))

    @property
    def total(self) -> float:
        return self.overhead + sum(self.held.values()) + sum(self.phases[self.peak].values())


def device_memory(
    what: Inventory, passes: Passes, generation: Generation | None, optimizer: Optimizer, setting: Setting
) -> Memory:
    """ZeRO-1 divides the optimiser's states, ZeRO-2 the gradients too, ZeRO-3 and FSDP also the weights (Rajbhandari et
    al. 2020, arXiv:1910.02054, section 5); activations are divided by nobody.

    What is not in the paper, but in DeepSpeed: a float32 copy of the trained weights, divided, whatever their own
    precision; a gradient in one piece, and in a bucket, beside its parts. Weights of a quantised base stay whole.
    """
    mode, n = setting.mode, max(1, setting.devices)
    zero, divided, offload = mode.startswith("zero"), mode in DIVIDING, mode.endswith("offload")
    part = 1 / n if divided else 1.0
    movable = what.trained_weights + what.frozen_weights
    weights = what.quantised + movable * part
    reference = what.reference * part
    share = 1 / n if zero or divided else 1.0
    flat = 4.0 * what.trained * share if zero else 0.0  # ZeRO works on float32 whatever the weights are
    states = optimizer.states(what.trained * share, flat or what.trained_weights * share, what)
    held = {"weights": weights, "reference": reference, "optimizer states": states, "float32 copy": flat}
    gradients, buffers, after = _gradients(what, setting, flat)
    host = 0.0
    if offload:
        host = movable * part + reference + states + flat + gradients
        held = {"weights": what.quantised, "reference": 0.0, "optimizer states": 0.0, "float32 copy": 0.0}
        gradients = after = 0.0
    temporary = _temporary(what, optimizer, setting, flat)
    gathered = {"gathered weights": _gathered(what, setting)} if divided else {}
    whole = {"gathered weights": max(movable, what.reference)} if divided else {}
    most = max(passes.forward, passes.backward)
    last = what.table_gradient + (passes.saved / 2 if setting.own_critic else 0.0)
    first = setting.micro_batches == 1 and mode in ("single", "ddp")
    activations = most if first else max(most, last)
    phases = {
        "training": {
            "gradients": what.head_gradients if first else gradients,
            "activations": activations,
            **({"communication": buffers} if buffers else {}),
            **gathered,
        },
        "update": {"gradients": gradients + after, "temporary": 0.0 if offload else temporary},
        "scoring": {"activations": passes.scoring, **gathered},
    }
    if first:  # gradients come one by one, while activations go
        phases["gradients"] = {"gradients": gradients}
    elif mode.startswith("zero3"):  # the buffer stays from step to step
        held["communication"] = phases["training"].pop("communication")
    elif zero and setting.on_cpu:  # so does what DeepSpeed moves them to: nobody has written to the rest of its buffer
        phases["training"]["communication"] = 0.0 if mode == "zero1" else what.head_gradients
        phases["gradients"] = {"gradients": what.gradients / n, "communication": buffers}
    if generation is not None:
        phases["sampling"] = {"generation": max(generation.prefill, generation.step), **whole}
    if divided and not what.quantised:  # every process reads all of it, and the reference, before they are divided
        before = what.weights + what.reference
        host = max(host, before)
        if setting.on_cpu:
            phases["loading"] = {"whole model": max(before - sum(held.values()), 0.0)}
    if divided:  # the first process puts the model together anew in the host's memory
        host = max(host, what.weights)
        if setting.on_cpu:
            phases["saving"] = {"whole model": what.weights}
    elif setting.merged:
        phases["saving"] = {"merged copy": movable}
    held["scorers"] = setting.scorers
    if mode == "ddp":  # the wrapper's own buckets stay, which on a CPU nobody has written to; ours come and go
        held["communication"] = min(EXCHANGED, what.gradients) if setting.on_cpu else what.gradients
    overhead = 0.0 if setting.on_cpu else CONTEXT + (NCCL if n > 1 else 0.0)
    paged = held["optimizer states"] if optimizer.paged else 0.0
    return Memory({k: v for k, v in held.items() if v}, phases, overhead, host, paged)


def _gradients(what: Inventory, setting: Setting, flat: float) -> tuple[float, float, float]:
    """(gradients while training, what they are exchanged in, what is made of them for the update), in bytes."""
    mode, n = setting.mode, max(1, setting.devices)
    bucket = (min(BUCKET, what.trained) if setting.on_cpu else BUCKET) * 4.0
    if mode == "zero1":  # whole, until the last micro-batch's are reduced
        return what.gradients, bucket, flat
    if mode.startswith("zero"):
        return what.gradients / n, bucket, flat
    if mode == "fsdp":  # a layer's at a time
        layer = what.layer * what.gradients / max(what.weights, 1.0)
        return what.gradients / n, 2 * layer, 0.0
    return what.gradients, 0.0, 0.0


def _gathered(what: Inventory, setting: Setting) -> float:
    """Weights that are whole during a pass: two layers and what is in none in FSDP, as many as it likes in ZeRO-3."""
    movable = what.trained_weights + what.frozen_weights
    if setting.mode == "fsdp":
        return min(movable, 2 * what.layer + what.outside)
    numbers = max(what.parameters, 1.0)
    return min(movable, LIVE * movable / numbers)


def _temporary(what: Inventory, optimizer: Optimizer, setting: Setting, flat: float) -> float:
    """What the update makes and throws away: torch updates all tensors at once on GPUs, one after the other on CPUs
    and where they are divided one by one; ZeRO's is one flat tensor."""
    if not optimizer.temporary:
        return 0.0
    if flat:
        return flat * (optimizer.temporary if setting.on_cpu else optimizer.temporary / 2)
    if setting.mode == "fsdp":
        return optimizer.temporary * what.largest / max(1, setting.devices)
    if setting.on_cpu or optimizer.factored:
        return optimizer.temporary * what.largest
    return what.trained_weights * optimizer.temporary / 2
