"""How cost grows with a group's responses K, its prompt P, their length C, and with the number of groups: 16-fold."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import median
from typing import Any

from measuring.processes import Case
from measuring.report import Measured, Part, Summary, Target, seconds
from measuring.work import END, LEARNING_RATE, Scale, Words

FACTORS = (1, 2, 4, 8, 16)
WANTED = 1.2
"""Largest exponent of seconds in tokens that is called linear: attention to the prompt is in it."""
BUDGET = 8192
"""Tokens of a micro-batch, the same throughout."""
NAMES = ("groups", "K", "P", "C")


def ours(scale: Scale, varied: int, options: dict[str, Any]) -> dict[str, Any]:
    """Seconds and peak memory of a training step for each factor; one process, so that they compare."""
    import time

    import torch

    from alignlab.algorithms.sft import SFT
    from alignlab.core import Group, Response
    from alignlab.training.distributed.engine import make_engine
    from alignlab.training.distributed.processes import Processes
    from alignlab.training.settings import DistributedSettings
    from alignlab.training.step import run_batch
    from measuring.gauge import Gauge, peak_mb, reset_peak, settle
    from measuring.ours import load

    words, model, processes = Words(scale.model.vocabulary, seed=9), load(scale, options), Processes()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=LEARNING_RATE)
    engine = make_engine(DistributedSettings(), model, optimizer, processes, 1.0)
    model.train()
    points = []
    gauge = Gauge(scale.device)
    gauge.loaded()
    gauge.start()
    for factor in (1, *FACTORS):  # the first time is warm-up: an optimiser has no state before its first step
        sizes = list(scale.growth)
        sizes[varied] *= factor
        count, responses, prompt, length = sizes
        groups = [
            Group(words.ids(prompt), [Response([*words.ids(length - 1), END]) for _ in range(responses)])
            for _ in range(count)
        ]
        took, used = [], []
        settle()
        held = reset_peak(scale.device)
        for repeat in range(4 if factor < 4 else 3):
            start, cpu = time.perf_counter(), time.process_time()
            run_batch(groups, algorithm=SFT(), engine=engine, max_tokens_per_microbatch=BUDGET)
            engine.step()
            if scale.device == "cuda":
                torch.cuda.synchronize()
            if repeat:
                took.append(time.perf_counter() - start)
                used.append(time.process_time() - cpu)
        points.append(
            {
                "factor": factor,
                "tokens": count * (prompt + responses * length),
                "plain_tokens": count * responses * (prompt + length),
                "seconds": median(took),
                "cpu_seconds": median(used),
                "above_mb": peak_mb(scale.device) - held,
            }
        )
    gauge.step()
    del points[0]
    return {"points": points, "cores_of_others": gauge.result()["cores_of_others"]}


def exponent(x: Sequence[float], y: Sequence[float]) -> float:
    """Of the power law y = a·x^b that fits best, by least squares of the logarithms."""
    xs, ys = [math.log(v) for v in x], [math.log(v) for v in y]
    mean_x, mean_y = sum(xs) / len(xs), sum(ys) / len(ys)
    covariance = sum((a - mean_x) * (b - mean_y) for a, b in zip(xs, ys, strict=True))
    return covariance / sum((a - mean_x) ** 2 for a in xs)


def cases(scale: Scale) -> list[Case]:
    groups, responses, prompt, length = scale.growth
    found = []
    for number, name in enumerate(NAMES):
        start, end = scale.growth[number], scale.growth[number] * FACTORS[-1]
        rest = {"groups": groups, "K": responses, "P": prompt, "C": length}
        fixed = ", ".join(f"{k} = {v}" for k, v in rest.items() if k != name)
        label = f"{name} from {start} to {end} ({fixed})"
        found.append(Case(name, label, "growth", ours, {"varied": number, "options": {}}))
    return found


def summarise(scale: Scale, cases: Sequence[Case], measured: Sequence[Measured]) -> Summary:
    head = "| grows | tokens | as plain rows | seconds | exponent | MB above the model | exponent |"
    summary = Summary(table=[head, "|:--|" + "--:|" * 6])
    for case in cases:
        runs = [m.figures for m in measured if m.key == case.key]
        failed = [m["failed"] for m in runs if "failed" in m]
        summary.problems += [f"growth: {case.label}: {f.strip().splitlines()[-1]}" for f in failed]
        points = [m["points"] for m in runs if "failed" not in m]
        wall = cpu = math.nan
        if points:
            tokens = [p["tokens"] for p in points[0]]
            plain = [p["plain_tokens"] for p in points[0]]
            middle = {
                name: [median(run[i][name] for run in points) for i in range(len(FACTORS))]
                for name in ("seconds", "cpu_seconds", "above_mb")
            }
            wall, cpu = exponent(tokens, middle["seconds"]), exponent(tokens, middle["cpu_seconds"])
            memory = exponent(tokens, [max(m, 0.1) for m in middle["above_mb"]])
            took, held = middle["seconds"], middle["above_mb"]
            summary.table.append(
                f"| {case.label} | {tokens[0]:,} to {tokens[-1]:,} | {plain[0]:,} to {plain[-1]:,} | "
                f"{seconds(took[0])} to {seconds(took[-1])} | {wall:.2f} | {held[0]:,.0f} to {held[-1]:,.0f} | "
                f"{memory:.2f} |"
            )
            summary.more[case.key] = {"tokens": tokens, "plain_tokens": plain, **middle}
        against = "seconds as a power of the tokens P + K·C" if case.key != "groups" else "seconds as a power of groups"
        summary.targets.append(Target("growth", case.key, against, "exponent", WANTED, wall, cpu, at_least=False))
    return summary


PART = Part("growth", "Growth of cost over a factor of 16", cases, summarise)
