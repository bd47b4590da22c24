"""Several adapters on one base: which one is used, without touching which weights are trained."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch


@contextmanager
def adapter_in_use(network: Any, name: str | None) -> Iterator[None]:
    """Another adapter of a PEFT network inside the context; None: none at all.

    PEFT gives gradients to the adapter that is active and takes them from the others; here every weight keeps what it
    had, so that adapters can be trained side by side.
    """
    gradients = [(p, p.requires_grad) for p in network.parameters()]
    before = network.active_adapter
    try:
        if name is None:
            with network.disable_adapter():
                yield
        else:
            network.set_adapter(name)
            yield
    finally:
        network.set_adapter(before)
        for parameter, wanted in gradients:
            parameter.requires_grad_(wanted)


def copy_adapter(network: Any, name: str, trained: bool) -> None:
    """Add an adapter `name` with the weights of "default", or overwrite the one there is; "default" stays active."""
    gradients = [(p, p.requires_grad) for p in network.parameters()]
    if name not in network.peft_config:
        network.add_adapter(name, copy.deepcopy(network.peft_config["default"]))
    mine = dict(network.named_parameters())
    with torch.no_grad():
        for path, parameter in mine.items():
            if f".{name}." in path:
                parameter.copy_(mine[path.replace(f".{name}.", ".default.")])
    network.set_adapter("default")
    for parameter, wanted in gradients:
        parameter.requires_grad_(wanted)
    for path, parameter in mine.items():
        if f".{name}." in path:
            parameter.requires_grad_(trained)


def merged(network: Any) -> AbstractContextManager[None]:
    """`lora.merged`, where there is an adapter: only then is PEFT imported, which takes a second."""
    if not hasattr(network, "peft_config"):
        return nullcontext()
    from alignlab.models import lora

    return lora.merged(network)
