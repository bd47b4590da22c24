"""The reference policy, on the policy's own base wherever an adapter is what is trained."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from alignlab.core import ConfigError
from alignlab.models.adapters import adapter_in_use, belongs, copy_adapter, name_in
from alignlab.models.packed_model import PackedModel

NAME = "reference"
"""The frozen adapter's name beside "default", the one that is trained."""

NO_MATTER = ("_name_or_path", "_commit_hash", "transformers_version", "use_cache")
"""Keys of a model's config that change nothing about what it computes."""


class Reference:
    """The policy as it was when training started, or when it was last refreshed.

    * A new adapter: off in the reference, at no cost in memory.
    * An adapter that is trained further: a frozen copy of the adapter on the same base.
    * The model's own weights: a frozen copy of the model.

    Args:
        policy: the policy, before its first update.
        fresh_adapter: whether its adapter is new, so that the policy still equals its base.
        moves: whether it will be refreshed: what it then needs is made at once, before the model may be divided.

    Raises:
        ConfigError: weights of the base are trained beside an adapter, so that turning it off gives no reference.
    """

    def __init__(self, policy: PackedModel, fresh_adapter: bool, moves: bool = False) -> None:
        adapters = set(getattr(policy.network, "peft_config", ()))
        beside = [
            n for n, p in policy.network.named_parameters() if p.requires_grad and not adapters & set(n.split("."))
        ]
        if adapters and beside:
            raise ConfigError(
                f"adapter: {beside[0]} is trained beside the adapter and stays when that is off: there is no reference"
            )
        self._policy = policy
        self._copy: PackedModel | None = None
        self._fresh = fresh_adapter
        self.refreshed = False
        if not adapters:
            self._copy = copy.deepcopy(policy).requires_grad_(False).eval()
        elif not fresh_adapter:
            copy_adapter(policy.network, NAME, trained=False)
        elif moves:
            self._become_adapter()

    @property
    def shares_weights(self) -> bool:
        """Whether it needs no second copy of the base."""
        return self._copy is None

    @property
    def held_in(self) -> PackedModel:
        """The model that has its weights: the copy, or the policy with its adapters."""
        return self._policy if self._copy is None else self._copy

    def contents(self) -> tuple[dict[str, torch.Tensor], dict[str, object]]:
        """All that its log-probs follow from, where it has not been divided among processes: every tensor, and the
        settings of its architecture. The same for the same weights, whether another adapter sits on them or not."""
        network, mine = self.held_in.network, set() if self._fresh else {NAME}
        others = set(getattr(network, "peft_config", ())) - mine
        settings = {k: v for k, v in self.held_in.base.config.to_dict().items() if k not in NO_MATTER}
        for path, module in network.named_modules() if mine else ():
            if isinstance(scaling := getattr(module, "scaling", None), dict) and NAME in scaling:
                settings[f"scaling of {path}"] = scaling[NAME]
        named = {n.replace(".base_layer.", "."): t for n, t in network.state_dict().items()}
        prefix = "base_model.model."  # PEFT's
        tensors = {n.removeprefix(prefix): t for n, t in named.items() if not others & set(n.split("."))}
        return tensors, settings

    @contextmanager
    def model(self) -> Iterator[PackedModel]:
        """The reference as a model, for as long as the context lasts. Not for training inside it."""
        if self._copy is not None:
            yield self._copy.to(self._policy.device)
        else:
            with adapter_in_use(self._policy.network, None if self._fresh else NAME):
                yield self._policy

    @torch.no_grad()
    def refresh(self, weight: float = 1.0) -> None:
        """Move it to the policy as it is now: π_ref ← weight · π + (1 − weight) · π_ref, in the weights (TR-DPO,
        Gorbatovski et al. 2024, arXiv:2404.09656: its soft update, its hard one where weight is 1).

        A new adapter's reference is the base: from then on it is an adapter of its own. In between, weights of
        low-rank factors are mixed, not their product; both agree where weight is 1.
        """
        self.refreshed = True
        if self._copy is None and self._fresh:
            self._become_adapter()
        new = dict(self._policy.network.named_parameters())
        for name, old in self._weights().items():
            old.lerp_(new[name].to(old), weight)

    @torch.no_grad()
    def _become_adapter(self) -> None:
        """Be an adapter instead of the lack of one: the base is the adapter whose second factor is zero."""
        copy_adapter(self._policy.network, NAME, trained=False)
        self._fresh = False
        for name, old in self._weights().items():
            if ".lora_B." in name or ".lora_embedding_B." in name:
                old.zero_()

    def state(self) -> dict[str, torch.Tensor]:
        """Its weights, where they are no longer those the run started from; else nothing."""
        return {n: p.detach().cpu().clone() for n, p in self._weights().items()} if self.refreshed else {}

    @torch.no_grad()
    def load_state(self, state: dict[str, torch.Tensor]) -> None:
        """Take over what `state` gave; the policy is not read: its weights may be divided among processes."""
        if not state:
            return
        if self._copy is None and self._fresh:
            self._become_adapter()
        self.refreshed, mine = True, self._weights()
        if mine.keys() != state.keys():
            raise ValueError(f"its reference holds {len(state)} tensors, the run's has {len(mine)}")
        for name, value in state.items():
            mine[name].copy_(value)

    def _weights(self) -> dict[str, nn.Parameter]:
        """What sets it apart from the policy, by the policy's names."""
        if self._copy is not None:
            return dict(self._copy.network.named_parameters())
        named = self._policy.network.named_parameters()
        return {name_in(n, NAME, "default"): p for n, p in named if belongs(n, NAME)}
