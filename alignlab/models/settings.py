"""The `model` and `quantization` sections of the config."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from alignlab.core.settings import Settings


class ModelSettings(Settings):
    """Which model, in which precision, and which of its weights may change."""

    path: str = Field(min_length=1)
    revision: str | None = None
    tokenizer: str | None = None
    dtype: Literal["auto", "float32", "bfloat16", "float16", "float64"] = "auto"
    attention: Literal["sdpa", "eager", "flash_attention_2", "flex_attention"] = "sdpa"
    layout: Literal["auto", "packed", "plain"] = "auto"
    freeze: list[str] = Field(default_factory=list)
    freeze_layers: int = Field(0, ge=0)
    dropout: bool = False
    gradient_checkpointing: bool = False
    trust_remote_code: bool = False


class QuantizationSettings(Settings):
    """How the frozen base under an adapter is held: as it is, in 4-bit NormalFloat or in 8 bits."""

    kind: Literal["none", "nf4", "int8"] = "none"
    double_quant: bool = True
    compute_dtype: Literal["auto", "bfloat16", "float32"] = "auto"
    threshold: float = Field(6.0, ge=0)
