"""What each technique buys, one after the other: a DPO step on prompts of different lengths."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from measuring.processes import Case
from measuring.report import Measured, Part, Summary, comparison, rows, seconds, times
from measuring.work import BETA, Pair, Scale, Words

OFF = dict.fromkeys(("segments", "eager_grad", "fused_lora"), False)
WHOLE = 1 << 40
"""A budget of tokens that everything fits into."""

STEPS: dict[str, tuple[str, dict[str, Any]]] = {
    "plain": ("plain: padded rows, logits [R, L, V]", {"layout": "plain", "logits": "all", "budget": WHOLE}),
    "completion": (
        "+ logits of response tokens only",
        {"layout": "plain", "logits": "completion", "budget": WHOLE},
    ),
    "chunks": ("+ in chunks, recomputed backward", {"layout": "plain", "budget": WHOLE}),
    "branches": ("+ trunk and branches", {"budget": WHOLE}),
    "budget": ("+ token budget (2,048)", {}),
    "segments": ("+ attention in segments, without mask", {"layout": "auto", "on": ["segments"]}),
    "eager": ("+ log-probs' gradient made in the forward pass", {"layout": "auto", "on": ["segments", "eager_grad"]}),
    "fused": ("+ base and adapter in one product", {"layout": "auto", "on": ["segments", "eager_grad", "fused_lora"]}),
}
"""Key → label, and what the step is measured with; each has all of those before it."""


def batches(scale: Scale) -> list[list[Pair]]:
    """Pairs whose prompts are from a third of the longest prompt on."""
    words, longest = Words(scale.model.vocabulary, seed=3), max(scale.prompts)
    return [
        [
            {
                "prompt": words.ids(words.number(longest // 7, longest)),
                "chosen": words.response(scale.response),
                "rejected": words.response(scale.response),
            }
            for _ in range(scale.pairs)
        ]
        for _ in range(1 + scale.steps)
    ]


def ours(
    scale: Scale, layout: str = "packed", logits: str = "chunks", budget: int = 2048, on: Sequence[str] = ()
) -> dict[str, Any]:
    from alignlab.algorithms.dpo import DPO
    from alignlab.models import log_probs
    from measuring import ours as side

    if logits == "completion":
        log_probs.CHUNK_ELEMENTS = WHOLE  # one chunk of everything
    options = {
        "model": {"layout": layout},
        "training": {"max_tokens_per_microbatch": budget},
        "features": OFF | dict.fromkeys(on, True),
        "whole_logits": logits == "all",
    }
    return side.train(scale, DPO(beta=BETA), side.pair_groups(batches(scale)), options)


def cases(scale: Scale) -> list[Case]:
    work = f"DPO, prompts of {max(scale.prompts) // 7} to {max(scale.prompts)}, {scale.pairs} pairs"
    slow = ("plain", "completion", "chunks")
    return [
        Case(key, label, work, ours, options, base=key == "plain", slow=key in slow)
        for key, (label, options) in STEPS.items()
    ]


def summarise(scale: Scale, cases: Sequence[Case], measured: Sequence[Measured]) -> Summary:
    made = rows(cases, measured)
    summary = comparison("ablation", made, [], 1e-4 if scale.dtype == "float32" else 0.05)
    head = "| | seconds | tokens/s | speed | by CPU s | this step | MB above the model | memory |"
    summary.table = [head, "|:--|" + "--:|" * 7]
    before = math.nan
    for row in made:
        summary.table.append(
            f"| {row.label} | {seconds(row.seconds)} | {row.tokens_per_second:,.0f} | {times(1 / row.seconds_ratio)} | "
            f"{times(1 / row.cpu_ratio)} | {times(before / row.cpu_seconds)} | {row.above_mb:,.0f} | "
            f"{times(row.memory_ratio)} |"
        )
        before = row.cpu_seconds
    return summary


PART = Part("ablation", "What each technique buys, cumulative", cases, summarise)
