"""One update on a group of responses: ours, the same loss by plain padded rows, and TRL's GRPO trainer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from measuring.parts.ablation import OFF, WHOLE
from measuring.processes import Case
from measuring.report import Measured, Part, Summary, Wanted, comparison, rows
from measuring.work import Scale, group_batches

KL = 0.04
PLAIN, THEIRS = 4.0, 5.0
"""Wanted against plain rows, and against TRL."""


def ours(scale: Scale, algorithm: str, options: dict[str, Any]) -> dict[str, Any]:
    from alignlab.algorithms.grpo import GRPO
    from alignlab.algorithms.rrhf import RRHF
    from measuring.ours import ranked_groups, train

    chosen = GRPO(kl_coef=KL) if algorithm == "grpo" else RRHF()
    return train(scale, chosen, ranked_groups(group_batches(scale)), options)


def theirs(scale: Scale, options: dict[str, Any]) -> dict[str, Any]:
    from measuring.theirs import grpo

    return grpo(scale, options, KL)


def work_of(algorithm: str, scale: Scale) -> str:
    responses, prompt, most = scale.group
    return f"{algorithm.upper()}, one group of {responses}, P = {prompt}, C ≤ {most}"


def cases(scale: Scale) -> list[Case]:
    found = []
    for name in ("rrhf", "grpo"):
        work = work_of(name, scale)
        plain = {"model": {"layout": "plain"}}
        # What one writes without thinking of speed: a padded row each, the network's own logits of every token.
        usual = plain | {"features": OFF, "whole_logits": True, "training": {"max_tokens_per_microbatch": WHOLE}}
        found += [
            Case("ours", "alignlab, defaults", work, ours, {"algorithm": name, "options": {}}, base=True),
            Case("usual", "plain padded rows", work, ours, {"algorithm": name, "options": usual}, slow=True),
            Case("plain", "plain padded rows, all else as ours", work, ours, {"algorithm": name, "options": plain}),
        ]
    for key, label, config in (
        ("defaults", "TRL, the same loss, defaults otherwise", {}),
        ("fast", "TRL, the same loss, no gradient checkpointing", {"gradient_checkpointing": False}),
    ):
        options = {"options": {"config": config}}
        found.append(Case(key, label, work_of("grpo", scale), theirs, options, slow=True, needs="trl"))
    return found


def summarise(scale: Scale, cases: Sequence[Case], measured: Sequence[Measured]) -> Summary:
    made = rows(cases, measured)
    wanted = [Wanted(work_of(name, scale), "usual", PLAIN) for name in ("rrhf", "grpo")]
    wanted += [Wanted(work_of("grpo", scale), key, THEIRS) for key in ("defaults", "fast")]
    return comparison("group", made, wanted, 1e-5 if scale.dtype == "float32" else 0.05)


PART = Part("group", "One update on a group of responses", cases, summarise)
