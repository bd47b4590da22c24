"""Private API that models use of the libraries below; see `alignlab.core.private_api`. What fails is told in the
model's notes (`PackedModel.notes`)."""

from __future__ import annotations

import copy
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from alignlab.core.private_api import REACHES, Reach, there

# ---------------------------------------------------------------------- torch


def cpu_attention(
    query: Tensor, key: Tensor, value: Tensor, causal: bool, scale: float | None, bias: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Flash attention on a CPU with its log-sum-exps, which the public function does not return.

    Args:
        query: shape (B, H, Q, d).
        key, value: shape (B, H', K, d), H' dividing H.
        bias: added to the scores, shape (B, 1, 1, K).

    Returns:
        shape (B, H, Q, d), and the log-sum-exps of the scores, shape (B, H, Q).
    """
    found: tuple[Tensor, Tensor] = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        query, key, value, 0.0, causal, attn_mask=bias, scale=scale
    )
    return found


def cpu_attention_backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    causal: bool,
    scale: float | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients for query, key and value from that of the output, the output and the log-sum-exps."""
    found: tuple[Tensor, Tensor, Tensor] = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
        grad, query, key, value, out, lse, 0.0, causal, scale=scale
    )
    return found


def _try_cpu_attention() -> None:
    generator = torch.Generator().manual_seed(0)
    query, key, value, grad = torch.randn(4, 1, 2, 5, 8, generator=generator).unbind()
    out, lse = cpu_attention(query, key, value, True, None)
    found = cpu_attention_backward(grad, query, key, value, out, lse, True, None)
    with torch.enable_grad():
        leaves = [x.detach().requires_grad_() for x in (query, key, value)]
        score = (leaves[0] @ leaves[1].transpose(-1, -2) / 8**0.5).masked_fill(
            ~torch.ones(5, 5, dtype=torch.bool).tril(), float("-inf")
        )
        expected = score.softmax(-1) @ leaves[2]
        wanted = torch.autograd.grad(expected, leaves, grad)
    for ours, theirs in [(out, expected), (lse, score.logsumexp(-1)), *zip(found, wanted, strict=True)]:
        torch.testing.assert_close(ours, theirs.detach(), atol=1e-4, rtol=1e-4)


ROWS = 16
"""Numbers of rows that oneDNN is given are multiples of this. For every new number it makes code, which takes a
millisecond and 0.3 MB that it never gives back: with the numbers of a run as they come, a gigabyte."""


def laid_out(weight: Tensor, rows: int) -> Tensor:
    """A float32 weight (outputs, inputs) on a CPU as oneDNN reads it fastest for about so many rows."""
    found: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight, rows)
    return found


def product_with_laid_out(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor | None:
    """x · weightᵀ + bias in float32, without gradient; None where oneDNN has no room for its own code.

    Args:
        x: shape (…, inputs); few rows: they are padded to a multiple of `ROWS`.
        weight: from `laid_out`.
    """
    rows = x.numel() // x.shape[-1]
    padded = nn.functional.pad(x.reshape(rows, -1), (0, 0, 0, -rows % ROWS))
    try:
        found: Tensor = torch.ops.mkldnn._linear_pointwise(padded, weight, bias, "none", [], "")
    except RuntimeError as error:
        if "primitive" not in str(error):
            raise
        return None
    return found[:rows].view(*x.shape[:-1], -1)


def _try_laid_out() -> None:
    generator = torch.Generator().manual_seed(0)
    x, weight = torch.randn(3, 24, generator=generator), torch.randn(8, 24, generator=generator)
    with torch.no_grad():
        found = product_with_laid_out(x, laid_out(weight, ROWS), None)
    assert found is not None
    torch.testing.assert_close(found, x @ weight.t(), atol=1e-4, rtol=1e-4)


def nccl_version() -> tuple[Any, ...]:
    """Of the NCCL that PyTorch has; both ends of a communicator must have the same."""
    return tuple(torch.cuda.nccl.version())  # type: ignore[no-untyped-call]


def nccl_key() -> bytes:
    """A new key by which processes that do not know one another meet: 128 bytes."""
    return bytes(torch.cuda.nccl.unique_id())  # type: ignore[no-untyped-call]


def nccl_group(world: int, key: bytes) -> Any:
    """A communicator on the current GPU in which this process is the first of `world`. Waits until all have come, and
    does what they all do first: add up one number."""
    group = torch.cuda.nccl.init_rank(world, key, 0)  # type: ignore[no-untyped-call]
    one = torch.zeros(1, device="cuda")
    torch.cuda.nccl.all_reduce([one], comms=[group])  # type: ignore[no-untyped-call]
    torch.cuda.current_stream().synchronize()
    return group


def nccl_broadcast(tensors: list[Tensor], group: Any) -> Any:
    """Begin to send tensors to all of a group. Returns the CUDA event of having done so."""
    for tensor in tensors:
        torch.cuda.nccl.broadcast([tensor], comms=[group])  # type: ignore[no-untyped-call]
    done = torch.cuda.Event()
    done.record()
    return done


def _try_nccl() -> None:
    if missing := [name for name in ("version", "unique_id", "init_rank") if not hasattr(torch.cuda.nccl, name)]:
        raise AttributeError(f"torch.cuda.nccl has no {', '.join(missing)}")
    if torch.cuda.is_available() and len(nccl_key()) != 128:
        raise AttributeError("its key has not 128 bytes")


def saved_buffers(module: nn.Module) -> list[tuple[str, Tensor]]:
    """A module's own buffers that are saved with it, by name."""
    return [(n, b) for n, b in module.named_buffers(recurse=False) if n not in module._non_persistent_buffers_set]


def renamed(network: Any) -> bool:
    """Whether transformers gave weights other names or shapes when it loaded this model; it takes them back when it
    saves."""
    return bool(getattr(network, "_weight_conversions", None))


def is_weight(layer: Any) -> bool:
    """Whether a layer is nothing but its weight and bias, which may then be used without calling it."""
    return type(layer) is nn.Linear and not any(
        getattr(layer, hooks, True) for hooks in ("_forward_hooks", "_forward_pre_hooks")
    )


def own_weight(module: nn.Module) -> Any:
    """A module's own weight: an adapter's layer passes on that of the layer below it. None without one."""
    return module._parameters.get("weight")


def become(module: nn.Module, kind: type[nn.Module]) -> None:
    """Make a module one of another class, with all that it holds."""
    module.__class__ = kind


# ---------------------------------------------------------------------- transformers


def attention_of(network: Any) -> str | None:
    """What a transformers model computes attention with: "sdpa", "eager", …"""
    return getattr(network.config, "_attn_implementation", None)


def register_attention(name: str, function: Any) -> None:
    """Make an attention function known to transformers, with the masks of its own "sdpa"."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(name, function)
    AttentionMaskInterface.register(name, sdpa_mask)


def _try_transformers() -> None:
    from transformers import AttentionInterface, AttentionMaskInterface, PretrainedConfig, PreTrainedModel
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.masking_utils import sdpa_mask

    for found in (AttentionInterface.register, AttentionMaskInterface.register, sdpa_attention_forward, sdpa_mask):
        if not callable(found):
            raise AttributeError(f"{found} cannot be called")
    if not hasattr(PreTrainedModel, "set_attn_implementation") or not hasattr(
        PretrainedConfig(), "_attn_implementation"
    ):
        raise AttributeError("the attention of a model cannot be set")


# ---------------------------------------------------------------------- PEFT

LORA_LAYER = (
    *("active_adapters", "base_layer", "disable_adapters", "lora_A", "lora_B", "lora_dropout"),
    *("lora_variant", "merged", "scaling"),
)
"""What we read of PEFT's LoRA layer."""


def _lora_layer() -> Any:
    from peft import LoraConfig, inject_adapter_in_model

    network: Any = inject_adapter_in_model(LoraConfig(r=2, target_modules=["0"]), nn.Sequential(nn.Linear(6, 5)))
    return network[0]


def _try_lora_layers() -> None:
    from peft.tuners.lora import Linear

    generator = torch.Generator().manual_seed(0)
    layer = _lora_layer()
    if type(layer) is not Linear:
        raise AttributeError(f"a LoRA layer is a {type(layer).__name__}")
    if missing := [name for name in LORA_LAYER if not hasattr(layer, name)]:
        raise AttributeError(f"a LoRA layer has no {', '.join(missing)}")
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    x = torch.randn(3, 6, generator=generator)
    with torch.no_grad():
        b.copy_(torch.randn(b.shape, generator=generator))
        merged = torch.addmm(layer.base_layer.weight, b, a, alpha=layer.scaling["default"])
        torch.testing.assert_close(layer(x), nn.functional.linear(x, merged, layer.base_layer.bias))


def plain_lora_layer(module: Any) -> None:
    """PEFT's layer for a quantised base becomes the one for a plain base: the former merges into 4 or 8 bits again."""
    from peft.tuners.lora import Linear
    from transformers.pytorch_utils import Conv1D

    become(module, Linear)
    module.is_target_conv_1d_layer = module.fan_in_fan_out = isinstance(module.base_layer, Conv1D)


def _try_dequantizing() -> None:
    import bitsandbytes.functional as bnb
    from peft.tuners.lora import Linear
    from transformers.pytorch_utils import Conv1D
    from transformers.quantizers.base import HfQuantizer

    there(
        (bnb, "dequantize_4bit"),
        (bnb, "int8_vectorwise_dequant"),
        (HfQuantizer, "remove_quantization_config"),
        (_lora_layer(), "fan_in_fan_out"),
    )
    if not isinstance(Conv1D, type) or not isinstance(Linear, type):
        raise AttributeError("Conv1D or Linear is no class")


# ---------------------------------------------------------------------- bitsandbytes


def same_in_training_and_evaluation(network: nn.Module) -> None:
    """Have quantised layers compute the same with and without gradients. Left to itself, bitsandbytes would on CPUs

    * with AVX512-BF16, once no gradient is wanted, repack a 4-bit layer's weights for a bfloat16 product that later has
      no gradient (and fails where a row is shorter than a block);
    * quantise the inputs of 8-bit layers in evaluation alone.

    Log-probs from before an update, or of the reference, would then not be those that training sees: PPO's ratios
    would not start at 1.
    """
    module: Any
    for module in network.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
        elif type(module).__name__ == "Linear8bitLt":
            module.state.__class__ = _always_training()


@cache
def _always_training() -> type:
    from bitsandbytes import MatmulLtState

    class Training(MatmulLtState):
        """State of an 8-bit layer whose products are always those of training."""

        def __setattr__(self, name: str, value: Any) -> None:
            super().__setattr__(name, True if name == "is_training" else value)

    return Training


def _try_quantized_layers() -> None:
    from bitsandbytes.nn import Linear4bit, Linear8bitLt

    if not hasattr(Linear4bit(64, 2), "support_avx512bf16_for_cpu"):
        raise AttributeError("a 4-bit layer does not say whether it multiplies in bfloat16")
    layer = Linear8bitLt(64, 2, has_fp16_weights=False)
    layer.state = copy.copy(layer.state)
    layer.state.__class__ = _always_training()
    layer.state.is_training = False
    if not layer.state.is_training:
        raise AttributeError("the state of an 8-bit layer has no `is_training`")


# ---------------------------------------------------------------------- start-up


@contextmanager
def spare_deepspeed() -> Iterator[None]:
    """Save a model in the block without importing DeepSpeed, which takes seconds.

    transformers asks accelerate whether the model is an engine of DeepSpeed's; one that is has imported it. Where
    accelerate asks in another way nothing happens, and DeepSpeed is imported.
    """
    from accelerate.utils import other

    if "deepspeed" in sys.modules or not hasattr(other, "is_deepspeed_available"):
        yield
        return
    former = other.is_deepspeed_available
    other.is_deepspeed_available = lambda: False
    try:
        yield
    finally:
        other.is_deepspeed_available = former


REACHES |= {
    "attention on CPUs": Reach(
        "torch",
        ("2.13",),
        "_scaled_dot_product_flash_attention_for_cpu",
        _try_cpu_attention,
        "attention goes through a mask of all pairs",
    ),
    "laid-out weights": Reach(
        "torch",
        ("2.13",),
        "mkldnn._reorder_linear_weight and mkldnn._linear_pointwise",
        _try_laid_out,
        "products with few rows, as in sampling, are made as by torch.nn.functional.linear",
    ),
    "NCCL": Reach(
        "torch",
        ("2.13", "2.14"),
        "cuda.nccl.unique_id and init_rank",
        _try_nccl,
        "weights get to vLLM on other GPUs by files",
    ),
    "attention of transformers": Reach(
        "transformers",
        ("5.23",),
        "masking_utils.sdpa_mask and config._attn_implementation",
        _try_transformers,
        "attention goes through a mask of all pairs",
    ),
    "LoRA layers": Reach(
        "peft", ("0.21",), "the class of LoRA layers", _try_lora_layers, "LoRA layers multiply in three products"
    ),
    "quantised layers": Reach(
        "bitsandbytes",
        ("0.50",),
        "the state of quantised layers",
        _try_quantized_layers,
        "a quantised base may compute log-probs in evaluation that are not those of training",
    ),
    "dequantising": Reach(
        "bitsandbytes",
        ("0.50",),
        "the layers of a quantised base under an adapter",
        _try_dequantizing,
        "an adapter on a quantised base cannot be merged: save the adapter",
    ),
}
