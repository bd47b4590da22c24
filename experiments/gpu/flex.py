"""FlexAttention over 30 lengths and 3 models by turns: how often it is compiled, and how far it is from the definition.

    python experiments/gpu/flex.py             # on a GPU where there is one, else on a CPU through inductor
    python experiments/gpu/flex.py --shared    # beside it: one compiled function for all models, rows not padded

On a CPU inductor has the forward pass alone; on a GPU gradients are compared too.
"""

from __future__ import annotations

import argparse
import random
import time
from unittest.mock import patch

import torch
from torch import Tensor

from alignlab.core import Group, Response
from alignlab.models import attention
from alignlab.models.packing import Rows, lay_out

MODELS = {
    "policy": (14, 2, 64, torch.bfloat16),
    "critic": (8, 2, 64, torch.float32),
    "reward model": (4, 1, 64, torch.float32),
}
"""Heads, heads of keys, size of a head, dtype."""

LENGTHS = (256, 512, 1024, 1792, 70, 127, 128, 129, 255, 257)
"""As many blocks as one of the models has heads, first; then both sides of a block and of two."""


def shapes(most: int) -> list[Rows]:
    rng = random.Random(0)
    lengths = [*LENGTHS, *(rng.randrange(2, most) for _ in range(30 - len(LENGTHS)))]
    return [rows_of(length, rng) for length in lengths]


def rows_of(length: int, rng: random.Random) -> Rows:
    """A row of so many tokens: groups of a trunk and one or two branches."""
    groups, left = [], length
    while left:
        whole = min(left, rng.randrange(1, 700))
        trunk = rng.randrange(1, whole + 1)
        first = rng.randrange(0, whole - trunk + 1)
        groups.append(Group([5] * trunk, [Response([5] * n) for n in (first, whole - trunk - first)]))
        left -= whole
    return lay_out(groups, "varlen")


def dense(query: Tensor, key: Tensor, value: Tensor, rows: Rows) -> Tensor:
    repeat = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(repeat, 1), value.repeat_interleave(repeat, 1)
    scores = query @ key.transpose(-1, -2) * query.shape[-1] ** -0.5
    return (scores.masked_fill(~rows.attention(), -torch.inf).softmax(-1) @ value).transpose(1, 2)


class Unpadded:
    """Rows as long as they are, by one function for all."""

    compiled = None

    def __init__(self, rows: Rows) -> None:
        from torch.nn.attention.flex_attention import create_block_mask, flex_attention

        if Unpadded.compiled is None:
            Unpadded.compiled = torch.compile(flex_attention, dynamic=True)
        group, branch = rows.group_RL[0], rows.branch_RL[0]

        def allowed(_batch: Tensor, _head: Tensor, q: Tensor, k: Tensor) -> Tensor:
            return (q >= k) & (group[q] == group[k]) & ((branch[k] == 0) | (branch[q] == branch[k]))

        length = len(group)
        self.mask = create_block_mask(allowed, None, None, length, length, device=group.device)

    def attend(self, _: None, query: Tensor, key: Tensor, value: Tensor, scaling: float | None) -> Tensor:
        assert Unpadded.compiled is not None
        found: Tensor = Unpadded.compiled(query, key, value, block_mask=self.mask, scale=scaling, enable_gqa=True)
        return found.transpose(1, 2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shared", action="store_true")
    parser.add_argument("--longest", type=int)
    asked = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    grad = device.type == "cuda"
    counters = torch._dynamo.utils.counters["stats"]
    made, worst, seconds = dict.fromkeys(MODELS, 0), dict.fromkeys(MODELS, 0.0), dict.fromkeys(MODELS, 0.0)
    generator = torch.Generator().manual_seed(0)
    with patch.object(attention, "ON_CPU", "flex"):
        for rows in shapes(asked.longest or (8192 if grad else 2048)):
            rows, length = rows.to(device), rows.input_ids_RL.shape[1]
            plan = Unpadded(rows) if asked.shared else attention.plan_of(rows)
            for name, (heads, shared, size, dtype) in MODELS.items():
                query, key, value = (
                    torch.randn(1, length, h, size, generator=generator).to(device, dtype).transpose(1, 2)
                    for h in (heads, shared, shared)
                )
                inputs = [x.requires_grad_(grad) for x in (query, key, value)]
                before, start = counters["unique_graphs"], time.perf_counter()
                found = plan.attend(None, *inputs, None)
                seconds[name] += time.perf_counter() - start if counters["unique_graphs"] > before else 0
                made[name] += counters["unique_graphs"] - before
                expected = dense(*(x.double() for x in inputs), rows)
                pairs = [(found, expected)]
                if grad:
                    weight = torch.randn(found.shape, generator=generator).to(device)
                    grads = (torch.autograd.grad((x * weight).sum(), inputs) for x in (found, expected))
                    pairs += list(zip(*grads, strict=True))
                worst[name] = max(worst[name], *(float((a.double() - b).abs().max()) for a, b in pairs))
    print(
        f"torch {torch.__version__}, {device}, 30 lengths, {'one function' if asked.shared else 'a function a model'}"
    )
    print("| model | heads | compiled | seconds of it | largest error |\n|---|---|---|---|---|")
    for name, (heads, shared, size, dtype) in MODELS.items():
        kind = f"{heads} × {size}, {shared} of keys, {str(dtype).removeprefix('torch.')}"
        print(f"| {name} | {kind} | {made[name]} | {seconds[name]:.1f} | {worst[name]:.1e} |")


if __name__ == "__main__":
    main()
