"""Adapter kinds: what of a model is trained (config: `adapter`); and several PEFT adapters on one base."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Protocol, runtime_checkable

import torch
from pydantic import Field
from torch import nn

from alignlab.core import ConfigError, ModelKind
from alignlab.core.settings import Settings

TASK = {"policy": "CAUSAL_LM", "score": "SEQ_CLS", "step": "TOKEN_CLS"}
"""Kind of model → PEFT's name for its task."""


# ---------------------------------------------------------------------- kinds


class FullFineTuning(Settings):
    """Every weight of the model is trained, except those that `model.freeze` names."""

    @property
    def trains_base(self) -> bool:
        return True

    def apply(self, network: nn.Module, kind: ModelKind) -> nn.Module:
        """The network as it is."""
        return network


class LoRA(Settings):
    """The base stays frozen; a low-rank update W + s·B·A of its matrices is trained (Hu et al. 2021, arXiv:2106.09685).

    Args:
        r: rank of the update, >= 1.
        alpha: s = alpha / r, or alpha / √r with `rslora`; > 0.
        dropout: on the update's input while training, in [0, 1).
        targets: modules that get an update: "all-linear" (heads excepted), or name endings.
        rslora: rank-stabilised scaling (Kalajdzievski 2023, arXiv:2312.03732).
    """

    r: int = Field(16, ge=1)
    alpha: float = Field(32.0, gt=0)
    dropout: float = Field(0.0, ge=0, lt=1)
    targets: str | list[str] = "all-linear"
    rslora: bool = False

    @property
    def trains_base(self) -> bool:
        return False

    def apply(self, network: nn.Module, kind: ModelKind) -> nn.Module:
        """The network as a PEFT model with a new adapter, which changes nothing yet (B = 0). Heads are trained whole.

        Raises:
            ConfigError: no module has a name in `targets`.
        """
        from peft import LoraConfig, get_peft_model

        config = LoraConfig(
            task_type=TASK[kind],
            r=self.r,
            lora_alpha=self.alpha,  # type: ignore[arg-type]
            lora_dropout=self.dropout,
            target_modules=self.targets,
            exclude_modules=None if kind == "policy" else ["score", "classifier"],
            use_rslora=self.rslora,
        )
        try:
            return get_peft_model(network, config)
        except ValueError as error:
            first = str(error).strip().splitlines()[0]
            raise ConfigError(f"adapter.targets={self.targets!r}: {first}") from error

    def resume(self, network: Any, path: str) -> list[str]:
        """Train a saved adapter further: its shape stays as it was saved, dropout is this run's."""
        saved = network.peft_config["default"]
        saved.lora_dropout = self.dropout
        for module in network.modules():
            if hasattr(module, "lora_dropout"):
                module.lora_dropout["default"] = nn.Dropout(self.dropout) if self.dropout else nn.Identity()
        given: dict[str, tuple[Any, Any]] = {
            "r": (self.r, saved.r),
            "alpha": (self.alpha, saved.lora_alpha),
            "rslora": (self.rslora, saved.use_rslora),
        }
        if isinstance(self.targets, list):
            given["targets"] = (sorted(self.targets), sorted(saved.target_modules))
        other = ", ".join(f"adapter.{k}={theirs} (not {ours})" for k, (ours, theirs) in given.items() if ours != theirs)
        return [f"the adapter in {path} goes on as it was saved: {other}"] if other else []


@runtime_checkable
class Resumes(Protocol):
    """An adapter kind with settings of its own for a saved PEFT adapter that is trained further."""

    def resume(self, network: Any, path: str) -> list[str]:
        """Called in place of `apply`, with the PEFT model that was loaded from `path`.

        Returns:
            What the log should say, such as where the saved adapter is not what the settings ask for.
        """
        ...


# ---------------------------------------------------------------------- saved adapters


def shaped_like(network: nn.Module, saved: dict[str, Any], kind: ModelKind) -> nn.Module:
    """The network with a new adapter of the shape that a saved LoRA config has, without its weights."""
    from peft import LoraConfig, get_peft_model

    kept = {k: saved[k] for k in ("r", "lora_alpha", "target_modules", "modules_to_save", "bias") if k in saved}
    return get_peft_model(network, LoraConfig(task_type=TASK[kind], **kept))


# ---------------------------------------------------------------------- several adapters on one base


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
            if belongs(path, name):
                parameter.copy_(mine[name_in(path, name, "default")])
    network.set_adapter("default")
    for parameter, wanted in gradients:
        parameter.requires_grad_(wanted)
    for path, parameter in mine.items():
        if belongs(path, name):
            parameter.requires_grad_(trained)


def belongs(path: str, adapter: str) -> bool:
    """Whether a parameter is an adapter's: PEFT has the adapter's name in its path."""
    return adapter in path.split(".")


def name_in(path: str, adapter: str, other: str) -> str:
    """The path of the same parameter in another adapter."""
    return ".".join(other if part == adapter else part for part in path.split("."))


def merged(network: Any) -> AbstractContextManager[None]:
    """`lora.merged`, where there is an adapter: only then is PEFT imported, which takes a second."""
    if not hasattr(network, "peft_config"):
        return nullcontext()
    from alignlab.models import lora

    return lora.merged(network)
