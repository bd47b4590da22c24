"""What each technique of the forward pass is worth by itself: with all others on, it is on and off in turns.

    python experiments/performance/alone.py                      # ten minutes
    python experiments/performance/alone.py --only dpo --threads 2 --rounds 20
    python experiments/performance/alone.py --only memory        # one process for each repetition

A round does the same work once with everything on and once without each technique, in an order of its own. What is
reported is the median over the rounds of CPU seconds without it, divided by those with everything, and the quartiles:
CPU seconds, because other programs on the machine disturb them less than the clock on the wall.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from measuring import ours as side
from measuring.parts import ablation, rollout
from measuring.work import BETA, END, Scale, pair_batches, scale

from alignlab.models import Features

WORKS = ("dpo", "dpo-mixed", "sft", "reward", "full", "fan", "skewed", "memory")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=WORKS, default=WORKS)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--inner", choices=["kept", "usual"], help=argparse.SUPPRESS)
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    with tempfile.TemporaryDirectory() as folder:
        sizes = scale(asked.small, "cpu", "21m", Path(folder), asked.threads, None)
        if asked.inner:
            print(json.dumps(_steps(sizes, asked.inner, asked.rounds)))
            return
        print("| work | without | CPU seconds, × | quartiles | clock, × |\n|:--|:--|--:|:--|--:|", flush=True)
        for work in asked.only:
            seconds = _memory(asked) if work == "memory" else _interleaved(work, sizes, asked.rounds)
            for name, measured in seconds.items():
                if name != "nothing":
                    _print_ratio(work, name, measured, seconds["nothing"])


def _print_ratio(work: str, name: str, measured: list[tuple[float, float]], all_on: list[tuple[float, float]]) -> None:
    cpu, wall = (sorted(a[i] / b[i] for a, b in zip(measured, all_on, strict=True)) for i in range(2))
    low, middle, high = statistics.quantiles(cpu, n=4)
    print(f"| {work} | {name} | {middle:.3f} | {low:.3f} to {high:.3f} | {statistics.median(wall):.3f} |", flush=True)


# ---------------------------------------------------------------------- what can be switched


def switches(model: Any, sampling: bool) -> dict[str, Callable[[], Any]]:
    """Name → a context without that technique. Those that this version has."""
    features = model.features

    @contextmanager
    def without(name: str) -> Iterator[None]:
        model.features = dataclasses.replace(features, **{name: False})
        yield
        model.features = features

    found: dict[str, Callable[[], Any]] = {"nothing": nullcontext}
    for field in dataclasses.fields(features):
        if getattr(features, field.name):
            found[field.name] = partial(without, field.name)
    if sampling:
        from alignlab.rollout import local

        found["quick"] = lambda: patch.object(local, "quick_products", lambda network: nullcontext())
    return found


def _interleaved(work: str, sizes: Scale, rounds: int) -> dict[str, list[tuple[float, float]]]:
    """Name of what is off → (CPU seconds, seconds) of each round."""
    if work in ("fan", "skewed"):
        model = side.load(sizes, {})
        once, choices = _sampling(work, sizes, model), switches(model, sampling=True)
        return _rounds(choices, rounds, lambda: once)
    algorithm, batch, options, kind = _training(work, sizes)
    steps: list[tuple[float, float]] = []
    order: list[str] = []
    state: dict[str, Any] = {}

    class Switching(side.Clock):
        """Ends one step's switch and begins the next one's."""

        def on_step(self, trainer: Any) -> None:
            super().on_step(trainer)
            steps.append((time.process_time(), time.perf_counter()))
            state.pop("context").__exit__(None, None, None)
            if trainer.state.step < len(order):
                enter(trainer.state.step)

    def enter(step: int) -> None:
        state["context"] = state["choices"][order[step]]()
        state["context"].__enter__()

    def ready(model: Any) -> None:
        state["choices"] = switches(model, sampling=False)
        names, rng = list(state["choices"]), random.Random(0)
        order.extend(["nothing", *(n for _ in range(rounds) for n in rng.sample(names, len(names)))])
        enter(0)

    total = 1 + rounds * (1 + len(dataclasses.fields(Features)))
    with patch.object(side, "Clock", Switching):
        side.train(sizes, algorithm, [batch] * total, options, kind=kind, before=ready)
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in state["choices"]}
    for i, name in enumerate(order[1 : len(steps)], start=1):
        found[name].append((steps[i][0] - steps[i - 1][0], steps[i][1] - steps[i - 1][1]))
    whole = min(map(len, found.values()))
    return {name: measured[:whole] for name, measured in found.items()}


def _rounds(choices: Mapping[str, Callable[[], Any]], rounds: int, work: Callable[[], Any]) -> dict[str, Any]:
    once, rng = work(), random.Random(0)
    once()
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in choices}
    for _ in range(rounds):
        for name in rng.sample(list(choices), len(choices)):
            with choices[name]():
                cpu, wall = time.process_time(), time.perf_counter()
                once()
                found[name].append((time.process_time() - cpu, time.perf_counter() - wall))
    return found


def _training(work: str, sizes: Scale) -> tuple[Any, Any, dict[str, Any], Any]:
    """Algorithm, a batch of groups, options, kind of model."""
    from alignlab.algorithms.dpo import DPO
    from alignlab.algorithms.reward_model import RewardModel
    from alignlab.algorithms.sft import SFT

    pairs = pair_batches(sizes, sizes.prompts[0])[0]
    if work == "dpo-mixed":
        return DPO(beta=BETA), side.pair_groups([ablation.batches(sizes)[1]])[0], {}, "policy"
    if work == "dpo":
        return DPO(beta=BETA), side.pair_groups([pairs])[0], {}, "policy"
    if work == "reward":
        return RewardModel(), side.pair_groups([pairs])[0], {}, "score"
    adapter = "none" if work == "full" else "lora"
    return SFT(), side.demonstrations([pairs])[0], {"adapter": adapter}, "policy"


def _sampling(work: str, sizes: Scale, model: Any) -> Callable[[], Any]:
    from alignlab.core import Group
    from alignlab.rollout import LocalRollout

    new = sizes.fan[2] if work == "fan" else sizes.skewed[3]
    engine = LocalRollout(max_new_tokens=new, suppress_tokens=[END]).sampler(model)
    if work == "fan":
        prompt = rollout.fan_prompts(sizes)[0]
        return lambda: engine.sample([Group(prompt)], sizes.fan[0], seed=0)
    prompts, lengths = rollout.skewed_prompts(sizes), rollout.skewed_lengths(sizes)

    def draw() -> None:
        rows = engine.rows([Group(p, origin=str(i)) for i, p in enumerate(prompts)], 1, seed=0)
        wanted = {id(row): length for row, length in zip(rows, lengths, strict=True)}
        engine.draw(rows, until=lambda row: len(row.tokens) >= wanted[id(row)])

    return draw


# ---------------------------------------------------------------------- a setting of the whole process


def _memory(asked: argparse.Namespace) -> dict[str, list[tuple[float, float]]]:
    """Freed memory kept, or given back to the system as glibc does by itself: a process for each, in turns."""
    found: dict[str, list[tuple[float, float]]] = {"nothing": [], "keep_freed_memory": []}
    command = [sys.executable, __file__, "--threads", str(asked.threads), "--rounds", "6", "--inner"]
    for _ in range(max(2, asked.rounds // 2)):
        for name, how in (("nothing", "kept"), ("keep_freed_memory", "usual")):
            done = subprocess.run([*command, how], capture_output=True, text=True, check=True, env=os.environ)
            found[name].append(tuple(json.loads(done.stdout.splitlines()[-1])))  # type: ignore[arg-type]
    return found


def _steps(sizes: Scale, how: str, steps: int) -> tuple[float, float]:
    """Medians of a mixed DPO step's CPU seconds and seconds."""
    from alignlab.models import load as loading

    if how == "usual":
        loading.keep_freed_memory = lambda: None  # type: ignore[assignment]
    algorithm, _, options, kind = _training("dpo-mixed", sizes)
    batches = ablation.batches(dataclasses.replace(sizes, steps=steps))
    found = side.train(sizes, algorithm, side.pair_groups(batches), options, kind=kind)
    return statistics.median(found["cpu_seconds"]), statistics.median(found["seconds"])


if __name__ == "__main__":
    main()
