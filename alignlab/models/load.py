"""From a Hub id or folder to a model that can be trained: adapters, freezing, heads, the probe."""

from __future__ import annotations

import re
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import nn

from alignlab.core import AdapterKind, ConfigError, ModelKind
from alignlab.core.memory import keep_freed_memory
from alignlab.core.parts import calling
from alignlab.core.private_api import problem
from alignlab.models import private_api
from alignlab.models.adapters import TASK, FullFineTuning, Resumes, adapter_in_use
from alignlab.models.base import check_vocabulary, load_base, load_tokenizer, remove_dropout, set_pad
from alignlab.models.files import (
    ADAPTER_WEIGHTS,
    KEY,
    LAYER,
    Header,
    check_finite,
    check_fit,
    check_folder,
    check_types,
    header,
    loading,
    naming,
    saved_adapter,
)
from alignlab.models.heads import add_language_head
from alignlab.models.hub import check_reachable
from alignlab.models.packed_model import Features, PackedModel, evaluating
from alignlab.models.probe import probe, rounding
from alignlab.models.quantization import (
    BITSANDBYTES,
    difference_note,
    name_of,
    quantization_of,
)
from alignlab.models.settings import ModelSettings, QuantizationSettings


def load_model(
    settings: ModelSettings,
    adapter: AdapterKind | None = None,
    kind: ModelKind = "policy",
    *,
    trainable: bool = True,
    labels: int = 1,
    language_head: bool = False,
    quantization: QuantizationSettings | None = None,
    device: torch.device | str = "cpu",
    seed: int = 0,
    key: str = KEY,
) -> PackedModel:
    """Load a model with its tokenizer.

    Args:
        settings: which model; `path` may be a full model or a PEFT adapter, whose base is then loaded under it.
        adapter: what is trained; None: the model's own weights. Where `path` is itself an adapter, it is trained
            further, or merged into its base by a kind that trains the base.
        kind: "policy" (causal language model), "score" (sequence classifier with one output: a head is made where
            the model has none) or "step" (token classifier with `labels` outputs).
        trainable: whether weights get gradients; a model that is only read gets no new adapter.
        labels: outputs of a step head.
        language_head: keep the language head of the model beside a new score head, held fixed.
        quantization: how the base is held; it is trained through an adapter only.
        device: where to put it.
        seed: of new heads and adapters.
        key: the setting that names `path`, for messages.

    Raises:
        ConfigError: where nothing can be loaded from `path`, with what was tried; its weights do not fit its config, or
            its tokenizer the weights; or a quantised base would have to be trained itself.
    """
    with naming(key), loading(settings.path, f"cannot be loaded as a {kind} model"):
        return _load(settings, adapter, kind, trainable, labels, language_head, quantization, device, seed)


def _load(
    settings: ModelSettings,
    adapter: AdapterKind | None,
    kind: ModelKind,
    trainable: bool,
    labels: int,
    language_head: bool,
    quantization: QuantizationSettings | None,
    device: torch.device | str,
    seed: int,
) -> PackedModel:
    torch.manual_seed(seed)
    if torch.device(device).type == "cpu":
        keep_freed_memory()
    adapter, quantization = adapter or FullFineTuning(), quantization or QuantizationSettings()
    if trainable:
        check_adapter(quantization, adapter)
    check_folder(settings.path)
    check_reachable(settings.path, settings.revision)
    saved = saved_adapter(settings.path)
    network = load_base(settings, quantization, saved, kind, labels, trainable, device)
    if trainable and adapter.trains_base and quantization_of(network) is not None:
        raise ConfigError(
            f"adapter=none: model.path={settings.path!r} is quantised and stays as it is: give adapter=lora"
        )
    tokenizer = load_tokenizer(settings)
    check_vocabulary(tokenizer, network.config, settings.path)
    set_pad(network, tokenizer, kind)
    if not settings.dropout:
        remove_dropout(network)
    notes = _same_in_every_mode(network)
    if saved is not None:
        network, found = _with_saved_adapter(network, settings, adapter, kind, trainable)
        notes += found
    if trainable and (saved is None or adapter.trains_base):
        network = _with_new_adapter(network, adapter, kind)

    model = PackedModel(network, tokenizer, kind).to(device)
    model.source, model.dropout, model.features = settings.path, settings.dropout, Features()
    model.notes += notes
    if model.max_length:  # many tokenizers name no limit
        tokenizer.model_max_length = min(tokenizer.model_max_length, model.max_length)
    _choose_trained(model, settings, adapter, trainable)
    if settings.layout == "auto":
        probe(model)
    else:
        model.layout = settings.layout
    model.fresh_adapter = trainable and saved is None and not adapter.trains_base and _changes_nothing_yet(model)
    if language_head:
        causal = load_base(settings, quantization, saved, "policy", 1, False, device, heads=True)
        add_language_head(model, causal)
    return model


def check_adapter(quantization: QuantizationSettings, adapter: AdapterKind) -> None:
    """Raise ConfigError where a quantised base would have to be trained itself."""
    if quantization.kind != "none" and adapter.trains_base:
        raise ConfigError(
            f"quantization={quantization.kind}: weights in so few bits cannot be trained: give adapter=lora, which "
            "trains an adapter on them, or quantization=none"
        )


def _same_in_every_mode(network: Any) -> list[str]:
    """Have a base in 4 or 8 bits compute the same with and without gradients; what to say where that cannot be had."""
    config = quantization_of(network)
    if config is None or name_of(config) not in BITSANDBYTES:
        return []
    if refused := problem("quantised layers"):
        return [refused]
    private_api.same_in_training_and_evaluation(network)
    return []


def _with_saved_adapter(
    network: Any, settings: ModelSettings, adapter: AdapterKind, kind: ModelKind, trainable: bool
) -> tuple[Any, list[str]]:
    """The network with the PEFT adapter in `path` on it, or merged into it where the base is trained; and notes."""
    from peft import PeftConfig, PeftModel, get_peft_model_state_dict

    path, merges = settings.path, trainable and adapter.trains_base
    note = difference_note(path, network)
    notes = [note] if note else []
    with loading(path, "its adapter_config.json cannot be used"):
        task = PeftConfig.from_pretrained(path).task_type
    if task == TASK["policy"] and kind != "policy" and merges:
        return _with_trunk_of(network, settings), notes
    if task != TASK[kind]:
        raise ConfigError(
            f"model.path={path!r}: this adapter was trained as {task}, a {kind} model is wanted: "
            "train from a model saved with training.save_model=merged"
        )
    tensors = _adapter_header(path)
    with loading(path, "the adapter cannot be loaded"), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what is missing or of another shape is refused below
        network = PeftModel.from_pretrained(
            network, path, is_trainable=trainable and not merges, ignore_mismatched_sizes=True
        )
        ours = get_peft_model_state_dict(network, save_embedding_layers=False)
    if tensors is not None:
        extra = tensors.keys() - ours.keys() - network.state_dict().keys()  # embeddings may be saved beside an adapter
        both = {n: (tensors[n][1], tuple(ours[n].shape)) for n in ours.keys() & tensors.keys()}
        shapes = {n: pair for n, pair in both.items() if pair[0] != pair[1]}
        check_fit(path, "an adapter for its base", ours.keys() - tensors.keys(), extra, shapes)
        check_types(path, tensors, ours)
    check_finite(path, ours.items())
    if merges:
        return network.merge_and_unload().requires_grad_(True), notes
    if trainable:
        asked = f"the adapter in {path} goes on as it was saved: the settings of `adapter` are not applied to it"
        notes += adapter.resume(network, path) if isinstance(adapter, Resumes) else [asked]
    return network, notes


def _adapter_header(path: str) -> Header | None:
    """What tensors a saved adapter holds; None where they are pickled, for PEFT to read."""
    file = Path(path) / ADAPTER_WEIGHTS
    if not file.exists() and file.with_suffix(".bin").exists():
        return None
    return header(file, f"{KEY}={path!r}")


def _with_trunk_of(network: Any, settings: ModelSettings) -> Any:
    """A classifier whose trunk is that of a language model's adapter merged into its base. (A new adapter on it would
    name the bare base as its own: only a kind that trains the base can start from such a folder.)"""
    policy = load_model(settings.model_copy(update={"layout": "plain"}), kind="policy", trainable=True)
    prefix = network.base_model_prefix
    getattr(network, prefix).load_state_dict(getattr(policy.base, prefix).state_dict())
    return network


def _with_new_adapter(base: Any, adapter: AdapterKind, kind: ModelKind) -> Any:
    """The network with something to train in it. The adapter may be anyone's: what could not be saved, loaded again
    or read by the forward pass is refused."""
    name, before = type(adapter).__name__, {n for n, _ in base.named_parameters()}
    with calling(adapter, "apply"):
        network: Any = adapter.apply(base, kind)
    if not hasattr(network, "named_parameters"):
        raise ConfigError(f"adapter: {name}.apply must return the network, not {type(network).__name__}")
    if hasattr(network, "peft_config"):
        config = network.peft_config["default"]
        if config.is_prompt_learning:
            raise ConfigError(f"adapter: {name} puts tokens before the prompt, which packed rows have no place for")
        local = Path(str(network.config.name_or_path))
        if local.exists():  # so that the adapter finds its base from any working folder
            config.base_model_name_or_path = str(local.resolve())
    elif not adapter.trains_base:
        raise ConfigError(f"adapter: {name} says that it does not train the base, and returns no PEFT model")
    elif new := sorted({n for n, _ in network.named_parameters()} - before):
        raise ConfigError(
            f"adapter: {name} adds {', '.join(new[:3])} to the model, which transformers could not load again: add "
            "weights through a PEFT model"
        )
    if not any(p.requires_grad for p in network.parameters()):
        raise ConfigError(f"adapter: {name} leaves nothing to train")
    return network


def _choose_trained(model: PackedModel, settings: ModelSettings, adapter: AdapterKind, trainable: bool) -> None:
    """Which weights get gradients, beyond what the adapter left so, and whether activations are recomputed."""
    if not trainable:
        model.requires_grad_(False)
    elif adapter.trains_base:
        freeze(model, settings)
    elif settings.freeze or settings.freeze_layers:
        raise ConfigError(
            "model.freeze: with an adapter all of the model's own weights stay as they are: see adapter.targets"
        )
    if settings.gradient_checkpointing and trainable:
        model.base.gradient_checkpointing_enable({"use_reentrant": False})
        if not adapter.trains_base:
            model.base.enable_input_require_grads()


def _changes_nothing_yet(model: PackedModel) -> bool:
    """Whether the policy with its new adapter is its base, so that a reference is had by turning the adapter off."""
    ids = torch.arange(8, device=model.device)[None] % int(model.config.vocab_size)
    with torch.no_grad(), evaluating(model):
        with_it = model.decoder(input_ids=ids, use_cache=False).last_hidden_state.float()
        with adapter_in_use(model.network, None):
            without = model.decoder(input_ids=ids, use_cache=False).last_hidden_state.float()
    return bool((with_it - without).norm() <= rounding(model.dtype) * without.norm())


def freeze(model: PackedModel, settings: ModelSettings) -> None:
    """Hold still what `model.freeze` and `model.freeze_layers` name.

    Raises:
        ConfigError: a pattern matches no parameter, there are fewer layers, or nothing is left to train.
    """
    patterns = [re.compile(p) for p in settings.freeze]
    names = [n for n, _ in model.network.named_parameters()]
    for pattern in patterns:
        if not any(pattern.search(n) for n in names):
            raise ConfigError(
                f"model.freeze: no parameter matches '{pattern.pattern}'; the first are {', '.join(names[:3])}"
            )
    layers = int(model.config.num_hidden_layers)
    if settings.freeze_layers > layers:
        raise ConfigError(f"model.freeze_layers={settings.freeze_layers}: the model has {layers} layers")
    if settings.freeze_layers and not any(LAYER.search(n) for n in names):
        raise ConfigError(
            f"model.freeze_layers: the layers of {type(model.base).__name__} are not known: use model.freeze"
        )
    tables = (m for m in model.base.modules() if isinstance(m, nn.Embedding)) if settings.freeze_layers else ()
    embeddings = {id(p) for m in tables for p in m.parameters()}
    for name, parameter in model.network.named_parameters():
        layer = LAYER.search(name)
        low = layer is not None and int(layer.group(1)) < settings.freeze_layers
        if low or id(parameter) in embeddings or any(p.search(name) for p in patterns):
            parameter.requires_grad_(False)
    if not any(p.requires_grad for p in model.parameters()):
        raise ConfigError("model.freeze: nothing is left to train")
