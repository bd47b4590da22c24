"""Runs in the precision that GPUs use, on a CPU: `model.dtype=bfloat16` keeps there what `auto` keeps on a GPU."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from alignlab.training.checkpoints.state import Saved
from tests.training import runs

KINDS = {
    "full": ["adapter=none"],
    "lora": ["adapter=lora"],
    "nf4": ["adapter=lora", "quantization=nf4"],
}
STEPS = 2
WORDS = [
    *("model.dtype=bfloat16", "optimizer=adamw", "optimizer.lr=1e-5"),
    *(f"training.steps={STEPS}", "training.checkpoint_every=1", "training.keep_last=9"),
]
"""A learning rate at which bfloat16 weights would stay as they are, and a checkpoint after every step."""

HEADS = ("ppo", "reward_model", "pairwise_model", "process_reward_model")
"""Algorithms with a head of few outputs."""


def checkpoint(folder: Path, out: str, step: int) -> dict[str, dict[str, torch.Tensor]]:
    """Trained weights with their optimiser state, by name."""
    return dict(Saved(folder / out / f"checkpoints/step-{step:08}"))


def share_changed(folder: Path, out: str) -> float:
    """Of the trained numbers that have had a gradient in both steps, how many the second one has changed."""
    before, after = checkpoint(folder, out, STEPS - 1), checkpoint(folder, out, STEPS)
    changed = total = 0
    for name, now in after.items():
        had = (before[name]["exp_avg_sq"] > 0) & (now["exp_avg"] != 0)
        changed += int((now["weight"] != before[name]["weight"])[had].sum())
        total += int(had.sum())
    return changed / total


def check(folder: Path, algorithm: str, kind: str, out: str, world: int = 1) -> None:
    """Dtypes as the run found them and as its checkpoint has them; that it learns; that it starts from its reference.

    Float32 weights, states, heads and sums of gradients; bfloat16 for all else.
    """
    said: dict[str, Any] = json.loads((folder / out / "result.json").read_text())["precision"]
    wanted = {"weights": "float32", "products": "bfloat16"}
    if algorithm in HEADS:
        wanted["heads"] = "float32"
    if world > 1:
        wanted["reduced"] = "float32"
    assert {k: v for k, v in said.items() if k != "frozen"} == wanted
    if kind != "full":
        assert "bfloat16" in said["frozen"].split(" and ")
    last = checkpoint(folder, out, STEPS)
    assert {t.dtype for tensors in last.values() for t in tensors.values()} == {torch.float32}
    assert share_changed(folder, out) > 0.99
    first = runs.metrics(folder, out)[0]
    for name in ("approx_kl", "kl"):  # PPO's ratios are 1, and a fresh reference is the policy
        assert first.get(name, 0.0) == 0.0, name
    if algorithm == "dpo":  # with a tenth of the labels taken for wrong, too: -log sigmoid(0)
        assert first["loss"] == torch.tensor(2.0).log()
