"""Bases in 4 or 8 bits (bitsandbytes): loading them, computing the same in every mode, and back to full precision."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from torch import nn

from alignlab.core import ConfigError, ModelKind
from alignlab.core.files import write_json
from alignlab.core.private_api import problem
from alignlab.models import private_api
from alignlab.models.files import KEY, read_object
from alignlab.models.settings import ModelSettings, QuantizationSettings

QUANTIZATION = "quantization.json"
"""Beside a saved adapter: what its base was held in while it was trained, for `BitsAndBytesConfig.from_dict`."""

BITSANDBYTES = ("nf4", "fp4", "int8")
"""What bitsandbytes holds weights in, by `name_of`."""

HEADS = ["score", "classifier"]
"""Heads of classifiers. Left to itself, transformers would quantise that of a token classifier, which has a bias."""


def loading_options(
    settings: ModelSettings,
    quantization: QuantizationSettings,
    config: Any,
    kind: ModelKind,
    device: torch.device | str,
) -> dict[str, Any]:
    """Options of `from_pretrained` for a quantised base; none where it is loaded in full precision.

    Weights that are not quantised (embeddings, norms, heads) are float32 unless `model.dtype` names another precision,
    as in PEFT's `prepare_model_for_kbit_training`. They are what the base is quantised from too.

    Raises:
        ConfigError: bitsandbytes is missing; the model is quantised already, in another way; or its precision cannot be
            quantised.
    """
    own = getattr(config, "quantization_config", None)
    own = own if own is None or isinstance(own, dict) else own.to_dict()
    if own is None and quantization.kind == "none":
        return {}
    if own is not None and quantization.kind not in ("none", name_of(own)):
        raise ConfigError(
            f"quantization={quantization.kind}: model.path={settings.path!r} is quantised already, in {name_of(own)}: "
            "give quantization=none to take it as it is, or name the model that it was made from"
        )
    if own is None or own.get("quant_method") == "bitsandbytes":
        _require_bitsandbytes("model.path" if own is not None else f"quantization={quantization.kind}")
    if settings.dtype == "float64":
        raise ConfigError("model.dtype=float64: a quantised base is made from float32 or less: give float32")
    options: dict[str, Any] = {"device_map": {"": torch.device(device)}}
    if settings.dtype == "auto":
        options["dtype"] = torch.float32
    if own is None:
        options["quantization_config"] = _wanted(quantization, kind)
    else:
        if kind != "policy" and own.get("quant_method") == "bitsandbytes":
            own["llm_int8_skip_modules"] = sorted({*(own.get("llm_int8_skip_modules") or ()), *HEADS})
        if quantization.kind == "nf4":
            own["bnb_4bit_compute_dtype"] = _compute_dtype(quantization)
        config.quantization_config = own
        options["config"] = config
    return options


def _require_bitsandbytes(key: str) -> None:
    try:
        import bitsandbytes  # noqa: F401
    except ImportError as error:
        raise ConfigError(
            f"{key}: a quantised base needs bitsandbytes, which cannot be imported here ({error}): "
            "pip install bitsandbytes"
        ) from error


def _wanted(quantization: QuantizationSettings, kind: ModelKind) -> Any:
    from transformers import BitsAndBytesConfig

    heads = None if kind == "policy" else HEADS  # None: a language model's own head, tied or not, stays as it is
    if quantization.kind == "int8":
        return BitsAndBytesConfig(
            load_in_8bit=True, llm_int8_threshold=quantization.threshold, llm_int8_skip_modules=heads
        )
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=quantization.double_quant,
        bnb_4bit_compute_dtype=_compute_dtype(quantization),
        llm_int8_skip_modules=heads,
    )


def _compute_dtype(quantization: QuantizationSettings) -> str:
    if quantization.compute_dtype != "auto":
        return quantization.compute_dtype
    return "bfloat16" if torch.cuda.is_available() and torch.cuda.is_bf16_supported() else "float32"


def quantization_of(network: Any) -> dict[str, Any] | None:
    """How a transformers or PEFT model is quantised, as in its config.json; None where it is not."""
    base = network.get_base_model() if hasattr(network, "get_base_model") else network
    found = getattr(base.config, "quantization_config", None)
    return found if found is None or isinstance(found, dict) else dict(found.to_dict())


def name_of(config: dict[str, Any]) -> str:
    """ "nf4" or "int8", as the setting has it; else what the library calls it."""
    if config.get("load_in_8bit"):
        return "int8"
    return str(config["bnb_4bit_quant_type"] if config.get("load_in_4bit") else config.get("quant_method"))


def precision(base: Any) -> torch.dtype:
    """What a transformers model computes in, which rounding is judged by: that of its weights, or of the products with
    a quantised base where it is coarser."""
    own: torch.dtype = base.dtype
    config = quantization_of(base)
    if config is None:
        return own
    if name_of(config) == "int8":  # on GPUs inputs are quantised too: 8 significant bits, as bfloat16 has
        return torch.bfloat16 if next(base.parameters()).device.type == "cuda" else own
    wanted = getattr(torch, str(config.get("bnb_4bit_compute_dtype", "")).removeprefix("torch."), own)
    return wanted if torch.finfo(wanted).eps > torch.finfo(own).eps else own


def check_rows(network: nn.Module, path: str) -> None:
    """Raise ConfigError where bitsandbytes takes a 4-bit layer's weights for others than they are. On CPUs version 0.50
    gives rows that are no multiple of the block of 64 the scales of other blocks."""
    module: Any
    for name, module in network.named_modules():
        state = getattr(module.weight, "quant_state", None) if _is_quantized(module) else None
        if state is not None and state.shape[-1] % state.blocksize:
            in_one_row = copy.copy(state)
            in_one_row.shape = torch.Size((1, state.shape.numel()))
            if not torch.equal(dequantized(module).flatten(), _dequantize_4bit(module.weight, in_one_row).flatten()):
                raise ConfigError(
                    f"model.path={path!r}: {name} has rows of {module.in_features}, no multiple of 64, which this "
                    "bitsandbytes gets wrong in 4 bits on a CPU: use quantization=int8, or a GPU"
                )


def check_head(head: Any, path: str) -> None:
    """Raise ConfigError where a head that should be trained, or read exactly, is quantised."""
    if type(head).__module__.startswith("bitsandbytes."):
        raise ConfigError(
            f"model.path={path!r}: its head is quantised: name the model it was made from, and quantization=nf4 or int8"
        )


# ---------------------------------------------------------------------- beside an adapter


def save_quantization(network: Any, folder: Path) -> None:
    """Write `quantization.json`, where the base is quantised with bitsandbytes."""
    config = quantization_of(network)
    if config is not None and name_of(config) in BITSANDBYTES:
        write_json(folder / QUANTIZATION, {k: v for k, v in config.items() if not k.startswith("_")})


def difference_note(path: str, network: Any) -> str | None:
    """What to say where the adapter in `path` was trained on a base that was held in another way than this one."""
    file, now = Path(path) / QUANTIZATION, quantization_of(network)
    config = read_object(file, f"{KEY}={path!r}") if file.exists() else None
    trained, used = (name_of(c) if c else "none" for c in (config, now))
    if trained == used:
        return None
    found = "full precision" if used == "none" else used
    wanted = "a base in full precision" if trained == "none" else f"an {trained} base"
    return (
        f"the adapter in {path} was trained on {wanted}, and is used on one in {found}: quantization={trained} "
        "gives what it was trained for"
    )


# ---------------------------------------------------------------------- back to full precision


def plain_copy(network: Any) -> Any:
    """A copy of a transformers or PEFT model with its base in full precision, whatever it was held in: each quantised
    layer becomes the plain one that it was made from, with the dequantised weights. Adapters stay in place."""
    config = quantization_of(network)
    if config is not None and name_of(config) not in BITSANDBYTES:
        raise ConfigError(
            f"training.save_model=merged: a base in {name_of(config)} cannot be dequantised here: save the adapter"
        )
    if config is not None and (refused := problem("dequantising")):
        raise ConfigError(f"training.save_model=merged: {refused}")
    network = copy.deepcopy(network)
    if config is None:
        return network
    base = network.get_base_model() if hasattr(network, "get_base_model") else network
    dtype = base.dtype
    for name, module in list(network.named_modules()):
        if _is_quantized(module):
            network.set_submodule(name, _plain_layer(module, dtype))
    for module in network.modules():
        if hasattr(module, "base_layer") and type(module).__module__.endswith(".bnb"):
            private_api.plain_lora_layer(module)
    base.hf_quantizer.remove_quantization_config(base)
    base.is_loaded_in_4bit = base.is_loaded_in_8bit = False
    return network


def _is_quantized(module: nn.Module) -> bool:
    return type(private_api.own_weight(module)).__name__ in ("Params4bit", "Int8Params")


def _plain_layer(module: Any, dtype: torch.dtype) -> nn.Module:
    """nn.Linear, or the transposed Conv1D of GPT-2, as the model has it in full precision."""
    from transformers.pytorch_utils import Conv1D

    weight = dequantized(module).to(dtype)
    if module.source_cls is Conv1D:
        layer: Any = Conv1D(module.out_features, module.in_features)
        weight, bias = weight.T.contiguous(), True
    else:
        bias = module.bias is not None
        layer = nn.Linear(module.in_features, module.out_features, bias=bias, device="meta")
    layer.weight = nn.Parameter(weight, requires_grad=False)
    if bias:
        layer.bias = nn.Parameter(module.bias.detach().to(dtype), requires_grad=False)
    return layer.train(module.training)


def dequantized(module: Any) -> torch.Tensor:
    """The weights (outputs, inputs) that a quantised layer stands for."""
    import bitsandbytes.functional as bnb

    weight = module.weight
    if type(weight).__name__ == "Params4bit":
        return _dequantize_4bit(weight, weight.quant_state)
    scale = module.state.SCB if module.state.SCB is not None else weight.SCB  # moves there with the first use
    return bnb.int8_vectorwise_dequant(weight.data, scale)


def _dequantize_4bit(weight: torch.Tensor, state: Any) -> torch.Tensor:
    import bitsandbytes.functional as bnb

    found: torch.Tensor = bnb.dequantize_4bit(weight.data, state)
    return found
