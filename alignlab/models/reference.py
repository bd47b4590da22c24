"""The reference policy, on the policy's own base wherever an adapter is what is trained."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from alignlab.models.packed_model import PackedModel

NAME = "reference"
"""The frozen adapter's name beside "default", the one that is trained."""


class Reference:
    """The policy as it was when training started.

    * A new adapter: off in the reference, at no cost in memory.
    * An adapter that is trained further: a frozen copy of the adapter on the same base.
    * The model's own weights: a frozen copy of the model.

    Args:
        policy: the policy, before its first update.
        fresh_adapter: whether its adapter is new, so that the policy still equals its base.
    """

    def __init__(self, policy: PackedModel, fresh_adapter: bool) -> None:
        self._policy = policy
        self._copy: PackedModel | None = None
        self._fresh = fresh_adapter
        network = policy.network
        if not hasattr(network, "peft_config"):
            self._copy = copy.deepcopy(policy).requires_grad_(False).eval()
        elif not fresh_adapter:
            network.add_adapter(NAME, copy.deepcopy(network.peft_config["default"]))
            mine = dict(network.named_parameters())
            with torch.no_grad():
                for name, parameter in mine.items():
                    if f".{NAME}." in name:
                        parameter.copy_(mine[name.replace(f".{NAME}.", ".default.")])
            _use(network, "default")

    @property
    def shares_weights(self) -> bool:
        """Whether it needs no second copy of the base."""
        return self._copy is None

    @contextmanager
    def model(self) -> Iterator[PackedModel]:
        """The reference as a model, for as long as the context lasts. Not for training inside it."""
        network = self._policy.network
        if self._copy is not None:
            yield self._copy.to(self._policy.device)
        elif self._fresh:
            with network.disable_adapter():
                yield self._policy
        else:
            _use(network, NAME)
            try:
                yield self._policy
            finally:
                _use(network, "default")


def _use(network: Any, adapter: str) -> None:
    """Switch adapters; only the one that is trained gets gradients."""
    network.set_adapter(adapter, inference_mode=adapter == NAME)
    for name, parameter in network.named_parameters():
        if f".{NAME}." in name:
            parameter.requires_grad_(False)
