"""Small models on quantised bases."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from alignlab.models import ModelSettings, PackedModel, QuantizationSettings, load_model
from tests import tiny
from tests.models.test_save import LORA, says

KINDS = ["nf4", "int8"]


def held(kind: str, **changes: Any) -> QuantizationSettings:
    return QuantizationSettings(kind=kind, **changes)  # type: ignore[arg-type]


def load(path: Path, quantization: str | QuantizationSettings, kind: str = "policy", **options: Any) -> PackedModel:
    if isinstance(quantization, str):
        quantization = held(quantization)
    adapter = options.pop("adapter", LORA)
    return load_model(ModelSettings(path=str(path)), adapter, kind, quantization=quantization, **options)  # type: ignore[arg-type]


def base(saved: Callable[..., Path], name: str = "llama", **changes: Any) -> Path:
    sizes = {"n_embd": 64} if name == "gpt2" else tiny.QUANTIZABLE
    return saved(name, **sizes, **changes)


def flat(model: PackedModel, seed: int = 0) -> Tensor:
    return torch.cat([v.flatten() for v in says(model, tiny.some_groups(seed))])
