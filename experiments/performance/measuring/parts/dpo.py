"""A DPO step: the reference's log-probs, the policy's passes, the update; on the pairs that TRL's trainer gets."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from measuring.processes import Case
from measuring.report import Measured, Part, Summary, Wanted, comparison, rows
from measuring.work import BETA, Scale, pair_batches

SPEED = {0: 9.0, 1: 12.0}
"""Wanted at the first and the second length of prompts."""
MEMORY = 0.15


def ours(scale: Scale, prompt: int, options: dict[str, Any]) -> dict[str, Any]:
    from alignlab.algorithms.dpo import DPO
    from measuring.ours import pair_groups, train

    return train(scale, DPO(beta=BETA), pair_groups(pair_batches(scale, prompt)), options)


def theirs(scale: Scale, prompt: int, options: dict[str, Any]) -> dict[str, Any]:
    from measuring.theirs import dpo

    return dpo(scale, prompt, options)


def work_of(prompt: int, scale: Scale) -> str:
    return f"P = {prompt}, C ≤ {scale.response}, {scale.pairs} pairs"


def cases(scale: Scale) -> list[Case]:
    plain = {"gradient_checkpointing": False}
    found = []
    for number, prompt in enumerate(scale.prompts):
        work, here = work_of(prompt, scale), {"prompt": prompt}
        found += [
            Case("ours", "alignlab, defaults", work, ours, {**here, "options": {}}, base=True),
            Case("defaults", "TRL, defaults", work, theirs, {**here, "options": {}}, slow=True, needs="trl"),
            Case(
                "best",
                "TRL, no gradient checkpointing, reference precomputed",
                work,
                theirs,
                {**here, "options": {"config": plain | {"precompute_ref_log_probs": True}}},
                slow=True,
                needs="trl",
            ),
        ]
        if number == 0:
            lean = {"training": {"max_tokens_per_microbatch": 1024}}
            found.append(
                Case("lean", "alignlab, max_tokens_per_microbatch=1024", work, ours, {**here, "options": lean})
            )
            one = {"config": plain, "one_by_one": True}
            label = "TRL, no gradient checkpointing, one pair at a time"
            found.append(Case("one", label, work, theirs, {**here, "options": one}, slow=True, needs="trl"))
        if scale.device == "cuda":
            liger = {"config": plain | {"use_liger_kernel": True}}
            label = "TRL, no gradient checkpointing, Liger"
            found.append(Case("liger", label, work, theirs, {**here, "options": liger}, slow=True, needs="trl"))
    return found


def summarise(scale: Scale, cases: Sequence[Case], measured: Sequence[Measured]) -> Summary:
    wanted = [
        Wanted(work_of(prompt, scale), key, SPEED[min(number, 1)], MEMORY)
        for number, prompt in enumerate(scale.prompts)
        for key in ("defaults", "best")
    ]
    return comparison("dpo", rows(cases, measured), wanted, 1e-4 if scale.dtype == "float32" else 0.05)


PART = Part("dpo", "A DPO step", cases, summarise)
