"""From a Hub id or folder to a model that can be trained: precision, adapters, freezing, heads, the probe."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn

from alignlab.core import ConfigError, ModelKind
from alignlab.core.memory import keep_freed_memory
from alignlab.models.features import Features
from alignlab.models.heads import add_language_head
from alignlab.models.packed_model import PackedModel
from alignlab.models.probe import probe
from alignlab.models.quantization import (
    check_head,
    check_rows,
    difference_note,
    loading_options,
    quantization_of,
    same_in_training_and_evaluation,
)
from alignlab.models.settings import AdapterSettings, ModelSettings, QuantizationSettings

TASK = {"policy": "CAUSAL_LM", "score": "SEQ_CLS", "step": "TOKEN_CLS"}
LOADING_ERRORS = (OSError, ValueError, KeyError, RuntimeError, SafetensorError)
LAYER = re.compile(r"\.(?:layers|h|blocks)\.(\d+)\.")


def load_model(
    settings: ModelSettings,
    adapter: AdapterSettings | None = None,
    kind: ModelKind = "policy",
    *,
    trainable: bool = True,
    labels: int = 1,
    language_head: bool = False,
    quantization: QuantizationSettings | None = None,
    device: torch.device | str = "cpu",
    seed: int = 0,
) -> PackedModel:
    """Load a model with its tokenizer.

    Args:
        settings: which model; `path` may be a full model or a PEFT adapter, whose base is then loaded under it.
        adapter: the adapter to train; None or kind "none" trains the model's own weights. Where `path` is itself an
            adapter it is trained further (kind "lora") or merged into its base (kind "none").
        kind: "policy" (causal language model), "score" (sequence classifier with one output: a head is made where
            the model has none) or "step" (token classifier with `labels` outputs).
        trainable: whether weights get gradients.
        labels: outputs of a step head.
        language_head: keep the language head of the model beside a new score head, held fixed.
        quantization: how the base is held; it is trained through an adapter only.
        device: where to put it.
        seed: of new heads and adapters.

    Raises:
        ConfigError: where nothing can be loaded from `path`, with what was tried; or a quantised base would have to
            be trained itself.
    """
    torch.manual_seed(seed)
    if torch.device(device).type == "cpu":
        keep_freed_memory()
    adapter, quantization = adapter or AdapterSettings(), quantization or QuantizationSettings()
    if trainable:
        check_adapter(quantization, adapter)
    tokenizer = load_tokenizer(settings)
    saved_adapter = _adapter_config(settings.path)
    network = _load_network(settings, quantization, saved_adapter, kind, labels, trainable, device)
    if trainable and adapter.kind == "none" and quantization_of(network) is not None:
        raise ConfigError(
            f"adapter=none: model.path={settings.path!r} is quantised and stays as it is: give adapter=lora"
        )
    _set_pad(network, tokenizer, kind)
    if not settings.dropout:
        _remove_dropout(network)
    if saved_adapter is not None:
        network = _apply_saved_adapter(network, settings, adapter, kind, trainable)
    elif adapter.kind == "lora" and trainable:
        network = _new_adapter(network, adapter, kind)
    model = PackedModel(network, tokenizer, kind).to(device)
    model.source, model.dropout, model.features = settings.path, settings.dropout, Features()
    model.fresh_adapter = saved_adapter is None and adapter.kind == "lora" and trainable
    if saved_adapter is not None:
        model.notes += _notes_on_saved_adapter(network, settings, adapter, trainable)
    if model.max_length:  # many tokenizers name no limit
        tokenizer.model_max_length = min(tokenizer.model_max_length, model.max_length)
    if not trainable:
        model.requires_grad_(False)
    elif adapter.kind == "none":
        _freeze(model, settings)
    elif settings.freeze or settings.freeze_layers:
        raise ConfigError(
            "model.freeze: with an adapter all of the model's own weights stay as they are: see adapter.targets"
        )
    if settings.gradient_checkpointing and trainable:
        model.base.gradient_checkpointing_enable({"use_reentrant": False})
        if adapter.kind == "lora":
            model.base.enable_input_require_grads()
    if settings.layout == "auto":
        probe(model)
    else:
        model.layout = settings.layout
    if language_head:
        causal = _load_network(settings, quantization, saved_adapter, "policy", 1, False, device)
        add_language_head(model, causal)
    return model


def check_adapter(quantization: QuantizationSettings, adapter: AdapterSettings) -> None:
    """Raise ConfigError where a quantised base would have to be trained itself."""
    if quantization.kind != "none" and adapter.kind == "none":
        raise ConfigError(
            f"quantization={quantization.kind}: weights in so few bits cannot be trained: give adapter=lora, which "
            "trains an adapter on them, or quantization=none"
        )


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
        raise _cannot_load(key, path, "no tokenizer in it; name another by model.tokenizer", error) from error


def resolve_dtype(name: str) -> Any:
    """torch dtype for a setting; "auto" is what the model was saved in, for transformers to find out."""
    return "auto" if name == "auto" else getattr(torch, name)


def _load_network(
    settings: ModelSettings,
    quantization: QuantizationSettings,
    saved_adapter: dict[str, Any] | None,
    kind: ModelKind,
    labels: int,
    trainable: bool,
    device: torch.device | str,
) -> Any:
    import transformers

    path = settings.path
    if saved_adapter is not None:
        path = str(saved_adapter["base_model_name_or_path"])
    options: dict[str, Any] = {
        "revision": settings.revision if saved_adapter is None else None,
        "dtype": resolve_dtype(settings.dtype),
        "attn_implementation": settings.attention,
        "trust_remote_code": settings.trust_remote_code,
        **loading_options(settings, quantization, path, kind, device),
    }
    if kind == "policy":
        auto = transformers.AutoModelForCausalLM
    elif kind == "score":
        auto, options["num_labels"] = transformers.AutoModelForSequenceClassification, 1
    else:
        auto, options["num_labels"] = transformers.AutoModelForTokenClassification, labels
    if "config" in options and "num_labels" in options:  # transformers reads it into configs that it makes itself
        options["config"].num_labels = options.pop("num_labels")
    level = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()  # a new head is expected, not news
    transformers.logging.disable_progress_bar()
    try:
        network, missing = _from_pretrained(auto, path, options)
    except LOADING_ERRORS as error:
        base = "" if saved_adapter is None else f"{path!r}, the base of this adapter, "
        raise _cannot_load("model.path", settings.path, f"{base}cannot be loaded as a {kind} model", error) from error
    finally:
        transformers.logging.set_verbosity(level)
    # Only a head that will be trained, or comes with the adapter, may be new: elsewhere it would be noise.
    new = ("score.", "classifier.") if kind != "policy" and (trainable or saved_adapter is not None) else ()
    lost = sorted(name for name in missing if not name.startswith(new))
    if lost:
        raise ConfigError(
            f"model.path={settings.path!r}: not a {kind} model: it has no weights for {', '.join(lost[:3])}"
            + (f" and {len(lost) - 3} more" if len(lost) > 3 else "")
        )
    if settings.dtype == "auto" and network.dtype in (torch.bfloat16, torch.float16) and not torch.cuda.is_available():
        network = network.float()  # CPUs train half precision slowly and badly
    if kind != "policy":
        head = network.score if hasattr(network, "score") else network.classifier
        check_head(head, settings.path)
        head.to(torch.promote_types(network.dtype, torch.float32))
    check_rows(network, settings.path)
    same_in_training_and_evaluation(network)
    return network


def _cannot_load(key: str, path: str, problem: str, error: BaseException) -> ConfigError:
    """The one line to say so: a path that is no folder is a slip, unless it can be a Hub id."""
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


def _adapter_config(path: str) -> dict[str, Any] | None:
    """The PEFT config in `path`, where it holds an adapter rather than a model."""
    file = Path(path) / "adapter_config.json"
    return dict(json.loads(file.read_text())) if file.exists() else None


def _apply_saved_adapter(
    network: Any, settings: ModelSettings, adapter: AdapterSettings, kind: ModelKind, trainable: bool
) -> Any:
    from peft import PeftConfig, PeftModel

    task = PeftConfig.from_pretrained(settings.path).task_type
    if task == TASK["policy"] and kind != "policy" and trainable and adapter.kind == "none":
        return _with_trunk_of(network, settings)
    if task != TASK[kind]:
        raise ConfigError(
            f"model.path={settings.path!r}: this adapter was trained as {task}, a {kind} model is wanted: "
            "train from a model saved with training.save_model=merged"
        )
    try:
        network = PeftModel.from_pretrained(network, settings.path, is_trainable=trainable and adapter.kind == "lora")
    except LOADING_ERRORS as error:
        raise _cannot_load("model.path", settings.path, "the adapter cannot be loaded", error) from error
    if trainable and adapter.kind == "none":
        return network.merge_and_unload().requires_grad_(True)
    if trainable:
        _set_dropout(network, adapter.dropout)
    return network


def _set_dropout(network: Any, p: float) -> None:
    """Dropout on the inputs of a saved adapter: a matter of this run, not of the adapter."""
    network.peft_config["default"].lora_dropout = p
    for module in network.modules():
        if hasattr(module, "lora_dropout"):
            module.lora_dropout["default"] = nn.Dropout(p) if p else nn.Identity()


def _notes_on_saved_adapter(
    network: Any, settings: ModelSettings, adapter: AdapterSettings, trainable: bool
) -> list[str]:
    """Where an adapter that goes on is not what the settings say."""
    found = [difference_note(settings.path, network)]
    if trainable and adapter.kind == "lora":
        saved = network.peft_config["default"]
        given: dict[str, tuple[Any, Any]] = {
            "r": (adapter.r, saved.r),
            "alpha": (adapter.alpha, saved.lora_alpha),
            "rslora": (adapter.rslora, saved.use_rslora),
        }
        if isinstance(adapter.targets, list):
            given["targets"] = (sorted(adapter.targets), sorted(saved.target_modules))
        other = ", ".join(f"adapter.{k}={theirs} (not {ours})" for k, (ours, theirs) in given.items() if ours != theirs)
        found.append(f"the adapter in {settings.path} goes on as it was saved: {other}" if other else None)
    return [note for note in found if note]


def _with_trunk_of(network: Any, settings: ModelSettings) -> Any:
    """A classifier whose trunk is that of a language model's adapter folded into its base. (A new adapter on it would
    name the bare base as its own: that is why only full fine-tuning starts from such a folder.)"""
    policy = load_model(settings.model_copy(update={"layout": "plain"}), kind="policy", trainable=True)
    prefix = network.base_model_prefix
    getattr(network, prefix).load_state_dict(getattr(policy.base, prefix).state_dict())
    return network


def _new_adapter(network: Any, adapter: AdapterSettings, kind: ModelKind) -> Any:
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        task_type=TASK[kind],
        r=adapter.r,
        lora_alpha=adapter.alpha,  # type: ignore[arg-type]
        lora_dropout=adapter.dropout,
        target_modules=adapter.targets,
        exclude_modules=None if kind == "policy" else ["score", "classifier"],  # heads are trained whole
        use_rslora=adapter.rslora,
    )
    try:
        peft = get_peft_model(network, config)
    except ValueError as error:
        raise ConfigError(f"adapter.targets={adapter.targets!r}: {_first_line(error)}") from error
    local = Path(str(network.config.name_or_path))
    if local.exists():  # so that the adapter finds its base from any working folder
        peft.peft_config["default"].base_model_name_or_path = str(local.resolve())
    return peft


def _set_pad(network: Any, tokenizer: Any, kind: ModelKind) -> None:
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


def _remove_dropout(network: nn.Module) -> None:
    for module in network.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name, value in vars(module).items():  # OPT's `dropout` and `layerdrop`, Bloom's `hidden_dropout`, …
            if "drop" in name and isinstance(value, float):
                setattr(module, name, 0.0)


def _freeze(model: PackedModel, settings: ModelSettings) -> None:
    """Full fine-tuning with some weights held still."""
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


def _first_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
