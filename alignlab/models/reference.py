"""The reference policy: the policy with its adapter off, or a frozen copy where the weights themselves are trained."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager

from alignlab.models.packed_model import PackedModel


class Reference:
    """The policy as it was when training started.

    A new adapter is off in the reference, at no cost in memory. Where the policy's own weights are trained, or an
    adapter is trained further, the reference is a frozen copy of what is trained, made now.
    """

    def __init__(self, policy: PackedModel, fresh_adapter: bool) -> None:
        self._policy = policy
        self.shares_weights = fresh_adapter and hasattr(policy.network, "peft_config")
        self._copy: PackedModel | None = None
        if not self.shares_weights:
            self._copy = copy.deepcopy(policy).requires_grad_(False).eval()

    @contextmanager
    def model(self) -> Iterator[PackedModel]:
        """The reference as a model, for as long as the context lasts. Not for training inside it."""
        if self._copy is not None:
            self._copy.to(self._policy.device)
            yield self._copy
        else:
            with self._policy.network.disable_adapter():  # type: ignore[operator, union-attr]
                yield self._policy
