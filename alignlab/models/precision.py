"""Precision of a model: what its trained weights, its reference and what is saved of it are held in.

Trained weights are float32 "masters": bfloat16 has 8 significant bits, and an update that is smaller than 1/256 of a
weight would be rounded away (Micikevicius et al. 2018, arXiv:1710.03740, section 3.1). Products are made in the
precision of the run all the same: see `PackedModel.precision`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from alignlab.core.private_api import watching
from alignlab.models.packed_model import PackedModel

PRODUCTS = ("mm", "addmm", "linear", "_addmm_activation", "matmul")
"""ATen's products of a matrix of weights with tokens. Those of attention and of rotary embeddings have more axes."""


def use_masters(model: PackedModel) -> None:
    """Hold every trained weight in float32 or better. What each was loaded in is kept: it is saved in that again.

    Where products are made in what the weights are held in, frozen weights between trained ones are held so too. (PEFT
    converts between an adapter and its base by itself.)
    """
    every = model.compute_dtype is None and not hasattr(model.network, "peft_config")
    for name, parameter in model.named_parameters():
        if (parameter.requires_grad or every) and parameter.is_floating_point() and parameter.dtype.itemsize < 4:
            model.loaded_in[name] = parameter.dtype
            parameter.data = parameter.data.float()


@contextmanager
def as_loaded(model: PackedModel) -> Iterator[None]:
    """The weights in what they were loaded in, for as long as they are saved or sent elsewhere; the masters come back
    untouched. A weight that is used twice stays one."""
    masters = [(p, p.data, model.loaded_in[n]) for n, p in model.named_parameters() if n in model.loaded_in]
    try:
        for parameter, data, dtype in masters:
            parameter.data = data.to(dtype)
        yield
    finally:
        for parameter, data, _ in masters:
            parameter.data = data


def hold_as_computed(copy: PackedModel, policy: PackedModel, moves_softly: bool = False) -> None:
    """Hold a frozen copy of a policy in no more than computes the same bits as the policy; in all bits that the
    policy's own weights have, where it moves softly.

    Autocast rounds the inputs of a product, its weights among them: matrices that are used for nothing else may be held
    so. The rest stays as the policy's: what the embeddings and norms are held in decides what is added up between the
    layers. An engine that computes in half precision itself rounds every weight.
    """
    compute, now = copy.compute_dtype, dict(policy.network.named_parameters())
    matrices = _matrices(copy.network)
    for name, parameter in copy.network.named_parameters():
        if not parameter.is_floating_point():
            continue
        wanted = now[name].dtype
        if compute is not None and not moves_softly and (not copy.autocasts or parameter in matrices):
            wanted = compute
        parameter.data = parameter.data.to(wanted)


def _matrices(network: nn.Module) -> set[nn.Parameter]:
    """Weights and biases that are used in products alone: an embedding that is also the head is not."""
    from transformers.pytorch_utils import Conv1D

    used: dict[nn.Parameter, bool] = {}
    for module in network.modules():
        for parameter in module.parameters(recurse=False):
            used[parameter] = used.get(parameter, True) and isinstance(module, nn.Linear | Conv1D)
    return {parameter for parameter, in_products in used.items() if in_products}


@dataclass
class Products:
    """What dtypes products with weights have.

    Attributes:
        trunk, heads: those seen in the model, and in its heads with few outputs.
    """

    trunk: set[torch.dtype] = field(default_factory=set)
    heads: set[torch.dtype] = field(default_factory=set)


@contextmanager
def products(model: PackedModel) -> Iterator[Products]:
    """Look at the passes of a model in the block."""
    found, inside = Products(), list[bool]()

    def called(name: str, arguments: Any) -> None:
        if name in PRODUCTS:
            seen = found.heads if inside else found.trunk
            seen |= {t.dtype for t in arguments if isinstance(t, Tensor) and t.dim() == 2}

    hooks = [head.register_forward_pre_hook(lambda *_: inside.append(True)) for head in model.small_heads]
    hooks += [head.register_forward_hook(lambda *_: inside.clear()) for head in model.small_heads]
    try:
        with watching(lambda _: None, called):
            yield found
    finally:
        for hook in hooks:
            hook.remove()
