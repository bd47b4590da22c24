"""From a Hub id or folder to a transformers network and its tokenizer, as they are, and to what is wrong with them."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn

from alignlab.core import ConfigError, ModelKind
from alignlab.models.quantization import check_head, check_rows, loading_options
from alignlab.models.settings import ModelSettings, QuantizationSettings

LOADING_ERRORS = (OSError, ValueError, KeyError, RuntimeError, SafetensorError)
"""What the libraries raise for files that are not there, damaged, or of another kind."""


def load_tokenizer(settings: ModelSettings) -> Any:
    """The model's tokenizer, or the one named by `tokenizer`."""
    from transformers import AutoTokenizer

    path = settings.tokenizer or settings.path
    try:
        return AutoTokenizer.from_pretrained(
            path, revision=settings.revision, trust_remote_code=settings.trust_remote_code
        )
    except (OSError, ValueError) as error:
        key = "model.tokenizer" if settings.tokenizer else "model.path"
        raise cannot_load(key, path, "no tokenizer in it; name another by model.tokenizer", error) from error


def resolve_dtype(name: str) -> Any:
    """torch dtype for a setting; "auto" is what the model was saved in, for transformers to find out."""
    return "auto" if name == "auto" else getattr(torch, name)


def load_base(
    settings: ModelSettings,
    quantization: QuantizationSettings,
    saved: dict[str, Any] | None,
    kind: ModelKind,
    labels: int,
    trainable: bool,
    device: torch.device | str,
) -> Any:
    """The base that `path` names, or that the adapter in `path` stands on: in the precision, layers and head wanted."""
    import transformers

    path = settings.path if saved is None else str(saved["base_model_name_or_path"])
    auto, options = _transformers_class(kind, labels)
    options |= {
        "revision": settings.revision if saved is None else None,
        "dtype": resolve_dtype(settings.dtype),
        "attn_implementation": settings.attention,
        "trust_remote_code": settings.trust_remote_code,
        **loading_options(settings, quantization, path, kind, device),
    }
    if "config" in options and "num_labels" in options:  # transformers reads it into configs that it makes itself
        options["config"].num_labels = options.pop("num_labels")
    level = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()  # a new head is expected, not news
    transformers.logging.disable_progress_bar()
    try:
        network, missing = _from_pretrained(auto, path, options)
    except LOADING_ERRORS as error:
        base = "" if saved is None else f"{path!r}, the base of this adapter, "
        raise cannot_load("model.path", settings.path, f"{base}cannot be loaded as a {kind} model", error) from error
    finally:
        transformers.logging.set_verbosity(level)
    _check_missing(missing, settings.path, kind, new_head=trainable or saved is not None)
    if settings.dtype == "auto" and network.dtype in (torch.bfloat16, torch.float16) and not torch.cuda.is_available():
        network = network.float()  # CPUs train half precision slowly and badly
    if kind != "policy":
        head = network.score if hasattr(network, "score") else network.classifier
        check_head(head, settings.path)
        head.to(torch.promote_types(network.dtype, torch.float32))
    check_rows(network, settings.path)
    return network


def _transformers_class(kind: ModelKind, labels: int) -> tuple[Any, dict[str, Any]]:
    """The class of transformers that loads a kind of model, and what it must be told."""
    import transformers

    if kind == "policy":
        return transformers.AutoModelForCausalLM, {}
    if kind == "score":
        return transformers.AutoModelForSequenceClassification, {"num_labels": 1}
    return transformers.AutoModelForTokenClassification, {"num_labels": labels}


def _check_missing(missing: set[str], path: str, kind: ModelKind, new_head: bool) -> None:
    """Raise ConfigError for weights that `path` lacks. Only a head that will be trained, or comes with the adapter, may
    be new: elsewhere it would be noise."""
    new = ("score.", "classifier.") if kind != "policy" and new_head else ()
    lost = sorted(name for name in missing if not name.startswith(new))
    if lost:
        raise ConfigError(
            f"model.path={path!r}: not a {kind} model: it has no weights for {', '.join(lost[:3])}"
            + (f" and {len(lost) - 3} more" if len(lost) > 3 else "")
        )


def cannot_load(key: str, path: str, problem: str, error: BaseException) -> ConfigError:
    """What to say where `path`, the value of `key`, cannot be loaded, in one line: a path that is no folder is a slip,
    unless it can be a Hub id."""
    if not Path(path).exists():
        if not re.fullmatch(r"(?!\.)[\w.-]+(/[\w.-]+)?", path):
            return ConfigError(f"{key}={path!r}: there is no such folder")
        problem = "there is no such folder, nor can it be had from the Hub"
    return ConfigError(f"{key}={path!r}: {problem}: {_first_line(error)}")


def _from_pretrained(auto: Any, path: str, options: dict[str, Any]) -> tuple[Any, set[str]]:
    """The network, and the names of the parameters that `path` has no weights for."""
    try:
        network, found = auto.from_pretrained(path, output_loading_info=True, **options)
    except ValueError as error:
        if "attn_implementation" not in str(error) and "attention" not in str(error).lower():
            raise
        return _from_pretrained(auto, path, {**options, "attn_implementation": "eager"})
    return network, set(found["missing_keys"])


def set_pad(network: Any, tokenizer: Any, kind: ModelKind) -> None:
    """Give model and tokenizer a pad token that is not the end token.

    Transformers' sequence classifiers look for the last token that is not padding: padding that is also the end
    token would make them skip the end of every response. One that a classifier's config already names stays all the
    same, since plain transformers will go by it: an adapter cannot change its base's config.
    """
    config = network.config.get_text_config()
    named = config.pad_token_id
    if kind == "score" and named is not None and 0 <= named < len(tokenizer):
        tokenizer.pad_token = tokenizer.convert_ids_to_tokens(named)
    elif tokenizer.pad_token_id is None or tokenizer.pad_token_id == tokenizer.eos_token_id:
        for token in (tokenizer.unk_token, tokenizer.bos_token):
            if token is not None and token != tokenizer.eos_token:
                tokenizer.pad_token = token
                break
        else:
            if tokenizer.pad_token_id is None:
                tokenizer.pad_token = tokenizer.eos_token
    config.pad_token_id = tokenizer.pad_token_id
    network.config.pad_token_id = tokenizer.pad_token_id
    if getattr(network, "generation_config", None) is not None:
        network.generation_config.pad_token_id = tokenizer.pad_token_id


def remove_dropout(network: nn.Module) -> None:
    """Set every dropout of a transformers model to 0: log-probs are then reproducible in training."""
    for module in network.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name, value in vars(module).items():  # OPT's `dropout` and `layerdrop`, Bloom's `hidden_dropout`, …
            if "drop" in name and isinstance(value, float):
                setattr(module, name, 0.0)


def _first_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
