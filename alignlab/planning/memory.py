"""What one device holds in each mode, from what the whole model needs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from alignlab.build import build
from alignlab.planning.trace import Live, Needs
from alignlab.training.distributed.engine import BUCKET as EXCHANGED
from alignlab.training.distributed.zero import BUCKET as REDUCED
from alignlab.training.distributed.zero import LIVE as GATHERED
from alignlab.training.settings import DIVIDING

MODES = ("single", "ddp", "zero1", "zero2", "fsdp", "zero3", "zero3_offload")
"""From the simplest and fastest to the one that waits longest for others, or for the host."""

CONTEXT = 0.8e9
"""Bytes that a process takes on a GPU before anything is computed: CUDA's context and kernels, cuBLAS workspaces."""

NCCL = 0.5e9
"""Bytes of NCCL's channels, with more than one device."""

GB = 1e9

SIDE = 2048
"""Of the matrix that an optimiser is tried on. State tensors of fewer numbers do not grow with the weights."""


@dataclass(frozen=True)
class Optimizer:
    """What an optimiser holds.

    Attributes:
        own: states in the dtype of the weights, as a multiple of their bytes.
        fixed: bytes of states for each trained number, whatever its dtype.
        paged: its states move to the host when a GPU is full.
        temporary: made and thrown away while one tensor is updated, as a multiple of its bytes.
    """

    own: float = 0.0
    fixed: float = 0.0
    paged: bool = False
    temporary: float = 2.0

    def states(self, numbers: float, weights: float) -> float:
        """Bytes for `numbers` trained numbers that take `weights` bytes."""
        return self.own * weights + self.fixed * numbers


def optimizer_of(values: dict[str, Any]) -> Optimizer:
    """Asked of the optimiser itself: two steps on a small matrix, whose states and temporaries are counted."""
    paged = "Paged" in str(values["_target_"])
    try:
        # Half precision tells which states have the dtype of the weights; temporaries are those of float32.
        states, _ = _tried(values, torch.bfloat16)
        _, temporary = _tried(values, torch.float32)
    except Exception:  # one that runs on GPUs alone: as Adam in float32
        return Optimizer(fixed=8.0, paged=paged)
    numbers = SIDE * SIDE
    own = sum(state.numel() == numbers and state.dtype == torch.bfloat16 for state in states)
    fixed = sum(s.nbytes for s in states if s.numel() >= SIDE) - own * 2 * numbers
    return Optimizer(float(own), fixed / numbers, paged, temporary)


def _tried(values: dict[str, Any], dtype: torch.dtype) -> tuple[list[torch.Tensor], float]:
    """(the states of a matrix of this dtype, what a step makes and throws away as a multiple of it)."""
    weight = torch.nn.Parameter(torch.zeros(SIDE, SIDE, dtype=dtype))
    weight.grad = torch.ones_like(weight)
    optimizer = build(values, "optimizer", [weight])
    optimizer.step()
    states = [v for state in optimizer.state.values() for v in state.values() if isinstance(v, torch.Tensor)]
    with Live([weight, weight.grad, *states]) as live:
        optimizer.step()
    return states, round(live.most / weight.nbytes, 1)


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
    needs: Needs,
    optimizer: Optimizer,
    mode: str = "single",
    devices: int = 1,
    *,
    micro_batches: int = 2,
    merged: bool = False,
    scorers: float = 0.0,
    on_cpu: bool = False,
) -> Memory:
    """ZeRO-1 divides the optimiser's states, ZeRO-2 the gradients too, ZeRO-3 and FSDP also the weights (Rajbhandari et
    al. 2020, arXiv:1910.02054, section 5); activations are divided by nobody.

    What is not in the paper, but in DeepSpeed: a float32 copy of the trained weights, divided, whatever their own
    dtype; a gradient in one piece, and in a bucket, beside its parts. Weights of a quantised base stay whole.

    Args:
        micro_batches: of a step, on each device.
        merged: the adapter is folded into a copy of the model at the end.
        scorers: bytes of models that score.
        on_cpu: processes compute on CPUs: no context, no buffer before it is used, one tensor updated at a time.
    """
    zero, divided, offload = mode.startswith("zero"), mode in DIVIDING, mode.endswith("offload")
    weights_share = 1 / devices if divided else 1.0
    states_share = 1 / devices if divided or zero else 1.0
    movable = needs.trained_weights + needs.frozen_weights
    # ZeRO works on float32 whatever the weights are.
    flat = 4.0 * needs.trained * states_share if zero else 0.0
    held = {
        "weights": needs.quantised + movable * weights_share,
        "reference": needs.reference * weights_share,
        "optimizer states": optimizer.states(
            needs.trained * states_share, flat or needs.trained_weights * states_share
        ),
        "float32 copy": flat,
        "scorers": scorers,
    }
    gradients = needs.trained_weights / devices if divided or mode == "zero2" else needs.trained_weights
    host = 0.0
    if offload:
        host = sum(held.values()) - scorers - needs.quantised + gradients
        held |= {"weights": needs.quantised, "reference": 0.0, "optimizer states": 0.0, "float32 copy": 0.0}
        gradients = 0.0
    gathered = {"gathered weights": _gathered(needs, mode)} if divided else {}
    buffers = _buffers(needs, mode, devices, on_cpu)
    # With one micro-batch gradients come while activations go; from the second one on they are all there.
    first = micro_batches == 1 and mode in ("single", "ddp")
    phases = {
        "training": {
            "gradients": needs.head_gradients if first else gradients,
            "activations": needs.activations if first else max(needs.activations, needs.table_gradient),
            **({"communication": buffers} if buffers else {}),
            **gathered,
        },
        "update": {
            "gradients": gradients + (0.0 if offload else flat),
            "temporary": 0.0 if offload else _temporary(needs, optimizer, mode, devices, flat, on_cpu),
        },
        "scoring": {"activations": needs.scoring, **gathered},
    }
    if first:
        phases["gradients"] = {"gradients": gradients}
    elif mode.startswith("zero3"):  # the buffer stays from step to step
        held["communication"] = phases["training"].pop("communication")
    elif zero and on_cpu:  # so does what DeepSpeed moves them to: nobody has written to the rest of its buffer
        phases["training"]["communication"] = 0.0 if mode == "zero1" else needs.head_gradients
        phases["gradients"] = {"gradients": needs.trained_weights / devices, "communication": buffers}
    if needs.step:
        whole = {"gathered weights": max(movable, needs.reference)} if divided else {}
        phases["sampling"] = {"generation": max(needs.prefill, needs.step), **whole}
    if divided:
        # Every process reads the whole model before it is divided; the first one puts it together anew to save it.
        before = 0.0 if needs.quantised else needs.weights + needs.reference
        host = max(host, before, needs.weights)
        if on_cpu:
            phases["loading"] = {"whole model": max(before - sum(held.values()), 0.0)}
            phases["saving"] = {"whole model": needs.weights}
    elif merged:
        phases["saving"] = {"merged copy": movable}
    if mode == "ddp":  # the wrapper's own buckets stay, which on a CPU nobody has written to; ours come and go
        held["communication"] = min(EXCHANGED, needs.trained_weights) if on_cpu else needs.trained_weights
    overhead = 0.0 if on_cpu else CONTEXT + (NCCL if devices > 1 else 0.0)
    paged = held["optimizer states"] if optimizer.paged else 0.0
    return Memory({k: v for k, v in held.items() if v}, phases, overhead, host, paged)


def _buffers(needs: Needs, mode: str, devices: int, on_cpu: bool) -> float:
    """What gradients are exchanged in: ZeRO's bucket, made whole on a GPU; FSDP's layer, as it is multiplied in, and in
    float32 before and after the sum."""
    if mode.startswith("zero"):
        return 4.0 * (min(REDUCED, needs.trained) if on_cpu else REDUCED)
    if mode == "fsdp":
        return (1 + needs.summed) * needs.layer * needs.trained_weights / max(needs.weights, 1.0)
    return 0.0


def _gathered(needs: Needs, mode: str) -> float:
    """Weights that are whole during a pass: two layers and what is in none in FSDP, as many as it likes in ZeRO-3."""
    movable = needs.trained_weights + needs.frozen_weights
    if mode == "fsdp":
        return min(movable, 2 * needs.layer + needs.outside)
    return min(movable, GATHERED * movable / max(needs.parameters, 1.0))


def _temporary(needs: Needs, optimizer: Optimizer, mode: str, devices: int, flat: float, on_cpu: bool) -> float:
    """What the update makes and throws away: torch updates all tensors at once on GPUs, in half as much for each, and
    one after the other on CPUs and where they are divided one by one; ZeRO's is one flat tensor."""
    if flat:
        return flat * (optimizer.temporary if on_cpu else optimizer.temporary / 2)
    if mode == "fsdp":
        return optimizer.temporary * needs.largest / devices
    return optimizer.temporary * (needs.largest if on_cpu else needs.trained_weights / 2)
