"""The parts of the study, in the order in which they are reported."""

from __future__ import annotations

from measuring.parts import ablation, dpo, group, growth, ppo, ppo_memory, rollout, share, startup, supervised
from measuring.report import Part

PARTS: dict[str, Part] = {
    module.PART.name: module.PART
    for module in (dpo, supervised, group, rollout, ppo, ppo_memory, share, growth, startup, ablation)
}
