"""How much of the machine's measured matmul peak a training step reaches, useful arithmetic alone being counted."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import median
from typing import Any

from measuring.processes import Case
from measuring.report import Measured, Part, Summary, Target
from measuring.work import BETA, END, Scale, Shape, Words

WANTED, FROM_HIDDEN = 0.7, 512


def ours(scale: Scale, number: int, adapter: str, algorithm: str, options: dict[str, Any]) -> dict[str, Any]:
    from alignlab.algorithms.dpo import DPO
    from alignlab.algorithms.sft import SFT
    from alignlab.core import Group, Response
    from measuring.flops import matmul_peak, step_flops
    from measuring.ours import train

    shape = scale.widths[number]
    groups, responses, prompt, response = scale.tokens
    words = Words(shape.vocabulary, seed=2)

    def group() -> Group:
        columns = [{"score": float(k)} for k in range(responses)]
        made = [Response([*words.ids(response - 1), END], columns=dict(c)) for c in columns]
        return Group(words.ids(prompt), made)

    batches = [[group() for _ in range(groups)] for _ in range(1 + scale.steps)]
    peaks = [matmul_peak(scale.device, scale.dtype)]
    chosen = DPO(beta=BETA) if algorithm == "dpo" else SFT()
    found = train(scale, chosen, batches, {**options, "adapter": adapter}, shape=shape)
    peaks.append(matmul_peak(scale.device, scale.dtype))
    flops = step_flops(shape, batches[0], lora=adapter == "lora", reference=algorithm == "dpo")
    return found | {"flops": flops, "peak": max(p for p, _ in peaks), "peak_cpu": max(p for _, p in peaks)}


def work_of(shape: Shape) -> str:
    return f"hidden {shape.hidden}, {shape.layers} layers"


def cases(scale: Scale) -> list[Case]:
    found = []
    for number, shape in enumerate(scale.widths):
        for adapter, algorithm in (("lora", "sft"), ("none", "sft"), *((("lora", "dpo"),) if number == 0 else ())):
            what = "LoRA" if adapter == "lora" else "all weights"
            options = {"number": number, "adapter": adapter, "algorithm": algorithm, "options": {}}
            found.append(
                Case(f"{adapter}-{algorithm}", f"{algorithm.upper()}, {what}", work_of(shape), ours, options, slow=True)
            )
    return found


def summarise(scale: Scale, cases: Sequence[Case], measured: Sequence[Measured]) -> Summary:
    summary = Summary(table=["| model | step | GFLOP, useful | seconds | GFLOP/s | peak GFLOP/s | share | by CPU s |"])
    summary.table.append("|:--|:--|" + "--:|" * 6)
    wide = {work_of(s) for s in scale.widths if s.hidden >= FROM_HIDDEN}
    shares: dict[str, float] = {}
    for case in cases:
        runs = [m.figures for m in measured if (m.work, m.key) == (case.work, case.key)]
        failed = [m["failed"] for m in runs if "failed" in m]
        summary.problems += [f"share: {case.work}, {case.label}: {f.strip().splitlines()[-1]}" for f in failed]
        good = [m for m in runs if "failed" not in m]
        share = cpu = math.nan
        if good:
            wall = [m["flops"] / median(m["seconds"]) for m in good]
            share = median(w / m["peak"] for w, m in zip(wall, good, strict=True))
            used = [m["flops"] / median(m["cpu_seconds"]) * scale.threads for m in good]
            cpu = median(u / m["peak_cpu"] if m["peak_cpu"] else math.nan for u, m in zip(used, good, strict=True))
            seconds, peak = median(median(m["seconds"]) for m in good), max(m["peak"] for m in good)
            summary.table.append(
                f"| {case.work} | {case.label} | {good[0]['flops'] / 1e9:.0f} | {seconds:.3f} | "
                f"{median(wall) / 1e9:.0f} | {peak / 1e9:.0f} | {100 * share:.0f} % | {100 * cpu:.0f} % |"
            )
        shares[f"{case.work}, {case.label}"] = share
        if case.work in wide or scale.small:
            against = f"{case.label}: the matmul peak"
            summary.targets.append(Target("share", case.work, against, "share", WANTED, share, cpu))
    summary.more["shares"] = shares
    return summary


PART = Part("share", "Share of the measured matmul peak", cases, summarise)
