"""A reward-model step on the pairs of the DPO step, and an SFT step on their prompts and chosen responses."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from measuring.processes import Case
from measuring.report import Measured, Part, Summary, Wanted, comparison, rows
from measuring.work import Scale, pair_batches

REWARD, SFT = "reward model", "SFT"
WANTED = {REWARD: 4.0, SFT: 2.5}


def our_reward_model(scale: Scale, prompt: int, options: dict[str, Any]) -> dict[str, Any]:
    from alignlab.algorithms.reward_model import RewardModel
    from measuring.ours import pair_groups, train

    return train(scale, RewardModel(), pair_groups(pair_batches(scale, prompt)), options, kind="score")


def their_reward_model(scale: Scale, prompt: int, options: dict[str, Any]) -> dict[str, Any]:
    from measuring.theirs import reward_model

    return reward_model(scale, prompt, options)


def our_sft(scale: Scale, prompt: int, options: dict[str, Any]) -> dict[str, Any]:
    from alignlab.algorithms.sft import SFT as Algorithm
    from measuring.ours import demonstrations, train

    return train(scale, Algorithm(), demonstrations(pair_batches(scale, prompt)), options)


def their_sft(scale: Scale, prompt: int, options: dict[str, Any]) -> dict[str, Any]:
    from measuring.theirs import sft

    return sft(scale, prompt, options)


def cases(scale: Scale) -> list[Case]:
    prompt = scale.prompts[0]
    here = {"prompt": prompt}
    plain = {"gradient_checkpointing": False}
    found = []
    for name, ours, theirs in ((REWARD, our_reward_model, their_reward_model), (SFT, our_sft, their_sft)):
        work = work_of(name, scale)
        found += [
            Case("ours", "alignlab, defaults", work, ours, {**here, "options": {}}, base=True),
            Case("defaults", "TRL, defaults", work, theirs, {**here, "options": {}}, slow=True, needs="trl"),
            Case(
                "fast",
                "TRL, no gradient checkpointing",
                work,
                theirs,
                {**here, "options": {"config": plain}},
                slow=True,
                needs="trl",
            ),
        ]
    for key, label, config in (
        ("free", "padding-free", {"padding_free": True}),
        ("chunked", "loss in chunks", {"loss_type": "chunked_nll"}),
    ):
        options = {**here, "options": {"config": plain | config}}
        label = f"TRL, no gradient checkpointing, {label}"
        found.append(Case(key, label, work_of(SFT, scale), their_sft, options, slow=True, needs="trl"))
    if scale.device == "cuda":
        for name, theirs in ((REWARD, their_reward_model), (SFT, their_sft)):
            liger = {"config": plain | {"use_liger_kernel": True}}
            label = "TRL, no gradient checkpointing, Liger"
            work = work_of(name, scale)
            found.append(Case("liger", label, work, theirs, {**here, "options": liger}, slow=True, needs="trl"))
    return found


def work_of(name: str, scale: Scale) -> str:
    number = f"{scale.pairs} pairs" if name == REWARD else f"{scale.pairs} responses"
    return f"{name}, P = {scale.prompts[0]}, C ≤ {scale.response}, {number}"


def summarise(scale: Scale, cases: Sequence[Case], measured: Sequence[Measured]) -> Summary:
    made = rows(cases, measured)
    keys = {REWARD: ("defaults", "fast"), SFT: ("defaults", "fast", "free", "chunked")}
    wanted = [Wanted(work_of(name, scale), key, speed) for name, speed in WANTED.items() for key in keys[name]]
    return comparison("supervised", made, wanted, 1e-4 if scale.dtype == "float32" else 0.05)


PART = Part("supervised", "A reward-model step and an SFT step", cases, summarise)
