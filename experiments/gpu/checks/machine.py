"""What is installed, and FlexAttention against the definition."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import platform
import random
import subprocess
import time
from typing import Any

import flex as study
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from checks.work import Say, Size

PACKAGES = (
    *("torch", "triton", "transformers", "peft", "accelerate", "deepspeed", "bitsandbytes", "vllm", "flash_attn"),
    *("liger_kernel", "alignlab"),
)


def versions(size: Size, say: Say) -> None:
    found: dict[str, Any] = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    say(**found)
    flex_attention = importlib.util.find_spec("torch.nn.attention.flex_attention") is not None
    if not size.on_gpu:
        say(device="cpu", threads=torch.get_num_threads(), flex_attention=flex_attention)
        return
    asked = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        driver = subprocess.run(asked, capture_output=True, text=True).stdout.split("\n")[0]
    except OSError as error:
        driver = str(error)
    card = torch.cuda.get_device_properties(0)
    say(
        device=card.name,
        driver=driver,
        cuda=torch.version.cuda,
        cudnn=torch.backends.cudnn.version(),
        nccl=".".join(map(str, torch.cuda.nccl.version())),
        capability=f"{card.major}.{card.minor}",
        memory_mb=round(card.total_memory / 1e6),
        shared_memory_per_block=getattr(card, "shared_memory_per_block_optin", None),
        bfloat16=torch.cuda.is_bf16_supported(including_emulation=False),
        flash_sdp=torch.backends.cuda.is_flash_attention_available(),
        flex_attention=flex_attention,
    )


def flex(size: Size, say: Say) -> None:
    """Rows of every length by the package's own plan. The yardstick of its error is SDPA's with a mask of all pairs,
    in the same dtype; both are measured against float64. On a CPU there is no backward pass."""
    from alignlab.models import attention

    if not size.on_gpu:
        attention.ON_CPU = "flex"
    torch.set_float32_matmul_precision("highest")
    for name, width, shared in size.variants:
        made = 0
        for length in size.lengths:
            made += _row(size, say, name, width, shared, length, made)


def _row(size: Size, say: Say, name: str, width: int, shared: int, length: int, made: int) -> int:
    """Reports one length; how many graphs were compiled for it.

    Args:
        made: how many were before, for other lengths.
    """
    from alignlab.models import attention

    dtype, heads, grad = getattr(torch, name), size.heads[shared], size.on_gpu
    counters = torch._dynamo.utils.counters["stats"]
    rows = study.rows_of(length, random.Random(length)).to(torch.device(size.device))
    generator = torch.Generator(size.device).manual_seed(length)

    def draw(count: int) -> Tensor:
        return torch.randn(1, length, count, width, generator=generator, device=size.device)

    inputs = [draw(n).to(dtype).transpose(1, 2) for n in (heads, heads // shared, heads // shared)]
    weight, plan, mask = draw(heads), attention.plan_of(rows), rows.attention()

    def by_flex() -> list[Tensor]:
        return _passes(lambda x: plan.attend(None, *x, None), inputs, weight, grad)

    def masked(x: list[Tensor]) -> Tensor:
        repeated = [x[0], *(y.repeat_interleave(shared, 1) for y in x[1:])]  # as transformers does
        return scaled_dot_product_attention(*repeated, attn_mask=mask).transpose(1, 2)

    def by_mask() -> list[Tensor]:
        return _passes(masked, inputs, weight, grad)

    before, start = counters["unique_graphs"], time.perf_counter()
    found = by_flex()
    _wait(size)
    seconds, compiled = time.perf_counter() - start, counters["unique_graphs"] - before
    expected = _expected(inputs, weight, mask, grad)
    ours = [_distance(a, b) for a, b in zip(found, expected, strict=True)]
    plain = [_distance(a, b) for a, b in zip(by_mask(), expected, strict=True)]
    del found, expected
    wrong = [f"{a:.1e} for {b:.1e}" for a, b in zip(ours, plain, strict=True) if not a <= 4 * b + 1e-6]
    if made and compiled:
        wrong.append("compiled anew for another length")
    say(
        dtype=name,
        head=width,
        heads=heads,
        shared_by=shared,
        tokens=length,
        ok=not wrong,
        **({"reason": "; ".join(wrong)} if wrong else {}),
        compiled=compiled,
        **({"compile_seconds": round(seconds, 1)} if compiled else {}),
        error=ours,
        error_of_mask=plain,
        **_cost(by_flex, size, ""),
        **_cost(by_mask, size, "mask_"),
    )
    return int(compiled)


def _passes(attend: Any, inputs: list[Tensor], weight: Tensor, grad: bool) -> list[Tensor]:
    """The output, and the gradients of query, key and value where there are any."""
    leaves = [x.detach().requires_grad_(grad) for x in inputs]
    out = attend(leaves)
    if not grad:
        return [out]
    return [out, *torch.autograd.grad((out * weight).sum(), leaves)]


def _expected(inputs: list[Tensor], weight: Tensor, mask: Tensor, grad: bool) -> list[Tensor]:
    """By the definition in float64, a head at a time: no more than a few matrices of all pairs are held."""
    query, key, value = (x.detach().double() for x in inputs)
    shared = query.shape[1] // key.shape[1]
    out = torch.empty_like(weight, dtype=torch.float64)
    grads = [torch.zeros_like(x) for x in (query, key, value)]
    for h in range(query.shape[1]):
        places = (h, h // shared, h // shared)
        parts = [x[:, n : n + 1].clone().requires_grad_(grad) for x, n in zip((query, key, value), places, strict=True)]
        scores = (parts[0] @ parts[1].transpose(-1, -2) * query.shape[-1] ** -0.5).masked_fill(~mask, -torch.inf)
        one = (scores.softmax(-1) @ parts[2]).transpose(1, 2)
        out[:, :, h] = one[:, :, 0].detach()
        if grad:
            found = torch.autograd.grad((one * weight[:, :, h : h + 1]).sum(), parts)
            for whole, part, n in zip(grads, found, places, strict=True):
                whole[:, n] += part[:, 0]
    return [out, *grads] if grad else [out]


def _distance(found: Tensor, expected: Tensor) -> float:
    """The largest difference, as a part of the largest number."""
    return float(f"{float((found.double() - expected).abs().max() / expected.abs().max()):.2e}")


def _wait(size: Size) -> None:
    if size.on_gpu:
        torch.cuda.synchronize()


def _cost(work: Any, size: Size, name: str) -> dict[str, float]:
    """Milliseconds of the fastest of a few, and on a GPU the most memory above what was held, in MB."""
    _wait(size)
    if size.on_gpu:
        held = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
    best = float("inf")
    for _ in range(5 if size.on_gpu else 2):
        start = time.perf_counter()
        work()
        _wait(size)
        best = min(best, time.perf_counter() - start)
    found = {f"{name}ms": round(best * 1000, 2)}
    if size.on_gpu:
        found[f"{name}peak_mb"] = round((torch.cuda.max_memory_allocated() - held) / 1e6, 1)
    return found
