"""What the two sides share: the same adapter weights, and the clocks and memory gauges of one process."""

from __future__ import annotations

import argparse
import json
import os
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

LORA = {"r": 16, "alpha": 32.0, "seed": 1, "scale": 0.1}
LEARNING_RATE = 1e-4
BETA = 0.1


def set_adapter(network: Any) -> None:
    """Give every LoRA matrix, in order of its name, the same random numbers on both sides.

    A new adapter changes nothing (B = 0), so that any first loss would be log 2: agreement would prove nothing.
    """
    generator = torch.Generator().manual_seed(int(LORA["seed"]))
    trained = {name: p for name, p in network.named_parameters() if p.requires_grad}
    with torch.no_grad():
        for name in sorted(trained):
            trained[name].normal_(0.0, LORA["scale"], generator=generator)


def memory_mb() -> float:
    """Memory that this process holds now, in MB (10⁶ bytes)."""
    import psutil  # type: ignore[import-untyped]

    return psutil.Process().memory_info().rss / 1e6


def peak_mb() -> float:
    """Most memory that this process has held, in MB (10⁶ bytes)."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e6


class Gauge:
    """Seconds, memory and interference of the steps of a process.

    `loaded` is called when everything is in place and nothing has been computed yet, `step` at the end of each step.
    A step lasts from the end of the one before, so what lies between steps counts. The first is warm-up.
    """

    def __init__(self) -> None:
        self.ends: list[float] = []
        self.cpu: list[float] = []
        self.losses: list[float] = []
        self.loaded_mb: float | None = None
        self._busy = 0.0

    def loaded(self) -> None:
        if self.loaded_mb is None:
            self.loaded_mb = memory_mb()

    def step(self, loss: float) -> None:
        self.losses.append(loss)
        self.ends.append(time.perf_counter())
        self.cpu.append(time.process_time())
        if len(self.ends) == 1:
            self._busy = _machine_busy()

    def result(self, **more: Any) -> dict[str, Any]:
        assert self.loaded_mb is not None
        wall, cpu = self.ends[-1] - self.ends[0], self.cpu[-1] - self.cpu[0]
        peak = peak_mb()
        return {
            "seconds": [b - a for a, b in zip(self.ends, self.ends[1:], strict=False)],
            "cpu_seconds": cpu / (len(self.cpu) - 1),
            "peak_mb": peak,
            "loaded_mb": self.loaded_mb,
            "above_mb": peak - self.loaded_mb,
            "losses": self.losses,
            "cores_of_others": max(0.0, (_machine_busy() - self._busy - cpu) / wall),
            "threads": torch.get_num_threads(),
            **more,
        }


def _machine_busy() -> float:
    """CPU seconds that all processes of the machine have used (and that its host took); NaN where it is not known."""
    try:
        user, nice, system, _idle, _wait, irq, soft, steal = map(int, Path("/proc/stat").read_text().split()[1:9])
    except OSError:
        return float("nan")
    return (user + nice + system + irq + soft + steal) / os.sysconf("SC_CLK_TCK")


def main(measure: Callable[[Path, dict[str, Any]], dict[str, Any]]) -> None:
    """Run one side in this process: `side.py FOLDER RESULT OPTIONS`, options as JSON."""
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("result", type=Path)
    parser.add_argument("options", type=json.loads)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.options["threads"])
    arguments.result.write_text(json.dumps(measure(arguments.folder, arguments.options)))


def read_batches(folder: Path) -> list[list[dict[str, list[int]]]]:
    batches: list[list[dict[str, list[int]]]] = json.loads((folder / "pairs.json").read_text())
    return batches
