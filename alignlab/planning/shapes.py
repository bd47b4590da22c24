"""A model as shapes alone: the real modules on tensors without contents, so that nothing is loaded or computed."""

from __future__ import annotations

import copy
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from alignlab.core import AdapterKind, Algorithm, ConfigError
from alignlab.core.private_api import fake_tensors
from alignlab.models import Features, ModelSettings, PackedModel, QuantizationSettings
from alignlab.models.adapters import copy_adapter, shaped_like
from alignlab.models.attention import use_plans
from alignlab.models.base import remove_dropout
from alignlab.models.files import KEY, check_folder, loading, naming, saved_adapter
from alignlab.models.files import read_config as config_of
from alignlab.models.heads import add_language_head
from alignlab.models.load import freeze
from alignlab.models.packed_model import CRITIC
from alignlab.models.private_api import become
from alignlab.training.precision import Precision

BUILT_IN = {
    "llama-7b": (4096, 32, 32, 11008),
    "llama-13b": (5120, 40, 40, 13824),
    "llama-33b": (6656, 52, 60, 17920),
    "llama-65b": (8192, 64, 80, 22016),
}
"""Width, heads, layers and inner width of Touvron et al. 2023 (arXiv:2302.13971), table 2 and section 2.2 (the inner
width is 2/3 of 4 widths, rounded up to a multiple of 256). Known by name, so that plans can be made offline."""


def read_config(settings: ModelSettings) -> tuple[Any, dict[str, Any] | None]:
    """The model's transformers config, and the adapter's config where `path` holds an adapter.

    Raises:
        ConfigError: there is none at `path`, and no built-in shape has that name.
    """
    from transformers import LlamaConfig

    path, revision = settings.path, settings.revision
    if path in BUILT_IN and not Path(path).exists():
        width, heads, layers, inner = BUILT_IN[path]
        shape = {"hidden_size": width, "num_attention_heads": heads, "num_hidden_layers": layers}
        rest = {"intermediate_size": inner, "vocab_size": 32000, "max_position_embeddings": 2048}
        return LlamaConfig(**shape, **rest, dtype="bfloat16"), None
    if "/" not in path and (near := get_close_matches(path, BUILT_IN, n=1, cutoff=0.8)) and not Path(path).exists():
        raise ConfigError(f"model.path={path!r}: there is no such folder; did you mean '{near[0]}'?")
    check_folder(path)
    saved = saved_adapter(path)
    if saved is not None:
        path, revision = str(saved["base_model_name_or_path"]), None
    with naming(KEY if saved is None else f"{KEY}={settings.path!r}: its base"):
        return config_of(path, revision, settings.trust_remote_code), saved


def network(config: Any, kind: str, labels: int, dtype: torch.dtype, settings: ModelSettings) -> Any:
    """The transformers model of a kind, on "meta"; its head in float32, as `load_model` makes it.

    Raises:
        ConfigError: the architecture has no model of this kind.
    """
    import transformers

    config = copy.deepcopy(config)
    auto = transformers.AutoModelForCausalLM
    if kind != "policy":
        config.num_labels = 1 if kind == "score" else labels
        auto = getattr(transformers, f"AutoModelFor{'Sequence' if kind == 'score' else 'Token'}Classification")
    attention = "sdpa" if settings.attention in ("flash_attention_2", "flex_attention") else settings.attention
    options: dict[str, Any] = {"dtype": dtype, "trust_remote_code": settings.trust_remote_code}
    with loading(settings.path, f"a {kind} model cannot be made of its config"), torch.device("meta"):
        try:
            made = auto.from_config(config, attn_implementation=attention, **options)
        except ValueError:
            made = auto.from_config(config, attn_implementation="eager", **options)
    if kind != "policy":
        head = made.score if hasattr(made, "score") else made.classifier
        head.to(torch.promote_types(dtype, torch.float32))
    return made


def shortened(config: Any, layers: int | None) -> Any:
    """The config of the same model with fewer layers."""
    if layers is None:
        return config
    config = copy.deepcopy(config)
    text = config.get_text_config()
    text.num_hidden_layers = layers
    if isinstance(getattr(text, "layer_types", None), list):
        text.layer_types = text.layer_types[:layers]
    return config


class Shapes:
    """A model to be trained, without contents.

    Args:
        config: the transformers config.
        settings, adapter, quantization: as for `load_model`.
        algorithm: decides the heads and the critic.
        dtype: of the weights.
        layers: how many layers to build; None: all.
        saved: the adapter's own config, where the model is an adapter.
        reference: whether the run has a reference policy.
        on_cpu: whether processes compute on CPUs.
        precision: what trained weights are held in and products made in; None: the weights as they are.

    Attributes:
        model: the model, on tensors without contents; to be run inside `mode`.
        parameters: numbers in the base model, heads included, adapters not.
        reference: bytes of a frozen copy of the model, or of the adapter where one is trained further.
    """

    def __init__(
        self,
        config: Any,
        settings: ModelSettings,
        adapter: AdapterKind,
        quantization: QuantizationSettings,
        algorithm: Algorithm,
        dtype: torch.dtype,
        *,
        layers: int | None = None,
        saved: dict[str, Any] | None = None,
        reference: bool = False,
        on_cpu: bool = False,
        precision: Precision | None = None,
    ) -> None:
        self.mode = fake_tensors()
        self.algorithm, kind, trains_base = algorithm, algorithm.model, adapter.trains_base
        config = shortened(config, layers)
        base = network(config, kind, algorithm.labels, dtype, settings)
        if quantization.kind != "none":
            quantise(base, quantization, on_cpu)
        if not settings.dropout:
            remove_dropout(base)
        self.parameters = sum(p.numel() for p in base.parameters())
        with torch.device("meta"):
            base = adapter.apply(base, kind) if saved is None or trains_base else shaped_like(base, saved, kind)
        model = PackedModel(base, None, kind)
        if trains_base:
            freeze(model, settings)
        if settings.gradient_checkpointing:
            model.base.gradient_checkpointing_enable({"use_reentrant": False})
            if not trains_base:
                model.base.enable_input_require_grads()
        self.precision = precision or Precision(None, masters=False, autocasts=True)
        adapters = sum(p.nbytes for p in model.parameters() if p.requires_grad)
        self.reference = 0 if not reference else adapters if saved and not trains_base else 0
        if "value" in algorithm.reads:
            self._add_value_head(model, settings)
        if kind == "score" and "logp" in algorithm.reads:
            causal = network(config, "policy", 1, dtype, settings)
            if causal.get_output_embeddings().weight is causal.get_input_embeddings().weight:
                causal.set_output_embeddings(copy.deepcopy(causal.get_output_embeddings()))
            add_language_head(model, causal)
        frozen = _Copy(model) if reference and trains_base else None
        self.precision.apply(model, frozen, moves_softly=False)  # type: ignore[arg-type]
        if frozen is not None:
            self.reference = sum(p.nbytes for p in frozen.held_in.network.parameters())
        self._materialise(model)
        self.model = model.train()
        self.model.features = Features()
        if settings.layout != "auto":
            self.model.layout = settings.layout
        elif not settings.dropout and use_plans(model.base):
            self.model.layout = "varlen"

    def _add_value_head(self, model: PackedModel, settings: ModelSettings) -> None:
        """As `models.add_value_head`, without contents."""
        own, adapted = self.algorithm.critic == "own", hasattr(model.network, "peft_config")
        if own and adapted and settings.gradient_checkpointing:
            raise ConfigError("model.gradient_checkpointing: not with an adapter and algorithm.critic=own")
        with torch.device("meta"):
            model.value_head = nn.Linear(int(model.config.hidden_size), 1)
            if own and adapted:
                copy_adapter(model.network, CRITIC, trained=True)
            elif own:
                model.critic_decoder = copy.deepcopy(model.decoder)
        model.critic = self.algorithm.critic

    def gather(self) -> None:
        """From what weights are held in to what they are gathered in for a pass, where that is something else."""
        compute = self.precision.compute
        if compute is None or self.precision.autocasts:
            return
        heads = {p for head in self.model.small_heads for p in head.parameters()}
        for parameter in self.model.parameters():
            if parameter.is_floating_point() and parameter not in heads and not hasattr(parameter, "bytes_each"):
                with self.mode:
                    parameter.data = torch.empty(parameter.shape, dtype=compute, device="cpu")

    def _materialise(self, model: nn.Module) -> None:
        """Replace tensors on "meta", which kernels treat unlike any device, by some without contents on the CPU."""
        made: dict[int, Tensor] = {}

        def twin(tensor: Tensor) -> Tensor:
            if id(tensor) not in made:
                with self.mode:
                    empty = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu")
                if isinstance(tensor, nn.Parameter):
                    empty = nn.Parameter(empty, requires_grad=tensor.requires_grad)
                if hasattr(tensor, "bytes_each"):
                    empty.bytes_each = tensor.bytes_each  # type: ignore[attr-defined]
                made[id(tensor)] = empty
            return made[id(tensor)]

        for module in model.modules():
            own: Any = {"recurse": False, "remove_duplicate": False}
            for name, tensor in [*module.named_parameters(**own), *module.named_buffers(**own)]:
                setattr(module, name, twin(tensor))


class _Copy:
    """A reference that is a copy of the model, as `models.Reference` makes it; without a value head."""

    def __init__(self, policy: PackedModel) -> None:
        self.held_in = PackedModel(copy.deepcopy(policy.network), None, policy.kind)
        self.shares_weights = False


# ---------------------------------------------------------------------- linear maps in few bits

NF4_BLOCK, NF4_BLOCKS_OF_CONSTANTS = 64, 256
"""Numbers that share a constant, and constants that share a second one (Dettmers et al. 2023, arXiv:2305.14314)."""


def nf4_bytes(double: bool = True) -> float:
    """Bytes for each number in NF4: half a byte, and its share of a block's constant, in 32 bits; or, quantised once
    more, in 8 bits with a 32-bit constant for 256 of them: 0.127 bits (QLoRA, section 3)."""
    constant = 1 + 4 / NF4_BLOCKS_OF_CONSTANTS if double else 4
    return 0.5 + constant / NF4_BLOCK


class _Dequantised(torch.autograd.Function):
    """x·Wᵀ where W exists only while it is used, forward and backward, as in bitsandbytes; in 8 bits it keeps x."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, keeps_input: bool) -> Tensor:
        ctx.save_for_backward(weight, *((x,) if keeps_input else ()))
        return x @ torch.empty_like(weight, dtype=x.dtype).t()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        weight = ctx.saved_tensors[0]
        return gradient @ torch.empty_like(weight, dtype=gradient.dtype), None, None


class _QuantisedLinear(nn.Linear):
    """A linear map in few bits. One in 4 bits casts what it reads to the dtype of its products, and back."""

    compute: torch.dtype | None

    def forward(self, x: Tensor) -> Tensor:
        y = _Dequantised.apply(x if self.compute is None else x.to(self.compute), self.weight, self.compute is None)
        return (y if self.bias is None else y + self.bias.to(y.dtype)).to(x.dtype)


def quantise(base: Any, settings: QuantizationSettings, on_cpu: bool) -> None:
    """Freeze the base and hold its layers' linear maps in few bits; embeddings and heads stay as they are."""
    compute = {"auto": torch.float32 if on_cpu else torch.bfloat16}.get(settings.compute_dtype)
    compute = compute or getattr(torch, settings.compute_dtype)
    base.requires_grad_(False)
    heads = [getattr(base, name) for name in ("score", "classifier") if hasattr(base, name)]
    kept = {id(m) for head in [*heads, base.get_output_embeddings()] if head is not None for m in head.modules()}
    for found in base.modules():
        if type(found) is not nn.Linear or id(found) in kept:
            continue
        module: Any = found
        int8 = 1 + 4 / module.in_features  # a float32 constant for each row
        module.weight.bytes_each = int8 if settings.kind == "int8" else nf4_bytes(settings.double_quant)
        become(module, _QuantisedLinear)
        module.compute = None if settings.kind == "int8" else compute
    for head in heads:
        head.requires_grad_(True)


def held_bytes(tensor: Tensor) -> float:
    """Bytes of a tensor; of one in few bits with its constants."""
    return tensor.numel() * tensor.bytes_each if hasattr(tensor, "bytes_each") else float(tensor.nbytes)
