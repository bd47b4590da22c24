"""A policy's weights as a server takes them: whole, one after the other, or in files."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from alignlab.core import ConfigError
from alignlab.models import PackedModel
from alignlab.models.adapters import belongs
from alignlab.models.private_api import saved_buffers, spare_deepspeed
from alignlab.models.quantization import plain_copy


def whole(policy: PackedModel, dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    """Every weight of the policy, by the name that it has in a saved model, in `dtype`; an adapter is merged into it.

    Weights that are divided among processes are gathered one after the other; then all processes must call this alike.

    Raises:
        ConfigError: they are divided, and there is an adapter to merge.
    """
    network: Any = policy.network
    if hasattr(network, "peft_config"):
        if policy.gathered is not None:
            raise ConfigError(
                "rollout=vllm: weights that distributed=fsdp or zero3 divides get there with adapter=none or lora, "
                "and not with this adapter: use distributed=ddp or zero2"
            )
        network = plain_copy(network).merge_and_unload()
    for name, tensor in saved_tensors(network):
        yield name, _gathered(policy, tensor, dtype)


def _gathered(policy: PackedModel, tensor: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    found = (tensor if policy.gathered is None else policy.gathered(tensor)).detach()
    return found.to(dtype) if dtype is not None and found.is_floating_point() else found


def saved_tensors(network: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """What a saved model holds of a network: parameters and persistent buffers, tied ones once."""
    seen: set[int] = set()
    for path, module in network.named_modules():
        for name, tensor in [*module.named_parameters(recurse=False), *saved_buffers(module)]:
            if id(tensor) not in seen:
                seen.add(id(tensor))
                yield f"{path}.{name}" if path else name, tensor


def write(policy: PackedModel, folder: Path, by_adapter: bool, dtype: torch.dtype, here: bool) -> None:
    """Write the policy's weights, in `dtype`, to `folder`: its adapter, or all of it.

    Args:
        here: whether this process writes; the others help to gather what is divided.
    """
    import transformers

    if policy.gathered is None and not here:
        return
    if by_adapter:
        mine = ((n, p) for n, p in policy.network.named_parameters() if belongs(n, "default"))
        state = _on_host(((n, _gathered(policy, p)) for n, p in mine), here)
    else:
        state = _on_host(whole(policy, dtype), here)
    if not here:
        return
    transformers.utils.logging.disable_progress_bar()
    folder.mkdir(parents=True, exist_ok=True)
    with spare_deepspeed():
        if by_adapter:
            policy.network.save_pretrained(
                folder, selected_adapters=["default"], save_embedding_layers=False, state_dict=state
            )
        else:
            policy.base.save_pretrained(folder, state_dict=state)


def _on_host(tensors: Iterator[tuple[str, Tensor]], here: bool) -> dict[str, Tensor]:
    """Tensors in this host's memory, where they are wanted; all are gathered in any case."""
    found = {}
    for name, tensor in tensors:
        if here:
            found[name] = tensor.cpu()
    return found
