"""A whole PPO iteration: sampling, log-probs of policy and reference, values, epochs of updates; and TRL's, from the
last release that has PPO, in an environment of its own."""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from measuring.processes import PPO_PYTHON, Case
from measuring.report import Measured, Part, Summary, Wanted, comparison, rows
from measuring.work import END, Scale, Shape, Words

WANTED = 4.0


def ours(scale: Scale, critic: str, options: dict[str, Any]) -> dict[str, Any]:
    """One iteration, after two sampled tokens of warm-up, as on the other side."""
    return iteration(scale, critic, options, scale.model)


def iteration(
    scale: Scale, critic: str, options: dict[str, Any], shape: Shape, batch: int | None = None
) -> dict[str, Any]:
    """One iteration of the prompts of `scale.ppo`.

    Args:
        batch: prompts in an optimiser step; all of the iteration's unless given.
    """
    from alignlab.algorithms.ppo import PPO
    from alignlab.core import Group
    from alignlab.models import PackedModel
    from alignlab.rollout import LocalRollout
    from alignlab.training.settings import SourceSettings
    from measuring.ours import train

    prompts, prompt, new, epochs = scale.ppo
    words = Words(shape.vocabulary, seed=7)
    groups = [Group(words.ids(prompt), origin=f"prompts:{i}") for i in range(prompts)]
    settings = LocalRollout(max_new_tokens=new, suppress_tokens=[END], **options.get("rollout", {}))

    class LastToken:
        """The number of a response's last token, as a part of the vocabulary's size."""

        fills = ("reward",)

        def score(self, groups: Sequence[Group]) -> None:
            for response in (r for g in groups for r in g.responses):
                assert len(response.token_ids) == new
                response.columns["reward"] = response.token_ids[-1] / shape.vocabulary

    def warm_up(model: PackedModel) -> None:
        few = LocalRollout(max_new_tokens=2, suppress_tokens=[END])
        few.sampler(model).sample([Group([END + 2] * prompt)], 2, seed=0)

    steps = epochs * (prompts // (batch or prompts))
    found = train(
        scale,
        PPO(critic=critic),  # type: ignore[arg-type]
        [groups],
        options,
        shape=shape,
        source=SourceSettings(kind="rollout", rollout_batch_size=prompts, group_size=1, ppo_epochs=epochs),
        scorers=[LastToken()],
        rollout=settings,
        steps=steps,
        every=steps,
        before=warm_up,
    )
    return found | {"tokens": prompts * (prompt + new)}


def theirs(scale: Scale, gradient_checkpointing: bool) -> dict[str, Any]:
    work = asdict(scale) | {"gradient_checkpointing": gradient_checkpointing}
    with tempfile.TemporaryDirectory() as folder:
        asked, answer = Path(folder) / "work.json", Path(folder) / "result.json"
        asked.write_text(json.dumps(work))
        environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "TRL_EXPERIMENTAL_SILENCE": "1"}
        command = [str(PPO_PYTHON), "-m", "measuring.trl_ppo", str(asked), str(answer)]
        subprocess.run(command, env=environment, check=True)
        return dict(json.loads(answer.read_text()))


def work_of(scale: Scale) -> str:
    prompts, prompt, new, epochs = scale.ppo
    return f"{prompts} prompts, P = {prompt}, {new} new tokens, {epochs} epochs"


def cases(scale: Scale) -> list[Case]:
    work = work_of(scale)
    shared, own = {"critic": "shared", "options": {}}, {"critic": "own", "options": {}}
    label = "TRL 1.12, no gradient checkpointing"
    return [
        Case("ours", "alignlab, critic on the policy's trunk", work, ours, shared, base=True),
        Case("own", "alignlab, critic with an adapter of its own", work, ours, own, slow=True),
        Case("trl", label, work, theirs, {"gradient_checkpointing": False}, slow=True, needs="trl_ppo"),
    ]


def summarise(scale: Scale, cases: Sequence[Case], measured: Sequence[Measured]) -> Summary:
    return comparison("ppo", rows(cases, measured), [Wanted(work_of(scale), "trl", WANTED)], tolerance=float("inf"))


PART = Part("ppo", "A PPO iteration", cases, summarise)
