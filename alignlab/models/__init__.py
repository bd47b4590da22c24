"""Models: base, adapters, heads, and the one forward pass."""

from alignlab.models.adapters import FullFineTuning, LoRA
from alignlab.models.base import check_tokens, load_tokenizer
from alignlab.models.heads import add_value_head
from alignlab.models.load import check_adapter, load_model
from alignlab.models.outline import Outline, dtype_loaded, outline_of
from alignlab.models.packed_model import Features, InStep, PackedModel, evaluating
from alignlab.models.precision import as_loaded
from alignlab.models.reference import Reference
from alignlab.models.save import save_model
from alignlab.models.settings import ModelSettings, QuantizationSettings

__all__ = [
    "Features",
    "FullFineTuning",
    "InStep",
    "LoRA",
    "ModelSettings",
    "Outline",
    "PackedModel",
    "QuantizationSettings",
    "Reference",
    "add_value_head",
    "as_loaded",
    "check_adapter",
    "check_tokens",
    "dtype_loaded",
    "evaluating",
    "load_model",
    "load_tokenizer",
    "outline_of",
    "save_model",
]
