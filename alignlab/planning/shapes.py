"""A model as shapes alone: the real modules on tensors without contents, so that nothing is loaded or computed."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass, fields
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from alignlab.core import AdapterKind, Algorithm, ConfigError, ModelKind
from alignlab.models import ModelSettings, PackedModel
from alignlab.models.adapters import copy_adapter, saved_adapter, shaped_like
from alignlab.models.base import cannot_load, remove_dropout
from alignlab.models.heads import add_language_head
from alignlab.models.load import freeze
from alignlab.models.packed_model import CRITIC
from alignlab.planning.few_bits import nf4_bytes, quantise

BUILT_IN = {
    "llama-7b": (4096, 32, 32, 11008),
    "llama-13b": (5120, 40, 40, 13824),
    "llama-33b": (6656, 52, 60, 17920),
    "llama-65b": (8192, 64, 80, 22016),
}
"""Width, heads and layers of Touvron et al. 2023 (arXiv:2302.13971), table 2; the inner width is 2/3 of 4 widths
(section 2.2), rounded up to a multiple of 256. Known by name, so that plans can be made offline."""


@dataclass(frozen=True)
class Inventory:
    """What a process that holds all of a model holds, in bytes unless said otherwise. Linear in the layers.

    Attributes:
        parameters: numbers in the base model, heads included, adapters not.
        trained: numbers that are trained.
        matrices: trained numbers in matrices, and `factored`, the rows and columns of those, for Adafactor.
        trained_weights, frozen_weights, quantised: in their own precision; quantisation constants included.
        gradients: in the precision of the weights.
        reference: of a frozen copy of the model, or of the adapter where one is trained further.
        largest: the largest trained tensor.
        layer: all weights of one layer of the decoder; `outside`: those of no layer, embeddings and heads.
        small: trained numbers in tensors below 4,096 numbers, which 8-bit optimisers keep in 32 bits.
        widened: trained numbers of half precision, of which ZeRO keeps a copy in float32.
        head_gradients: gradients that exist before those of the last layer: the output embedding's.
        table_gradient: the input embedding's, made in a piece beside what is there.
    """

    parameters: float = 0
    trained: float = 0
    matrices: float = 0
    factored: float = 0
    trained_weights: float = 0
    frozen_weights: float = 0
    quantised: float = 0
    gradients: float = 0
    reference: float = 0
    largest: float = 0
    layer: float = 0
    outside: float = 0
    small: float = 0
    widened: float = 0
    head_gradients: float = 0
    table_gradient: float = 0

    @property
    def weights(self) -> float:
        return self.trained_weights + self.frozen_weights + self.quantised


def extrapolate(low: Any, high: Any, at: tuple[int, int], layers: int) -> Any:
    """A dataclass of numbers that are linear in the layers, from its values at two numbers of layers."""
    made = {}
    for field in fields(low):
        a, b = getattr(low, field.name), getattr(high, field.name)
        made[field.name] = b + (b - a) / (at[1] - at[0]) * (layers - at[1])
    return type(low)(**made)


class Shapes:
    """A model to be trained, without contents.

    Args:
        config: the transformers config.
        settings, adapter: as for `load_model`.
        saved: the adapter's own config, where the model is an adapter.
        quantisation: "none", "nf4" or "int8": how the frozen base is held.
        algorithm: for the heads, the critic and the reference.
        layers: how many layers to build; None: all.
        dtype: of the weights.
        reference: whether the run has a reference policy.
    """

    def __init__(
        self,
        config: Any,
        settings: ModelSettings,
        adapter: AdapterKind,
        quantisation: str,
        algorithm: Algorithm,
        dtype: torch.dtype,
        *,
        saved: dict[str, Any] | None = None,
        layers: int | None = None,
        reference: bool = False,
        double: bool = True,
        compute: torch.dtype = torch.bfloat16,
    ) -> None:
        self.mode = FakeTensorMode(allow_non_fake_inputs=True)
        self.quantisation, self.double, self.algorithm = quantisation, double, algorithm
        config = shortened(config, layers)
        settings = settings.model_copy(update={"path": "."})
        kind = algorithm.model
        with torch.device("meta"):
            network = _network(config, kind, algorithm.labels, dtype, settings)
        if quantisation != "none":
            quantise(network, quantisation, compute)
        if not settings.dropout:
            remove_dropout(network)
        self.base = sum(p.numel() for p in network.parameters())
        whole = sum(p.nbytes for p in network.parameters())
        if saved and not adapter.trains_base:
            with torch.device("meta"):
                network = shaped_like(network, saved, kind)
        else:
            with torch.device("meta"):
                network = adapter.apply(network, kind)
        model = PackedModel(network, None, kind)
        if adapter.trains_base:
            freeze(model, settings)
        if settings.gradient_checkpointing:
            model.base.gradient_checkpointing_enable({"use_reentrant": False})
            if not adapter.trains_base:
                model.base.enable_input_require_grads()
        trained = sum(p.nbytes for p in model.parameters() if p.requires_grad)
        self.reference = 0.0 if not reference else whole if adapter.trains_base else trained if saved else 0.0
        if "value" in algorithm.reads:
            _add_value_head(model, algorithm.critic)
        if kind == "score" and "logp" in algorithm.reads:
            with torch.device("meta"):
                causal = _network(config, "policy", 1, dtype, settings)
            if causal.get_output_embeddings().weight is causal.get_input_embeddings().weight:
                causal.set_output_embeddings(copy.deepcopy(causal.get_output_embeddings()))
            add_language_head(model, causal)
        self._materialise(model)
        self.table = model.base.get_input_embeddings().weight
        self.model = model.train()

    def _materialise(self, model: nn.Module) -> None:
        """Tensors without contents, as if on the CPU, for those on "meta", which kernels treat unlike any device."""
        made: dict[int, Tensor] = {}

        def twin(tensor: Tensor) -> Tensor:
            if id(tensor) not in made:
                with self.mode:
                    empty = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu")
                if isinstance(tensor, nn.Parameter):
                    empty = nn.Parameter(empty, requires_grad=tensor.requires_grad)
                if hasattr(tensor, "few_bits"):
                    empty.few_bits = True  # type: ignore[attr-defined]
                made[id(tensor)] = empty
            return made[id(tensor)]

        for module in model.modules():
            for held in (module._parameters, module._buffers):
                for name, tensor in held.items():
                    if tensor is not None:
                        held[name] = twin(tensor)  # type: ignore[assignment]

    def inventory(self) -> Inventory:
        """What it holds."""
        n: dict[str, float] = {f.name: 0.0 for f in fields(Inventory)}
        n["parameters"], n["reference"] = float(self.base), self.reference
        for tensor in self.model.buffers():
            n["frozen_weights"] += tensor.nbytes
        first = self._layers()
        inside = {id(p) for layer in first for p in layer.parameters()}
        head = {id(p) for p in self._head()}
        for parameter in self.model.parameters():
            held = self._bytes(parameter)
            if parameter.requires_grad:
                n["trained"] += parameter.numel()
                n["trained_weights"] += held
                n["gradients"] += held
                n["largest"] = max(n["largest"], held)
                n["small"] += parameter.numel() if parameter.numel() < 4096 else 0
                n["widened"] += parameter.numel() if parameter.element_size() < 4 else 0
                if parameter.dim() >= 2:
                    n["matrices"] += parameter.numel()
                    n["factored"] += parameter.numel() / parameter.shape[-1] + parameter.numel() / parameter.shape[-2]
                if id(parameter) in head:
                    n["head_gradients"] += held
            elif hasattr(parameter, "few_bits"):
                n["quantised"] += held
            else:
                n["frozen_weights"] += held
            if id(parameter) not in inside:
                n["outside"] += held
        n["table_gradient"] = float(self.table.nbytes if self.table.requires_grad else 0)
        n["layer"] = max((sum(self._bytes(p) for p in layer.parameters()) for layer in first), default=0.0)
        return Inventory(**n)

    def _layers(self) -> list[nn.Module]:
        """The decoder's layers: the longest list of modules in it."""
        lists = [list(m) for m in self.model.decoder.modules() if isinstance(m, nn.ModuleList)]
        return max(lists, key=lambda found: sum(p.numel() for m in found for p in m.parameters()), default=[])

    def _head(self) -> Iterator[nn.Parameter]:
        for module in (self.model.head, self.model.value_head):
            if module is not None:
                yield from module.parameters()

    def _bytes(self, parameter: Tensor) -> float:
        if not hasattr(parameter, "few_bits"):
            return float(parameter.nbytes)
        if self.quantisation == "int8":
            return parameter.numel() + 4.0 * parameter.shape[0]
        return parameter.numel() * nf4_bytes(self.double)


def _network(config: Any, kind: ModelKind, labels: int, dtype: torch.dtype, settings: ModelSettings) -> Any:
    """The transformers model of a kind; its head as `load_model` makes it."""
    import transformers

    config = copy.deepcopy(config)
    auto = transformers.AutoModelForCausalLM
    if kind != "policy":
        config.num_labels = 1 if kind == "score" else labels
        score = kind == "score"
        auto = (
            transformers.AutoModelForSequenceClassification if score else transformers.AutoModelForTokenClassification
        )
    attention = "sdpa" if settings.attention in ("flash_attention_2", "flex_attention") else settings.attention
    options: dict[str, Any] = {"dtype": dtype, "trust_remote_code": settings.trust_remote_code}
    try:
        try:
            network = auto.from_config(config, attn_implementation=attention, **options)
        except ValueError:
            network = auto.from_config(config, attn_implementation="eager", **options)
    except (ValueError, ImportError, AttributeError, TypeError) as error:
        raise ConfigError(f"model.path: a {kind} model cannot be made of its config: {error}") from error
    if kind != "policy":
        head = network.score if hasattr(network, "score") else network.classifier
        head.to(torch.promote_types(dtype, torch.float32))
    return network


def _add_value_head(model: PackedModel, critic: str) -> None:
    """As `add_value_head` does, without contents."""
    with torch.device("meta"):
        model.value_head = nn.Linear(int(model.config.hidden_size), 1)
        if critic == "own" and hasattr(model.network, "peft_config"):
            copy_adapter(model.network, CRITIC, trained=True)
        elif critic == "own":
            model.critic_decoder = copy.deepcopy(model.decoder)
    model.critic = critic  # type: ignore[assignment]


def saved_dtype(config: Any, on_cpu: bool) -> torch.dtype:
    """What `model.dtype=auto` comes to: as saved; half precision becomes float32 on CPUs."""
    saved = getattr(config, "dtype", None) or getattr(config.get_text_config(), "dtype", None)
    saved = getattr(torch, saved) if isinstance(saved, str) else saved
    return torch.float32 if saved is None or (on_cpu and saved.itemsize == 2) else saved


def bare_bytes(config: Any, settings: ModelSettings, on_cpu: bool) -> float:
    """Of the weights of a model with a score head, as a scorer loads it."""
    dtype = saved_dtype(config, on_cpu) if settings.dtype == "auto" else getattr(torch, settings.dtype)
    with torch.device("meta"):
        network = _network(config, "score", 1, dtype, settings)
    return float(sum(p.nbytes for p in network.parameters()))


def shortened(config: Any, layers: int | None) -> Any:
    """The config of the same model with fewer layers."""
    if layers is None:
        return config
    config = copy.deepcopy(config)
    text = config.get_text_config()
    text.num_hidden_layers = layers
    for name, value in list(vars(text).items()):
        if name == "layer_types" and isinstance(value, list):
            setattr(text, name, value[:layers])
    return config


def read_config(settings: ModelSettings) -> tuple[Any, dict[str, Any] | None]:
    """The model's transformers config, and that of the adapter where `path` holds one.

    Raises:
        ConfigError: there is none at `path`, and no built-in shape has that name.
    """
    from transformers import AutoConfig, LlamaConfig

    path = settings.path
    if path in BUILT_IN and not Path(path).exists():
        width, heads, layers, inner = BUILT_IN[path]
        shape = {"hidden_size": width, "num_attention_heads": heads, "num_hidden_layers": layers}
        built = LlamaConfig(
            **shape, intermediate_size=inner, vocab_size=32000, max_position_embeddings=2048, dtype="bfloat16"
        )
        return built, None
    if "/" not in path and not Path(path).exists() and (near := get_close_matches(path, BUILT_IN, n=1, cutoff=0.8)):
        raise ConfigError(f"model.path={path!r}: there is no such folder; did you mean '{near[0]}'?")
    saved = saved_adapter(path)
    if saved is not None:
        path = str(saved["base_model_name_or_path"])
    try:
        revision = settings.revision if saved is None else None
        found = AutoConfig.from_pretrained(path, revision=revision, trust_remote_code=settings.trust_remote_code)
    except (OSError, ValueError, KeyError) as error:
        raise cannot_load("model.path", path, "no model's config in it", error) from error
    return found, saved
