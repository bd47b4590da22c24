"""The clocks and memory gauges of one process, and what is known of the machine."""

from __future__ import annotations

import ctypes
import gc
import importlib.metadata
import os
import platform
import re
import time
from pathlib import Path
from typing import Any

PACKAGES = ("torch", "transformers", "peft", "accelerate", "trl", "liger_kernel")


class Gauge:
    """Seconds, memory and interference of the steps of a process.

    `loaded` is called when everything is in place and nothing has been computed yet, `step` at the end of each step.
    A step lasts from the end of the one before, so what lies between steps counts. The first is warm-up.
    """

    def __init__(self, device: str = "cpu") -> None:
        self.device = device
        self.ends: list[float] = []
        self.cpu: list[float] = []
        self.losses: list[float] = []
        self.loaded_mb: float | None = None
        self._busy = 0.0

    def loaded(self) -> None:
        """What is held from now on is not the model's own."""
        if self.loaded_mb is None:
            settle()
            self.loaded_mb = reset_peak(self.device)

    def start(self) -> None:
        """The first measured step begins now: where there is no step of warm-up."""
        self._mark()

    def step(self, loss: float = float("nan")) -> None:
        self.losses.append(loss)
        self._mark()

    def _mark(self) -> None:
        if self.device == "cuda":
            import torch

            torch.cuda.synchronize()
        self.ends.append(time.perf_counter())
        self.cpu.append(time.process_time())
        if len(self.ends) == 1:
            self._busy = machine_busy()

    def result(self, **more: Any) -> dict[str, Any]:
        """Times of the steps after the first mark; memory of all."""
        assert self.loaded_mb is not None
        peak = peak_mb(self.device)
        wall, cpu = self.ends[-1] - self.ends[0], self.cpu[-1] - self.cpu[0]
        return {
            "seconds": [b - a for a, b in zip(self.ends, self.ends[1:], strict=False)],
            "cpu_seconds": [b - a for a, b in zip(self.cpu, self.cpu[1:], strict=False)],
            "loaded_mb": self.loaded_mb,
            "above_mb": peak - self.loaded_mb,
            "losses": self.losses,
            "cores_of_others": max(0.0, (machine_busy() - self._busy - cpu) / wall) if wall else 0.0,
            **more,
        }


def own_weights(network: Any) -> None:
    """Make every weight this process's own memory: what is only mapped from a file counts when it is first read."""
    for tensor in [*network.parameters(), *network.buffers()]:
        tensor.data = tensor.data.clone()


def settle() -> None:
    """Give back to the system what is no longer used."""
    gc.collect()
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL("libc.so.6").malloc_trim(0)


def reset_peak(device: str = "cpu") -> float:
    """Begin to look for the most memory anew; returns what is held now, in MB (10⁶ bytes)."""
    if device == "cuda":
        import torch

        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated() / 1e6
    try:
        Path("/proc/self/clear_refs").write_text("5")  # proc(5): VmHWM starts again from what is held now
    except OSError as error:
        raise SystemExit(f"peak memory is read from /proc/self, which is Linux's: {error}") from error
    return _status_mb("VmRSS")


def peak_mb(device: str = "cpu") -> float:
    """Most memory held since `reset_peak`, in MB (10⁶ bytes): of this process, or of the GPU's allocator."""
    if device == "cuda":
        import torch

        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() / 1e6
    return _status_mb("VmHWM")


def _status_mb(key: str) -> float:
    found = re.search(rf"^{key}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    assert found
    return int(found[1]) * 1024 / 1e6


def machine_busy() -> float:
    """CPU seconds that all processes of the machine have used (and that its host took); NaN where it is not known."""
    try:
        user, nice, system, _idle, _wait, irq, soft, steal = map(int, Path("/proc/stat").read_text().split()[1:9])
    except OSError:
        return float("nan")
    return (user + nice + system + irq + soft + steal) / os.sysconf("SC_CLK_TCK")


def machine(device: str, threads: int) -> dict[str, Any]:
    """Processor, cores, memory; and the GPU."""
    cpu = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        cpu = next((line.split(":", 1)[1].strip() for line in lines if "model name" in line), cpu)
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9
    found = {"cpu": cpu, "cores": os.cpu_count(), "memory_gb": round(memory, 1), "threads": threads}
    return found if device == "cpu" else found | {"gpu": _gpu()}


def _gpu() -> str:
    import subprocess

    asked = ["nvidia-smi", "--query-gpu=name,memory.total", "--format=csv,noheader"]
    try:  # not by torch: this process never touches the GPU
        return subprocess.run(asked, capture_output=True, text=True, check=True).stdout.splitlines()[0]
    except (OSError, subprocess.CalledProcessError, IndexError):
        return "unknown"


def versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found
