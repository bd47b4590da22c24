"""From a Hub id or folder to a transformers network and its tokenizer, as they are, and to what is wrong with them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from alignlab.core import ConfigError, DataError, Group, ModelKind
from alignlab.models.files import (
    KEY,
    LAYER,
    Header,
    check_finite,
    check_fit,
    check_folder,
    check_sizes,
    check_types,
    headers,
    loading,
    naming,
    read_config,
    read_object,
    saved_tensors,
)
from alignlab.models.quantization import (
    BITSANDBYTES,
    check_head,
    check_rows,
    loading_options,
    name_of,
    quantization_of,
)
from alignlab.models.settings import ModelSettings, QuantizationSettings

OLD_BUFFERS = re.compile(r"(attn|attention)\.(bias|masked_bias|causal_mask)$|inv_freq$|position_ids$|\.version$")
"""What older versions of transformers saved beside the weights: masks and positions, which a model makes itself."""


def load_tokenizer(settings: ModelSettings) -> Any:
    """The model's tokenizer, or the one named by `tokenizer`.

    Raises:
        ConfigError: there is none, or it is broken or empty.
    """
    from transformers import AutoTokenizer

    path, key = settings.tokenizer or settings.path, "model.tokenizer" if settings.tokenizer else KEY
    check_folder(path, key, needs=())
    folder, where, remedy = Path(path), f"{key}={path!r}", "copy one into it, or name another by model.tokenizer"
    if (folder / "tokenizer_config.json").exists():
        given = read_object(folder / "tokenizer_config.json", where)
        _check_type(given, "model_max_length", int | float | None, f"{where}: tokenizer_config.json")
        _check_type(given, "chat_template", str | list | dict | None, f"{where}: tokenizer_config.json")
    try:
        with loading(path, f"no tokenizer can be loaded from it ({remedy})", key):
            found = AutoTokenizer.from_pretrained(
                path, revision=settings.revision, trust_remote_code=settings.trust_remote_code
            )
            empty = set(found.get_vocab()) <= set(found.all_special_tokens)
    except ConfigError:
        if (folder / "tokenizer.json").exists():
            read_object(folder / "tokenizer.json", where)
        raise
    if empty:
        raise ConfigError(f"{where}: there is no tokenizer in it, or one without tokens: {remedy}")
    return found


def _check_type(values: dict[str, Any], name: str, kind: Any, where: str) -> None:
    """Refuse a value of a model's JSON file that libraries would take as it is."""
    if not isinstance(values.get(name), kind):
        raise ConfigError(f"{where} has {name}={values[name]!r}, a {type(values[name]).__name__}, which it cannot be")


def check_vocabulary(tokenizer: Any, config: Any, path: str) -> None:
    """Refuse a tokenizer of another model, which has more tokens than the model has embeddings for. A few tokens that
    were added to it may lie outside (as of images, in text-only models): records with such a token are refused.

    Raises:
        ConfigError: with the token.
    """
    rows = int(config.get_text_config().vocab_size)
    named = (tokenizer.eos_token, tokenizer.bos_token)
    outside = [t for t in named if t is not None and tokenizer.convert_tokens_to_ids(t) >= rows]
    problem = f"its token {outside[0]!r} lies outside" if outside else f"it has {tokenizer.vocab_size} tokens"
    if outside or tokenizer.vocab_size > rows:
        raise ConfigError(
            f"{KEY}={path!r}: the tokenizer belongs to another model: {problem}, the vocabulary in config.json is "
            f"{rows}: name the right one by model.tokenizer"
        )


def check_tokens(groups: Sequence[Group], vocabulary: int) -> None:
    """Refuse tokens that the model has no embedding for: of another tokenizer's records, or of a tokenizer that is not
    the model's.

    Raises:
        DataError: with the record.
    """
    for group in groups:
        for ids in (group.prompt_ids, *(r.token_ids for r in group.responses)):
            if ids and (max(ids) >= vocabulary or min(ids) < 0):
                token = max(ids) if max(ids) >= vocabulary else min(ids)
                raise DataError(
                    f"{group.origin}: token {token} is outside the model's vocabulary of {vocabulary}: the tokenizer "
                    "in model.path, or the one that made these records, belongs to another model"
                )


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
    heads: bool = False,
) -> Any:
    """The base that `path` names, or that the adapter in `path` stands on: in the precision, layers and head wanted.

    Args:
        heads: whether it may have other heads than the one that is wanted, which are left out.
    """
    import transformers

    path = settings.path if saved is None else str(saved["base_model_name_or_path"])
    revision = settings.revision if saved is None else None
    with naming(KEY if saved is None else f"{KEY}={settings.path!r}: its base"):
        config = read_config(path, revision, settings.trust_remote_code)
        tensors = headers(path)
        check_sizes(path, config, tensors)
        _check_generation(path)
    auto, options = _transformers_class(kind, labels)
    options |= {
        "revision": revision,
        "dtype": resolve_dtype(settings.dtype),
        "attn_implementation": settings.attention,
        "trust_remote_code": settings.trust_remote_code,
        **loading_options(settings, quantization, config, kind, device),
    }
    if "config" in options and "num_labels" in options:  # transformers reads it into configs that it makes itself
        options["config"].num_labels = options.pop("num_labels")
    level = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()  # a new head is expected, not news
    transformers.logging.disable_progress_bar()
    base = "" if saved is None else f"{path!r}, the base of this adapter, "
    try:
        with loading(settings.path, f"{base}cannot be loaded as a {kind} model"):
            network, found = _from_pretrained(auto, path, options)
    finally:
        transformers.logging.set_verbosity(level)
    _check_loaded(network, found, tensors, settings.path, kind, trainable or saved is not None, heads)
    if settings.dtype == "auto" and network.dtype in (torch.bfloat16, torch.float16) and not torch.cuda.is_available():
        network = network.float()  # CPUs train half precision slowly and badly
    if kind != "policy":
        name = "score" if hasattr(network, "score") else "classifier"
        head = getattr(network, name)
        check_head(head, settings.path)
        head.to(torch.promote_types(network.dtype, torch.float32))
        _load_head(head, name, path, revision)
    check_rows(network, settings.path)
    check_finite(settings.path, network.named_parameters())
    return network


@torch.no_grad()
def _load_head(head: nn.Module, name: str, path: str, revision: str | None) -> None:
    """Give a head its weights as they were saved: transformers has rounded them to what the rest is in."""
    ours = {f"{name}.{n}": p for n, p in head.named_parameters()}
    for found, tensor in saved_tensors(path, ours, revision).items():
        ours[found].copy_(tensor)


def _transformers_class(kind: ModelKind, labels: int) -> tuple[Any, dict[str, Any]]:
    """The class of transformers that loads a kind of model, and what it must be told."""
    import transformers

    if kind == "policy":
        return transformers.AutoModelForCausalLM, {}
    if kind == "score":
        return transformers.AutoModelForSequenceClassification, {"num_labels": 1}
    return transformers.AutoModelForTokenClassification, {"num_labels": labels}


def _check_loaded(
    network: Any, found: dict[str, Any], tensors: Header, path: str, kind: ModelKind, new_head: bool, heads: bool
) -> None:
    """Raise ConfigError for weights that `path` lacks, has too many, or has in another shape or of another type.

    Only a head that will be trained, or comes with the adapter, may be new: elsewhere it would be noise. The language
    head that a classifier is made without is no loss.
    """
    new = ("score.", "classifier.") if kind != "policy" and new_head else ()
    missing = [n for n in found["missing_keys"] if not n.startswith(new)]
    trunk = f"{network.base_model_prefix}."
    spare = [n for n in found["unexpected_keys"] if not n.startswith(trunk) and not LAYER.search(n)]
    unexpected = set(found["unexpected_keys"]) - set(spare if kind != "policy" or heads else ())
    unexpected = {n for n in unexpected if not OLD_BUFFERS.search(n)}
    quantization = quantization_of(network)
    if quantization is not None and name_of(quantization) not in BITSANDBYTES:
        unexpected = set()  # each library has names of its own for what goes with the weights
    shapes = {n: (theirs, ours) for n, theirs, ours in found["mismatched_keys"]}
    check_fit(path, f"a {kind} model", missing, unexpected, shapes)
    if quantization is None:
        check_types(path, tensors, [n for n, _ in network.named_parameters()], network.base_model_prefix)


def _check_generation(path: str) -> None:
    """Transformers passes over a broken `generation_config.json`, which says what ends a response."""
    file = Path(path) / "generation_config.json"
    if file.exists():
        where = f"{KEY}={path!r}"
        ends = read_object(file, where).get("eos_token_id")
        if not all(isinstance(e, int) for e in (ends if isinstance(ends, list) else [ends or 0])):
            raise ConfigError(f"{where}: {file.name} has eos_token_id={ends!r}: must be a token's number, or several")


def _from_pretrained(auto: Any, path: str, options: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """The network, and which weights it lacked or had too many, or of another shape."""
    try:
        network, found = auto.from_pretrained(path, output_loading_info=True, ignore_mismatched_sizes=True, **options)
    except ValueError as error:
        if "attn_implementation" not in str(error) and "attention" not in str(error).lower():
            raise
        return _from_pretrained(auto, path, {**options, "attn_implementation": "eager"})
    return network, found


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
    elif (pad := tokenizer.pad_token_id) is None or pad == tokenizer.eos_token_id or pad >= config.vocab_size:
        for token in (tokenizer.unk_token, tokenizer.bos_token):
            if token is not None and token != tokenizer.eos_token:
                tokenizer.pad_token = token
                break
        else:
            if pad is None or pad >= config.vocab_size:
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
