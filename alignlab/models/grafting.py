"""Another forward pass for a module that is there already: a class of ours goes before the module's own."""

from __future__ import annotations

from functools import cache
from typing import Any

from torch import nn


def graft(module: nn.Module, kind: Any) -> None:
    """Put the class `kind` before the module's own, of which it stays one, for `isinstance`, copies and names of
    weights. What `kind` does not define, or hands to `super()`, is the module's own."""
    own: Any = type(module)
    module.__class__ = _grafted(kind, own)


def ungraft(module: nn.Module) -> None:
    """Undo the last `graft`."""
    module.__class__ = type(module).__bases__[1]


@cache
def _grafted(kind: Any, own: Any) -> Any:
    return type(own.__name__, (kind, own), {"__module__": own.__module__, "__doc__": own.__doc__})
