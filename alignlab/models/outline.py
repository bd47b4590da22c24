"""What a model will be, before it is loaded: for what must be there first, such as a server on the same GPU."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from alignlab.core import AdapterKind
from alignlab.models.files import KEY, check_folder, loading, naming, read_config, saved_adapter
from alignlab.models.hub import check_reachable
from alignlab.models.quantization import compute_dtype
from alignlab.models.settings import ModelSettings, QuantizationSettings


@dataclass(frozen=True)
class Outline:
    """A policy without its weights.

    Attributes:
        base: path or Hub id of the full model, `revision` of it.
        weights: how many numbers the full model holds, >= 0.
        dtype: what they are held in where nothing else is asked for.
        adapter: the PEFT config of the adapter on it; None: the full model itself.
    """

    base: str
    revision: str | None
    weights: int
    dtype: torch.dtype
    adapter: Any = None

    @property
    def nbytes(self) -> int:
        """Of the full model as it is saved."""
        return self.weights * self.dtype.itemsize

    @property
    def is_plain_lora(self) -> bool:
        """Whether the policy is its base and a LoRA adapter, in the form that other programs load beside a base."""
        kind = str(getattr(self.adapter, "peft_type", "")).rpartition(".")[2]
        return kind == "LORA" and not (
            getattr(self.adapter, "use_dora", False) or getattr(self.adapter, "modules_to_save", None)
        )


def outline_of(settings: ModelSettings, adapter: AdapterKind | None = None) -> Outline:
    """What `load_model` will load as a policy, from the files that say so alone.

    Args:
        adapter: what is trained; None: the model is only read.

    Raises:
        ConfigError: there is no model, or its config cannot be used.
    """
    from transformers import AutoModelForCausalLM

    saved, path, revision, config = _read(settings)
    dtype = dtype_of(config, settings, on_cpu=not torch.cuda.is_available())
    with loading(path, "a language model cannot be made of its config"), torch.device("meta"):
        network: Any = AutoModelForCausalLM.from_config(
            config, dtype=dtype, trust_remote_code=settings.trust_remote_code
        )
    weights = sum(p.numel() for p in network.parameters())
    found = None
    if adapter is None or not adapter.trains_base:
        if saved is not None:
            from peft import PeftConfig

            found = PeftConfig.from_pretrained(settings.path)
        elif adapter is not None:
            found = getattr(adapter.apply(network, "policy"), "peft_config", {}).get("default")
    return Outline(path, revision, weights, dtype, found)


def dtype_loaded(settings: ModelSettings, quantization: QuantizationSettings) -> torch.dtype:
    """What `load_model` will load weights in that are not quantised."""
    *_, config = _read(settings)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if quantization.kind != "none" and settings.dtype == "auto":
        return torch.float32 if device.type == "cpu" else compute_dtype(quantization, settings, device)
    return dtype_of(config, settings, on_cpu=device.type == "cpu")


def _read(settings: ModelSettings) -> tuple[dict[str, Any] | None, str, str | None, Any]:
    """The saved adapter, if `path` is one; path, revision and config of the full model."""
    check_folder(settings.path)
    check_reachable(settings.path, settings.revision)
    saved = saved_adapter(settings.path)
    path = settings.path if saved is None else str(saved["base_model_name_or_path"])
    revision = settings.revision if saved is None else None
    with naming(KEY if saved is None else f"{KEY}={settings.path!r}: its base"):
        return saved, path, revision, read_config(path, revision, settings.trust_remote_code)


def dtype_of(config: Any, settings: ModelSettings, on_cpu: bool) -> torch.dtype:
    """The dtype that `load_model` gives the weights: `auto` is as saved, and never half precision on CPUs."""
    if settings.dtype != "auto":
        return getattr(torch, settings.dtype)  # type: ignore[no-any-return]
    saved = getattr(config, "dtype", None) or getattr(config.get_text_config(), "dtype", None)
    saved = getattr(torch, saved) if isinstance(saved, str) else saved
    return torch.float32 if saved is None or (on_cpu and saved.itemsize == 2) else saved
