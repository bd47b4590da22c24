"""Sampling: the engine in this process against `model.generate`, the same model, prompts and numbers of tokens."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from typing import Any

from measuring.processes import Case
from measuring.report import Measured, Part, Summary, Wanted, comparison, rows
from measuring.work import END, Scale, Words

FAN, SKEWED = 2.5, 2.0
"""Wanted: times the speed of `generate`."""


def fan_prompts(scale: Scale) -> list[list[int]]:
    """One for each measured call, and one of warm-up."""
    words = Words(scale.model.vocabulary, seed=4)
    return [words.ids(scale.fan[1]) for _ in range(1 + scale.steps)]


def skewed_lengths(scale: Scale) -> list[int]:
    """Tokens after which each response ends, most of them short: evenly distributed in their logarithm."""
    count, _, low, high = scale.skewed
    rng = random.Random(5)
    drawn = [round(math.exp(rng.uniform(math.log(low), math.log(high)))) for _ in range(count - 1)]
    return [*drawn, high]


def skewed_prompts(scale: Scale) -> list[list[int]]:
    words = Words(scale.model.vocabulary, seed=6)
    return [words.ids(scale.skewed[1]) for _ in range(scale.skewed[0])]


def our_fan(scale: Scale) -> dict[str, Any]:
    """One prefill, then all samples of the prompt."""
    from alignlab.core import Group
    from alignlab.rollout import LocalRollout
    from measuring.gauge import Gauge
    from measuring.ours import load

    samples, _, new = scale.fan
    model, gauge = load(scale, {}), Gauge(scale.device)
    engine = LocalRollout(max_new_tokens=new, suppress_tokens=[END]).sampler(model)
    gauge.loaded()
    for prompt in fan_prompts(scale):
        drawn = engine.sample([Group(prompt)], samples, seed=0)
        _check([len(r.token_ids) for r in drawn[0].responses], [new] * samples)
        gauge.step()
    return gauge.result(tokens=samples * new)


def their_fan(scale: Scale, merged: bool = False) -> dict[str, Any]:
    from measuring.gauge import Gauge
    from measuring.generate import policy, sample

    samples, _, new = scale.fan
    network, gauge = policy(scale, merged), Gauge(scale.device)
    gauge.loaded()
    for prompt in fan_prompts(scale):
        drawn = sample(network, [prompt], new, num_return_sequences=samples)
        _check([len(ids) for ids in drawn], [new] * samples)
        gauge.step()
    return gauge.result(tokens=samples * new)


def our_skewed(scale: Scale) -> dict[str, Any]:
    """The engine does not know the lengths: a response ends when it has as many tokens."""
    from alignlab.core import Group
    from alignlab.rollout import LocalRollout
    from measuring.gauge import Gauge
    from measuring.ours import load

    prompts, lengths = skewed_prompts(scale), skewed_lengths(scale)
    model, gauge = load(scale, {}), Gauge(scale.device)
    engine = LocalRollout(max_new_tokens=scale.skewed[3], suppress_tokens=[END]).sampler(model)
    engine.sample([Group(prompts[0])], 2, seed=1)
    gauge.loaded()
    drawn = engine.rows([Group(p, origin=str(i)) for i, p in enumerate(prompts)], 1, seed=0)
    wanted = {id(row): length for row, length in zip(drawn, lengths, strict=True)}
    gauge.start()
    engine.extend(drawn, until=lambda row: len(row.tokens) >= wanted[id(row)])
    gauge.step()
    _check([len(row.tokens) for row in drawn], lengths)
    return gauge.result(tokens=sum(lengths))


def their_skewed(scale: Scale, batch: int, merged: bool = False) -> dict[str, Any]:
    """Each response gets the end token as its last one."""
    from measuring.gauge import Gauge
    from measuring.generate import policy, sample

    prompts, lengths = skewed_prompts(scale), skewed_lengths(scale)
    network, gauge = policy(scale, merged), Gauge(scale.device)
    sample(network, prompts[:1], 8, num_return_sequences=2)
    gauge.loaded()
    gauge.start()
    found: list[list[int]] = []
    for at in range(0, len(prompts), batch):
        found += sample(network, prompts[at : at + batch], scale.skewed[3], ends=lengths[at : at + batch])
    gauge.step()
    _check([len(ids) for ids in found], lengths)
    return gauge.result(tokens=sum(lengths))


def _check(found: Sequence[int], wanted: Sequence[int]) -> None:
    if list(found) != list(wanted):
        raise SystemExit(f"not the tokens that were to be sampled: {list(found)[:8]} instead of {list(wanted)[:8]}")


def works(scale: Scale) -> tuple[str, str]:
    samples, prompt, new = scale.fan
    count, context, low, high = scale.skewed
    return (
        f"n = {samples}, P = {prompt}, {new} new tokens",
        f"{count} prompts, P = {context}, {low} to {high} new tokens",
    )


def cases(scale: Scale) -> list[Case]:
    fan, skewed = works(scale)
    count = scale.skewed[0]
    return [
        Case("ours", "alignlab, local engine", fan, our_fan, base=True),
        Case("generate", f"generate(num_return_sequences={scale.fan[0]})", fan, their_fan),
        Case("merged", "the same, adapter merged into its base", fan, their_fan, {"merged": True}),
        Case("ours", "alignlab, local engine", skewed, our_skewed, base=True),
        Case("generate", f"generate, all {count} at once", skewed, their_skewed, {"batch": count}),
        Case("merged", "the same, adapter merged", skewed, their_skewed, {"batch": count, "merged": True}, slow=True),
    ]


def summarise(scale: Scale, cases: Sequence[Case], measured: Sequence[Measured]) -> Summary:
    fan, skewed = works(scale)
    wanted = [Wanted(fan, key, FAN) for key in ("generate", "merged")]
    wanted += [Wanted(skewed, key, SKEWED) for key in ("generate", "merged")]
    return comparison("rollout", rows(cases, measured), wanted)


PART = Part("rollout", "Sampling against `model.generate`", cases, summarise)
