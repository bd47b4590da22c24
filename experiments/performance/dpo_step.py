"""One DPO step, alignlab beside TRL's `DPOTrainer`: seconds and memory, on the same pairs, weights and machine.

    python experiments/performance/dpo_step.py            # about half an hour on two cores
    python experiments/performance/dpo_step.py --small    # two minutes, a tiny model: does it run?

Each measurement is a process of its own; the variants take turns. Prints a Markdown table, writes everything as JSON.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import Progress, TextColumn, TimeElapsedColumn

HERE = Path(__file__).resolve().parent
OURS = "alignlab"
TOLERANCE = 1e-4
"""Largest difference of a step's mean loss, in nats, that is put down to rounding."""
NOISY = 0.15
"""CPU cores that other processes may have used during a measurement without its being called noisy."""
PACKAGES = ("torch", "transformers", "peft", "accelerate", "trl")

MODEL = {"vocabulary": 32_000, "hidden": 256, "layers": 6, "heads": 4, "intermediate": 688, "seed": 0}
WORK = {"response": 64, "pairs": 8}
SMALL_MODEL = {"vocabulary": 1_000, "hidden": 64, "layers": 2, "heads": 2, "intermediate": 128, "seed": 0}
SMALL_WORK = {"response": 16, "pairs": 4}


@dataclass(frozen=True)
class Variant:
    """A trainer with settings. `side` is the script that runs it."""

    key: str
    label: str
    side: str
    options: dict[str, Any] = field(default_factory=dict)


VARIANTS = [
    Variant(OURS, "alignlab, defaults", "alignlab"),
    Variant("alignlab-lean", "alignlab, token_budget=1024", "alignlab", {"training": {"token_budget": 1024}}),
    Variant("trl", "TRL, defaults in float32", "trl"),
    Variant("trl-fast", "TRL, no gradient checkpointing", "trl", {"config": {"gradient_checkpointing": False}}),
    Variant(
        "trl-precomputed",
        "TRL, no gradient checkpointing, reference precomputed",
        "trl",
        {"config": {"gradient_checkpointing": False, "precompute_ref_log_probs": True}},
    ),
    Variant(
        "trl-lean",
        "TRL, no gradient checkpointing, one pair at a time",
        "trl",
        {"config": {"gradient_checkpointing": False}, "one_by_one": True},
    ),
]


def main() -> int:
    arguments = _arguments()
    variants = [v for v in VARIANTS if v.key in arguments.only]
    if any(v.side == "trl" for v in variants) and not importlib.util.find_spec("trl"):
        print(
            'TRL is not installed. It is an optional peer: python -m pip install -e ".[peers]" in the root of the '
            f"repository, or measure alignlab alone with --only {OURS}",
            file=sys.stderr,
        )
        return 2
    model, work = (SMALL_MODEL, SMALL_WORK) if arguments.small else (MODEL, WORK)
    found: dict[str, Any] = {
        "machine": _machine(arguments.threads),
        "versions": _versions(),
        "model": model,
        "work": [],
    }
    measurements: list[dict[str, Any]] = []
    patience = Patience(arguments.patience * 60)
    columns = TextColumn("{task.description}"), TextColumn("{task.completed}/{task.total}"), TimeElapsedColumn()
    with tempfile.TemporaryDirectory() as temporary, Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task("", total=len(arguments.prompts) * arguments.repeats * len(variants))
        for prompt in arguments.prompts:
            folder = Path(temporary) / f"prompt-{prompt}"
            folder.mkdir()
            shape = {**model, **work, "prompt": prompt, "batches": 1 + arguments.steps}
            progress.update(task, description="making the model and the pairs")
            _run(["workload.py", str(folder), json.dumps(shape)], arguments.threads)
            found["work"].append({**work, "prompt": prompt, **json.loads((folder / "work.json").read_text())})
            for repeat in range(arguments.repeats):
                for variant in variants:
                    progress.update(task, description=f"P = {prompt}: {escape(variant.label)}")
                    measured = _measure(variant, folder, arguments.threads, patience)
                    measurements.append({"prompt": prompt, "variant": variant.key, "repeat": repeat, **measured})
                    took = f"{median(measured['seconds']):.2f} s, {measured['peak_mb']:,.0f} MB"
                    progress.console.print(f"P = {prompt}, {variant.key}: {took}", highlight=False)
                    progress.advance(task)
    found["results"] = [row for p in arguments.prompts for row in _summary(p, variants, measurements)]
    found["measurements"] = measurements
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(found, indent=1) + "\n")
    print(_markdown(found))
    print(f"\nEverything measured: {arguments.out}", file=sys.stderr)
    apart = [r for r in found["results"] if r["loss_difference"] is not None and r["loss_difference"] > TOLERANCE]
    for row in apart:
        print(
            f"NOT THE SAME WORK: the losses of {row['label']} differ by {row['loss_difference']:.1e}", file=sys.stderr
        )
    return 1 if apart else 0


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--small", action="store_true", help="a tiny model and one repeat: a trial of the script itself"
    )
    parser.add_argument("--prompts", type=int, nargs="+", metavar="P", help="prompt lengths in tokens (192 448)")
    parser.add_argument("--repeats", type=int, metavar="N", help="processes for each variant and length (3)")
    parser.add_argument("--steps", type=int, metavar="N", help="measured steps in each, after one of warm-up (3)")
    parser.add_argument("--threads", type=int, default=2, metavar="N", help="CPU threads (2)")
    parser.add_argument("--only", nargs="+", choices=[v.key for v in VARIANTS], default=[v.key for v in VARIANTS])
    parser.add_argument("--out", type=Path, default=Path("runs/performance/dpo_step.json"), metavar="FILE")
    parser.add_argument(
        "--patience", type=float, default=0.0, metavar="MINUTES", help="how long to wait, in all, for other processes "
        "to leave the machine alone; measurements that they disturbed are repeated within it (0)"
    )  # fmt: skip
    found = parser.parse_args()
    found.prompts = found.prompts or ([32] if found.small else [192, 448])
    found.repeats = found.repeats or (1 if found.small else 3)
    found.steps = found.steps or (2 if found.small else 3)
    return found


class Patience:
    """Time that may be spent on waiting for a quiet machine and on repeating what was disturbed."""

    def __init__(self, seconds: float) -> None:
        self.left = seconds

    def wait(self) -> None:
        """Return when the machine has been idle for some seconds, or when the time is up."""
        while self.left > 0:
            busy, start = _idle_seconds(), time.monotonic()
            time.sleep(min(5.0, self.left))
            lasted = time.monotonic() - start
            self.left -= lasted
            if (os.cpu_count() or 1) - (_idle_seconds() - busy) / lasted <= NOISY:
                return


def _idle_seconds() -> float:
    """CPU seconds that nobody used since the machine was started, over all cores; Linux only."""
    idle, waiting = map(int, Path("/proc/stat").read_text().split()[4:6])
    return (idle + waiting) / os.sysconf("SC_CLK_TCK")


def _measure(variant: Variant, folder: Path, threads: int, patience: Patience) -> dict[str, Any]:
    options = json.dumps({"threads": threads, **variant.options})
    result = folder / "result.json"
    while True:
        patience.wait()
        start = time.monotonic()
        _run([f"side_{variant.side}.py", str(folder), str(result), options], threads)
        measured: dict[str, Any] = json.loads(result.read_text())
        if not measured["cores_of_others"] > NOISY or patience.left <= 0:
            return measured
        patience.left -= time.monotonic() - start


def _run(command: list[str], threads: int) -> None:
    """Run a script of this folder in a process of its own, on the CPU, without network."""
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": str(threads)}
    environment |= {"HF_HUB_DISABLE_PROGRESS_BARS": "1", "TOKENIZERS_PARALLELISM": "false"}
    # Threads that spin while they wait make any other process on the machine slow the measurement down many times over.
    environment.setdefault("OMP_WAIT_POLICY", "passive")
    done = subprocess.run(
        [sys.executable, str(HERE / command[0]), *command[1:]], env=environment, capture_output=True, text=True
    )
    if done.returncode:
        raise SystemExit(f"{command[0]} failed with status {done.returncode}:\n{done.stderr[-4000:]}")


def _summary(prompt: int, variants: list[Variant], measurements: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A row for each variant: medians over processes, the range of the times, ratios to alignlab's medians."""
    rows: list[dict[str, Any]] = []
    mine = [m for m in measurements if m["prompt"] == prompt]
    ours = next((m["losses"] for m in mine if m["variant"] == OURS), None)
    for variant in variants:
        runs = [m for m in mine if m["variant"] == variant.key]
        seconds = [median(m["seconds"]) + m.get("reference_seconds", 0.0) for m in runs]
        row: dict[str, Any] = {"prompt": prompt, "variant": variant.key, "label": variant.label}
        row |= {"seconds": median(seconds), "seconds_low": min(seconds), "seconds_high": max(seconds)}
        row["cpu_seconds"] = median(m["cpu_seconds"] + m.get("reference_cpu_seconds", 0.0) for m in runs)
        row |= {name: median(m[name] for m in runs) for name in ("peak_mb", "above_mb", "loaded_mb")}
        row["cores_of_others"] = max(m["cores_of_others"] for m in runs)
        differences = [abs(a - b) for m in runs for a, b in zip(m["losses"], ours or [], strict=ours is not None)]
        row["loss_difference"] = max(differences) if ours else None
        rows.append(row)
    base = next((r for r in rows if r["variant"] == OURS), None)
    for row in rows:
        for name in ("seconds", "cpu_seconds", "peak_mb", "above_mb"):
            row[f"{name}_ratio"] = row[name] / base[name] if base else None
    return rows


def _markdown(found: dict[str, Any]) -> str:
    machine, versions = found["machine"], found["versions"]
    lines = [
        f"{machine['cpu']}, {machine['cores']} cores, {machine['threads']} threads; "
        + ", ".join(f"{name} {version}" for name, version in versions.items())
        + f"; {found['work'][0]['parameters'] / 1e6:.1f}M parameters.",
        "",
        "| P | | seconds per step (range) | | CPU seconds | | peak MB | | above the loaded model, MB | | loss apart |",
        "|" + "---|" * 11,
    ]

    def times(ratio: float | None) -> str:
        return "" if ratio is None else f"{ratio:.1f}×"

    for r in found["results"]:
        noise = f" (noisy: others used {r['cores_of_others']:.1f} cores)" if r["cores_of_others"] > NOISY else ""
        lines.append(
            f"| {r['prompt']} | {r['label']} | {r['seconds']:.2f} ({r['seconds_low']:.2f} to {r['seconds_high']:.2f})"
            f"{noise} | {times(r['seconds_ratio'])} | {r['cpu_seconds']:.2f} | {times(r['cpu_seconds_ratio'])} | "
            f"{r['peak_mb']:,.0f} | {times(r['peak_mb_ratio'])} | "
            f"{r['above_mb']:,.0f} | {times(r['above_mb_ratio'])} | "
            + ("" if r["loss_difference"] is None else f"{r['loss_difference']:.0e}")
            + " |"
        )
    return "\n".join(lines)


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def _machine(threads: int) -> dict[str, Any]:
    cpu = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        names = [
            line.split(":", 1)[1].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if "model name" in line
        ]
        cpu = names[0] if names else cpu
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9
    return {"cpu": cpu, "cores": os.cpu_count(), "memory_gb": round(memory, 1), "threads": threads}


if __name__ == "__main__":
    sys.exit(main())
