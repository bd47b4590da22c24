"""Peak memory of PPO and of SFT on the same base in 4 bits: the critic is a head on the policy's trunk."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from statistics import median
from typing import Any

from measuring.parts.ppo import iteration
from measuring.processes import Case
from measuring.report import Measured, Part, Summary, Target
from measuring.work import END, Scale, Words

WANTED = 1.3
BUDGET = 2048
"""Tokens of a micro-batch, sampling included."""
OPTIONS = {
    "quantization": {"kind": "nf4"},
    "training": {"max_tokens_per_microbatch": BUDGET},
    "rollout": {"max_batch_tokens": BUDGET},
}


def work(scale: Scale) -> Scale:
    """PPO on a quarter of the prompts, one epoch."""
    prompts, prompt, new, _ = scale.ppo
    return replace(scale, ppo=(prompts // 4, prompt, new, 1))


def ppo(scale: Scale) -> dict[str, Any]:
    return _held(iteration(work(scale), "shared", OPTIONS, scale.quantized), scale)


def sft(scale: Scale) -> dict[str, Any]:
    from alignlab.algorithms.sft import SFT
    from alignlab.core import Group, Response
    from measuring.ours import train

    prompts, prompt, new, _ = work(scale).ppo
    words = Words(scale.quantized.vocabulary, seed=8)
    batches = [
        [Group(words.ids(prompt), [Response([*words.ids(new - 1), END])]) for _ in range(prompts)] for _ in range(2)
    ]
    return _held(train(scale, SFT(), batches, OPTIONS, shape=scale.quantized), scale)


def _held(found: dict[str, Any], scale: Scale) -> dict[str, Any]:
    """With the memory of the model itself, as it is held."""
    from measuring.ours import load

    model = load(scale, OPTIONS, shape=scale.quantized)
    return found | {"model_mb": sum(p.nbytes for p in [*model.parameters(), *model.buffers()]) / 1e6}


def work_of(scale: Scale) -> str:
    prompts, prompt, new, _ = work(scale).ppo
    return f"hidden {scale.quantized.hidden}, {prompts} prompts, P = {prompt}, C = {new}, NF4"


def cases(scale: Scale) -> list[Case]:
    return [
        Case("sft", "SFT", work_of(scale), sft, base=True, slow=True),
        Case("ppo", "PPO, sampling included", work_of(scale), ppo, slow=True),
    ]


def summarise(scale: Scale, cases: Sequence[Case], measured: Sequence[Measured]) -> Summary:
    summary = Summary(table=["| | model MB | above it, MB | together |", "|:--|--:|--:|--:|"])
    peaks: dict[str, tuple[float, float]] = {}
    for case in cases:
        runs = [m.figures for m in measured if m.key == case.key]
        summary.problems += [f"ppo_memory: {case.label}: {m['failed'].splitlines()[-1]}" for m in runs if "failed" in m]
        good = [m for m in runs if "failed" not in m]
        if good:
            held, above = (median(m[name] for m in good) for name in ("model_mb", "above_mb"))
            peaks[case.key] = above, held + above
            summary.table.append(f"| {case.label} | {held:,.0f} | {above:,.0f} | {held + above:,.0f} |")
    for number, against in ((1, "SFT, model and what is above it"), (0, "SFT, what is above the model")):
        ratio = peaks["ppo"][number] / peaks["sft"][number] if len(peaks) == 2 else math.nan
        summary.targets.append(Target("ppo_memory", work_of(scale), against, "memory", WANTED, ratio, at_least=False))
    return summary


PART = Part("ppo_memory", "PPO's memory beside SFT's on a base in 4 bits", cases, summarise)
