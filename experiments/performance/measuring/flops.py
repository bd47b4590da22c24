"""Useful arithmetic of a training step, counted; and how much of it the machine can do in a second, measured."""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch

from alignlab.core import Group
from measuring.work import LORA, Shape

MATMULS = ((2048, 2048, 2048), (4096, 1024, 1024), (2048, 512, 2048), (1024, 256, 32_000), (2048, 256, 688))
"""(rows, inner, columns): square and tall ones, as a model has them."""


def matmul_peak(device: str, dtype: str, seconds: float = 0.4) -> tuple[float, float]:
    """The most FLOP/s over a few matmuls: by the clock on the wall that of the fastest, and by CPU seconds (times the
    threads in use) the mean of the fastest kind."""
    best = best_cpu = 0.0
    for rows, inner, columns in MATMULS if device == "cpu" else ((8192, 8192, 8192), (16384, 4096, 4096)):
        a = torch.randn(rows, inner, device=device, dtype=getattr(torch, dtype))
        b = torch.randn(inner, columns, device=device, dtype=getattr(torch, dtype))
        _ = a @ b
        done = 2.0 * rows * inner * columns
        begun, begun_cpu, count = time.perf_counter(), time.process_time(), 0
        while time.perf_counter() - begun < seconds:
            _wait(device)
            start = time.perf_counter()
            _ = a @ b
            _wait(device)
            best, count = max(best, done / (time.perf_counter() - start)), count + 1
        used = time.process_time() - begun_cpu  # of all: the clock is coarse
        if used > 0 and device == "cpu":
            best_cpu = max(best_cpu, count * done / used * torch.get_num_threads())
    return best, best_cpu


def _wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def linear_parameters(shape: Shape) -> dict[str, int]:
    """Weights of the linear maps of one layer, by name."""
    head = shape.hidden // shape.heads
    narrow = head * shape.key_value_heads
    return {
        "q": shape.hidden * shape.hidden,
        "k": shape.hidden * narrow,
        "v": shape.hidden * narrow,
        "o": shape.hidden * shape.hidden,
        "gate": shape.hidden * shape.intermediate,
        "up": shape.hidden * shape.intermediate,
        "down": shape.hidden * shape.intermediate,
    }


def lora_parameters(shape: Shape) -> int:
    """Weights of the adapter of one layer, on all of its linear maps."""
    head = shape.hidden // shape.heads
    narrow = head * shape.key_value_heads
    ends = 2 * (shape.hidden + shape.hidden) + 2 * (shape.hidden + narrow) + 3 * (shape.hidden + shape.intermediate)
    return LORA["r"] * ends


def attention_entries(groups: Sequence[Group]) -> int:
    """Pairs (token, token it attends to), where each prompt is read once: P(P+1)/2 + ΣC·P + ΣC(C+1)/2 a group."""
    total = 0
    for group in groups:
        prompt = len(group.prompt_ids)
        total += prompt * (prompt + 1) // 2
        for response in group.responses:
            count = len(response.token_ids)
            total += count * prompt + count * (count + 1) // 2
    return total


def step_flops(shape: Shape, groups: Sequence[Group], lora: bool, reference: bool = False) -> float:
    """Multiplications and additions that a step cannot do without.

    Every token once through every linear map, 2 for each weight; as much for the gradient with respect to its input,
    and as much for the gradient of each weight that is trained (with an adapter, the base's are not, and the inputs
    of the first layer's q, k and v need no gradient). Of the last layer, o and the MLP only where a token that bears
    loss is predicted. Attention: 4 for each of its entries and each unit of width forward, 8 backward. Logits: of
    loss-bearing tokens only. Nothing is counted for norms, activations or the softmax.

    Args:
        reference: a frozen model's log-probs of the same tokens are part of the step, forward only, no adapter.
    """
    tokens = sum(g.packed_length for g in groups)
    loss_tokens = sum(r.loss_tokens for g in groups for r in g.responses)
    predicting = sum(1 + sum(r.loss_tokens - 1 for r in g.responses) for g in groups)  # prompts' last tokens once
    maps = linear_parameters(shape)
    base = shape.layers * sum(maps.values()) * tokens
    base -= (maps["o"] + maps["gate"] + maps["up"] + maps["down"]) * (tokens - predicting)
    attention = 4.0 * attention_entries(groups) * shape.hidden * shape.layers
    logits = 2.0 * shape.hidden * shape.vocabulary * loss_tokens
    forward = 2.0 * base + attention + logits
    if lora:
        adapter = shape.layers * lora_parameters(shape) * tokens
        adapter -= LORA["r"] * (2 * shape.hidden + 3 * (shape.hidden + shape.intermediate)) * (tokens - predicting)
        unneeded = (maps["q"] + maps["k"] + maps["v"]) * tokens
        training = forward + 2.0 * (base - unneeded) + 2 * attention + logits + 3 * 2.0 * adapter
    else:
        training = forward + 2 * 2.0 * base + 2 * attention + 2 * logits
    return training + (forward if reference else 0.0)
