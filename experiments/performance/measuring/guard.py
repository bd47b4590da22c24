"""Ratios that may not fall: how many times faster and leaner than the others, from a small study."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

PARTS = ("dpo", "supervised", "group", "rollout", "ppo_memory", "ablation")
"""Those whose ratios depend little on the machine; a share of its peak and seconds do."""

MAY_FALL = 0.35
"""The part of a recorded ratio that may be lost: small steps on a busy machine are measured no better."""


def ratios(found: Mapping[str, Any]) -> dict[str, float]:
    """Name → ratio, more is better: speeds by the fewest CPU seconds, memory as the other's divided by ours."""
    kept: dict[str, float] = {}
    for target in found["targets"]:
        speed = target["quantity"] == "speed"
        value = target["least" if speed else "measured"]
        if target["part"] in PARTS and value is not None and math.isfinite(value):
            kept[target["key"]] = value if speed else 1 / value
    rows = found["parts"].get("ablation", {}).get("rows", [])
    if rows and not rows[-1]["failed"]:
        kept["ablation | everything on | plain rows | speed"] = 1 / rows[-1]["least_ratio"]
        kept["ablation | everything on | plain rows | memory"] = 1 / rows[-1]["memory_ratio"]
    return kept


def fallen(now: Mapping[str, float], recorded: Mapping[str, float]) -> dict[str, str]:
    """Name → what is wrong, for each recorded ratio that is no longer there or has fallen too far."""
    wrong = {}
    for name, before in recorded.items():
        value = now.get(name)
        if value is None:
            wrong[name] = f"recorded as {before:.2f}×, not measured now"
        elif value < before * (1 - MAY_FALL):
            wrong[name] = f"{value:.2f}×, recorded as {before:.2f}×: fallen by {100 * (1 - value / before):.0f} %"
    return wrong
