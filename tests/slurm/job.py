"""Runs of a tiny model through the batch templates, that take as long as a test needs and say where they ran."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import torch

from tests.slurm import pace
from tests.slurm.conftest import REPOSITORY, Slurm, until
from tests.training import runs

TEMPLATES = REPOSITORY / "slurm"
STEPS = 40

SMALL = ("--mem=2G", "--cpus-per-task=2", "--partition=main")


class Run:
    """A run of the tiny model through a template: four prompts a step, three responses to each.

    Attributes:
        out: the run's folder.
        hold: while this file exists the run takes its time.
    """

    def __init__(self, slurm: Slurm, base: Path, name: str, template: str, *more: str, steps: int = STEPS) -> None:
        self.slurm, self.base, self.name, self.out = slurm, base, name, base / name
        self.template, self.more, self.length = template, more, steps
        self.hold = base / f"{name}.hold"
        self.log = base / f"{name}.log"
        self.job = ""

    def submit(self, *options: str, seconds: float = 0.0, **environment: str) -> Run:
        """Submit; each response takes `seconds` to score while `hold` is there."""
        if seconds:
            self.hold.write_text(str(seconds))
        own = {pace.HOLD: str(self.hold), pace.SEEN: str(self.base / f"{self.name}.seen")}
        words = runs.words_for(
            self.base,
            "rejection_sampling",
            self.name,
            "scoring.function.path=tests.slurm.pace.count_of_a",
            "training.batch_size=4",
            "source.rollout_batch_size=4",
            f"training.steps={self.length}",
            *self.more,
        )
        self.job = self.slurm.sbatch(
            *SMALL, f"--output={self.log}", *options, f"{TEMPLATES}/{self.template}.sbatch", "train", *words,
            **own, **environment,
        )  # fmt: skip
        return self

    def steps(self) -> list[int]:
        path = self.out / "metrics.jsonl"
        return [m["step"] for m in runs.metrics(self.base, self.name)] if path.exists() else []

    def reach(self, step: int) -> None:
        until(lambda: step in self.steps(), 120, lambda: f"step {step}: {self.steps()}\n{self.said()}")

    def said(self) -> str:
        return self.log.read_text() if self.log.exists() else ""

    def seen(self) -> dict[int, tuple[str, int]]:
        """Node and world size of each process, by rank."""
        found = {int(p.name): p.read_text().split() for p in (self.base / f"{self.name}.seen").iterdir()}
        return {rank: (node, int(world)) for rank, (node, world) in sorted(found.items())}

    def result(self) -> dict[str, Any]:
        return json.loads((self.out / "result.json").read_text())

    def weights(self) -> dict[str, torch.Tensor]:
        return runs.weights(self.base, self.name)

    def finish(self) -> None:
        """Let it run on, to its end."""
        self.hold.unlink(missing_ok=True)
        assert self.slurm.wait(self.job, timeout=180) == "COMPLETED", self.said()

    def stopped_once(self, signal: str) -> int:
        """Check that the job ran twice, stopped by this signal and going on at that step; which one."""
        assert [h["State"] for h in self.slurm.history(self.job)] == ["REQUEUED", "COMPLETED"], self.said()
        assert f"job {self.job} is queued again" in self.said()
        found = re.findall(r"stopped by (\w+); checkpoint of step (\d+) saved", self.said())
        assert len(set(found)) == 1 and found[0][0] == signal, self.said()
        step = int(found[0][1])
        assert 1 <= step < self.length
        assert self.steps() == [*range(1, self.length + 1)]  # no step twice, none left out
        times = [m["seconds"] for m in runs.metrics(self.base, self.name)]
        assert times == sorted(times)
        return step
