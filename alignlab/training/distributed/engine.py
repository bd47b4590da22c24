"""What trains the weights: the optimiser, and whatever spreads it over processes. The loop knows nothing else of it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from alignlab.core import ConfigError, Group, Response
from alignlab.core.parts import calling
from alignlab.models import InStep, PackedModel
from alignlab.training.distributed.processes import WRAPPERS, Processes
from alignlab.training.precision import Precision
from alignlab.training.settings import DistributedSettings

BUCKET = 1 << 25
"""Bytes of gradients that are exchanged at once, as in DDP."""

GROUP = "group."
"""How the names of tensors begin that an optimiser keeps for a group of parameters."""

NONE = "none."
"""How the names begin of states that an optimiser holds as None: an empty tensor stands for each in a checkpoint."""

Tensors = dict[str, Tensor]
"""A trained parameter as a checkpoint keeps it: "weight", and its optimiser state by the optimiser's names."""


class Engine:
    """One process, or several that hold all of the model each (DDP). Engines that divide it are subclasses.

    The gradient of a step is that of the mean loss over the global batch: losses are scaled for a sum over the
    micro-batches and a mean over the processes.

    Attributes:
        model: the model without anything around it; its parameters keep their names.
        together: whether the processes communicate within forward and backward passes, so that all must do equally
            many, and one that fails leaves the others waiting. Otherwise they do so in `exchange` alone.
        divides: whether no process holds all weights, so that forward passes alone communicate, too.
    """

    together = False
    divides = False

    def __init__(
        self,
        model: PackedModel,
        optimizer: torch.optim.Optimizer,
        processes: Processes,
        max_grad_norm: float | None,
        precision: Precision,
    ) -> None:
        self.model, self.processes, self.max_grad_norm = model, processes, max_grad_norm
        self.precision = precision
        for group in optimizer.param_groups:
            group.setdefault("initial_lr", group["lr"])
        self.module: Any = model
        self.optimizer: Any = optimizer
        self._wrap()
        WRAPPERS.add(self.module)

    def _wrap(self) -> None:
        self.module, self.optimizer = self.processes.accelerator.prepare(self.model, self.optimizer)

    @property
    def name(self) -> str:
        """What the engine says of itself: asked, not assumed."""
        return type(self.module).__name__ if self.module is not self.model else "single"

    # ------------------------------------------------------------------ a step

    def __call__(self, *arguments: Any) -> dict[str, Tensor]:
        """The model's forward pass, for training."""
        return dict(self.module(*arguments))

    def hold(self, last: bool) -> AbstractContextManager[Any]:
        """Around forward and backward of a micro-batch, which may be the last one.

        DDP would exchange gradients while the last backward pass goes on; that pass can then no longer run out of
        memory on one process without leaving the others waiting, so here `exchange` does it afterwards, once a step.
        """
        return self.processes.accelerator.no_sync(self.module)

    def backward(self, loss: Tensor) -> None:
        self.processes.accelerator.backward(loss)

    def exchange(self) -> None:
        """After the backward passes went well everywhere: give every process the mean gradient. Called by all."""
        if self.together or self.processes.world == 1:
            return
        trained = list(self.trained().values())
        had = self.processes.gather(bytes(p.grad is not None for p in trained))
        gradients = []
        for i, parameter in enumerate(trained):
            if any(each[i] for each in had):
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
                gradients.append(parameter.grad)
        for bucket in buckets(gradients, BUCKET):
            flat = torch.cat([g.flatten() for g in bucket]).to(_wide(bucket[0]))
            self.processes.mean(flat)
            for gradient, mean in zip(bucket, flat.split([g.numel() for g in bucket]), strict=True):
                gradient.copy_(mean.view_as(gradient))

    def reduced_in(self) -> set[torch.dtype]:
        """What gradients are summed up in between the processes."""
        return {_wide(p) for p in self.trained().values()}

    def scale_lr(self, factor: float) -> float:
        """Set the learning rate to a share of its peak; returns it."""
        for group in self.optimizer.param_groups:
            group["lr"] = group["initial_lr"] * factor
        return float(self.optimizer.param_groups[0]["lr"])

    def step(self) -> float:
        """Clip and apply the gradient, and drop it. Returns its norm before clipping; where that is not finite,
        nothing is applied."""
        norm = self._clip()
        # float16: the scaler skips such a step by itself, and scales less from then on
        if math.isfinite(norm) or self.processes.accelerator.scaler is not None:
            with calling(getattr(self.optimizer, "optimizer", self.optimizer), "step"):
                self.optimizer.step()
        self.discard()
        return norm

    def discard(self) -> None:
        """Drop the gradient."""
        self.optimizer.zero_grad()

    def _clip(self) -> float:
        parameters = [p for p in self.model.parameters() if p.requires_grad]
        return float(self.processes.accelerator.clip_grad_norm_(parameters, self.max_grad_norm or math.inf))

    # ------------------------------------------------------------------ weights

    def divide(self, model: PackedModel) -> None:
        """Divide another model among the processes as the trained one is: a frozen reference."""

    def in_step(self, mine: Sequence[Group], everyones: Sequence[Group]) -> InStep | None:
        """What a scoring pass over this process's share needs where weights are divided.

        Args:
            mine: the share; may be empty.
            everyones: all groups; their responses may still be with the processes whose share they are.
        """
        if not self.divides or not everyones:
            return None
        prompt = min(everyones, key=lambda g: len(g.prompt_ids))
        spare = min(
            (g for g in mine if g.responses),
            key=lambda g: g.packed_length,
            default=prompt.with_responses([Response(prompt.prompt_ids[:1])]),
        )
        return InStep(lambda count: max(self.processes.gather(count)), spare)

    @contextmanager
    def whole(self, model: nn.Module, change: bool = False) -> Iterator[None]:
        """All weights of the trained model, or of one that was `divide`d, on every process: for what processes do
        unequally often, like sampling. Called by all.

        Args:
            change: the weights themselves, with all their bits, rather than what they are multiplied in. What the block
                changes in them is kept; it must be the same on every process.
        """
        yield

    def trained(self) -> dict[str, nn.Parameter]:
        """The trained parameters by name, in an order that is the same on every process."""
        return {n: p for n, p in self.model.named_parameters() if p.requires_grad}

    def tensors(self, states: bool = True) -> Iterator[tuple[str, Tensors]]:
        """Every trained parameter, with its optimiser state unless not wanted, one after the other, whole. Called by
        all."""
        held = self.optimizer.state if states else {}
        for name, parameter in self.trained().items():
            own = held.get(parameter, {})
            state = {k: torch.as_tensor(v) for k, v in own.items() if v is not None}
            state |= {NONE + k: torch.empty(0) for k, v in own.items() if v is None}
            shared = {GROUP + k: torch.as_tensor(v) for k, v in self._shared(parameter).items()} if states else {}
            yield name, {"weight": parameter.detach(), **state, **shared}

    def _group_of(self, parameter: nn.Parameter) -> dict[str, Any]:
        return next(g for g in self.optimizer.param_groups if any(p is parameter for p in g["params"]))

    def _shared(self, parameter: nn.Parameter) -> dict[str, Any]:
        """What an optimiser keeps for a whole group of parameters, like the number of steps, or that it has begun."""
        began_as = self.optimizer.defaults
        group = {k: v for k, v in self._group_of(parameter).items() if torch.is_tensor(v) or isinstance(v, bool)}
        return {k: v for k, v in group.items() if v is not began_as.get(k)}

    def load(self, found: Mapping[str, Tensors]) -> None:
        """Take over what `tensors` gave, of any engine. Called by all, with the same tensors."""
        states: dict[Any, dict[str, Any]] = {}
        parameters = self.trained()
        with torch.no_grad():
            for name, tensors in found.items():
                parameter = parameters[name]
                parameter.copy_(tensors["weight"])
                shared = {k.removeprefix(GROUP): v for k, v in tensors.items() if k.startswith(GROUP)}
                own = {k: v for k, v in tensors.items() if k != "weight" and not k.startswith(GROUP)}
                states[parameter] = {k.removeprefix(NONE): None if k.startswith(NONE) else v for k, v in own.items()}
                group = self._group_of(parameter)
                for key, value in shared.items():
                    group[key] = bool(value) if value.dtype == torch.bool else value.clone()
        load_optimizer(self.optimizer, states)


def _wide(tensor: Tensor) -> torch.dtype:
    """Float32 or better."""
    return torch.promote_types(tensor.dtype, torch.float32)


def buckets(tensors: Sequence[Tensor], size: int) -> Iterator[list[Tensor]]:
    """Tensors of one type in portions of about `size` bytes, in order."""
    portion: list[Tensor] = []
    held = 0
    for tensor in tensors:
        if portion and (held + tensor.nbytes > size or tensor.dtype != portion[0].dtype):
            yield portion
            portion, held = [], 0
        portion.append(tensor)
        held += tensor.nbytes
    if portion:
        yield portion


def load_optimizer(optimizer: Any, states: dict[Any, dict[str, Any]]) -> None:
    """Give an optimiser the states of its parameters, by its own `load_state_dict`, which knows where they belong."""
    saved = optimizer.state_dict()
    ordered = [p for group in optimizer.param_groups for p in group["params"]]
    saved["state"] = {i: dict(states[p]) for i, p in enumerate(ordered) if states.get(p)}
    optimizer.load_state_dict(saved)


def make_engine(
    settings: DistributedSettings,
    model: PackedModel,
    optimizer: torch.optim.Optimizer,
    processes: Processes,
    max_grad_norm: float | None,
    precision: Precision,
) -> Engine:
    """The engine of a mode.

    Raises:
        ConfigError: it is not the one in use afterwards, or cannot do what is asked.
    """
    kind: type[Engine] = Engine
    if settings.mode == "fsdp":
        from alignlab.training.distributed.fsdp import FSDPEngine

        kind = FSDPEngine
    elif settings.mode.startswith("zero"):
        from alignlab.training.distributed.zero import ZeroEngine

        kind = ZeroEngine.of(settings.mode)
    engine = kind(model, optimizer, processes, max_grad_norm, precision)
    expected = EXPECTED[settings.mode]
    if engine.name != expected:
        raise ConfigError(f"distributed={settings.mode}: {expected} was to train, but {engine.name} is what came of it")
    return engine


EXPECTED = {
    "single": "single",
    "ddp": "DistributedDataParallel",
    "fsdp": "FSDP2",
    "zero1": "DeepSpeed ZeRO-1",
    "zero2": "DeepSpeed ZeRO-2",
    "zero3": "DeepSpeed ZeRO-3",
    "zero3_offload": "DeepSpeed ZeRO-3 with offload",
}
"""What each mode's engine must say that it is."""
