"""PyTorch's fully sharded data parallel (FSDP2, `fully_shard`): a share of every tensor on every process."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from alignlab.core.private_api import make_root, state_dict_hooks, summed_in
from alignlab.models import PackedModel
from alignlab.training.distributed.engine import Engine, Tensors


class FSDPEngine(Engine):
    """The layers are divided one by one, and what is left of the model as a whole.

    Shares are float32; what is gathered of them for a pass is rounded to the precision of products, and gradients are
    summed up in float32. Heads with few outputs are gathered by themselves, as they are.

    Weights of a quantised base are not divided: 4-bit weights come in a form of their own, and are small.
    """

    together = True
    divides = True

    def _wrap(self) -> None:
        self.mesh: DeviceMesh = init_device_mesh(self.processes.device.type, (self.processes.world,))
        places = {id(p): (g, i) for g in self.optimizer.param_groups for i, p in enumerate(g["params"])}
        former = {n: id(p) for n, p in self.model.named_parameters()}
        self._shard(self.model)
        for name, parameter in self.model.named_parameters():  # sharding puts new parameters in place of the old
            if former[name] in places:
                group, index = places[former[name]]
                group["params"][index] = parameter
        self.module = self.model

    def _shard(self, model: Any) -> None:
        ignored = {p for p in model.parameters() if not p.is_floating_point()}
        half = any(p.dtype.itemsize < 4 for p in model.parameters() if p.requires_grad)
        summed = torch.float32 if half or self.precision.compute is not None else None
        policy = MixedPrecisionPolicy(param_dtype=self.precision.compute, reduce_dtype=summed)
        for head in model.small_heads:
            fully_shard(head, mesh=self.mesh, mp_policy=MixedPrecisionPolicy(cast_forward_inputs=False))
        for layer in _layers(model):
            fully_shard(layer, mesh=self.mesh, mp_policy=policy, ignored_params=ignored)
        fully_shard(model, mesh=self.mesh, mp_policy=policy, ignored_params=ignored)
        model.gathered = whole_of
        make_root(model)

    @property
    def name(self) -> str:
        return "FSDP2" if isinstance(self.model, FSDPModule) else "single"

    # ------------------------------------------------------------------ a step

    def hold(self, last: bool) -> AbstractContextManager[Any]:
        return nullcontext()  # exchanged after each micro-batch: holding gradients back would hold them whole

    def backward(self, loss: Tensor) -> None:
        loss.backward()

    def reduced_in(self) -> set[torch.dtype]:
        return summed_in(self.model)

    def _clip(self) -> float:
        parameters = [p for p in self.model.parameters() if p.requires_grad]
        norm = nn.utils.clip_grad_norm_(parameters, self.max_grad_norm or math.inf)
        return float(norm.full_tensor() if isinstance(norm, DTensor) else norm)

    # ------------------------------------------------------------------ weights

    def divide(self, model: PackedModel) -> None:
        self._shard(model)

    @contextmanager
    def whole(self, model: nn.Module, change: bool = False) -> Iterator[None]:
        if change:
            with self._all_bits(model):
                yield
            return
        parts = [m for m in model.modules() if isinstance(m, FSDPModule)]
        hooks = [(held, dict(held)) for held in state_dict_hooks(model)]
        for part in parts:
            part.set_reshard_after_forward(False, recurse=False)
            part.unshard()
        for held, _ in hooks:  # they divide a model whose state_dict is asked for
            held.clear()
        try:
            yield
        finally:
            for held, former in hooks:
                held.update(former)
            for part in parts:
                part.reshard()
                part.set_reshard_after_forward(part is not model, recurse=False)  # as PyTorch has it

    @contextmanager
    def _all_bits(self, model: nn.Module) -> Iterator[None]:
        """Whole weights in place of the shares, which then get this process's part of what has become of them."""
        _divide_again(model)
        whole: dict[Any, nn.Parameter] = {}
        places: list[tuple[nn.Module, str, Any]] = []
        for path, share in model.named_parameters(remove_duplicate=False):  # a weight that is used twice is one share
            if isinstance(share, DTensor):
                module, _, name = path.rpartition(".")
                places.append((model.get_submodule(module), name, share))
        for module_, name, share in places:
            if share not in whole:
                whole[share] = nn.Parameter(share.detach().full_tensor(), requires_grad=share.requires_grad)
            setattr(module_, name, whole[share])
        try:
            yield
        finally:
            for module_, name, share in places:
                setattr(module_, name, share)
        with torch.no_grad():
            for share, tensor in whole.items():
                share.copy_(self._share(tensor, share))

    def _share(self, tensor: Tensor, like: DTensor) -> DTensor:
        return distribute_tensor(tensor.to(like.device, like.dtype), self.mesh, like.placements, src_data_rank=None)

    def trained(self) -> dict[str, nn.Parameter]:
        _divide_again(self.model)
        return super().trained()

    def tensors(self, states: bool = True) -> Iterator[tuple[str, Tensors]]:
        for name, tensors in super().tensors(states):
            yield name, {k: whole_of(v) for k, v in tensors.items()}

    def load(self, found: Mapping[str, Tensors]) -> None:
        parameters = self.trained()
        shared: dict[str, Tensors] = {}
        for name, parameter in parameters.items():
            tensors = dict(found[name])
            if isinstance(parameter, DTensor):
                same = parameter.shape
                tensors = {k: self._share(v, parameter) if v.shape == same else v for k, v in tensors.items()}
            shared[name] = tensors
        super().load(shared)


def whole_of(tensor: Tensor) -> Tensor:
    """All of a tensor of which each process may hold a share. Called by all."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def _layers(model: Any) -> list[nn.Module]:
    """The transformer's layers, of the policy and of a critic of its own: its longest lists of modules."""
    found: list[nn.Module] = []
    for decoder in (model.decoder, model.critic_decoder):
        lists = [m for m in decoder.modules() if isinstance(m, nn.ModuleList)] if decoder is not None else []
        if lists:
            found += list(max(lists, key=lambda layers: len(list(layers))))
    return found


def _divide_again(model: nn.Module) -> None:
    """Shares in the place of what was gathered: a pass without gradients leaves rounded weights behind."""
    for part in model.modules():
        if isinstance(part, FSDPModule):
            part.reshard()
