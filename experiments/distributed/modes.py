"""Every algorithm in every mode of distribution, full, LoRA and QLoRA: final losses against one process.

    python experiments/distributed/modes.py OUT [--modes zero2,zero3] [--kinds full,lora,qlora]

Makes a small Llama with random weights and records for it in OUT, trains each algorithm for six AdamW steps in one
process, then in two processes in each mode, and writes OUT/modes.json and OUT/modes.md. The engine named is what the
engine itself reported to the run that used it. About 25 minutes on two cores.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

from tests import tiny  # the small model and its records are those of the tests
from tests.training import many, runs
from tests.training.distributed.test_modes import ENGINES, KINDS

ADAMW = ["optimizer=adamw", "optimizer.lr=1e-3"]


def jobs(mode: str, kinds: list[str]) -> list[dict[str, Any]]:
    return [
        {"algorithm": a, "out": f"{a}-{mode}-{k}", "words": [f"distributed={mode}", *ADAMW, *KINDS[k]]}
        for k in kinds
        for a in runs.ALGORITHMS
    ]


def final(folder: Path, out: str) -> tuple[float, str]:
    """A run's last loss, and its engine."""
    return runs.metrics(folder, out)[-1]["loss"], json.loads((folder / out / "result.json").read_text())["engine"]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("out", type=Path)
    parser.add_argument("--modes", default=",".join(ENGINES))
    parser.add_argument("--kinds", default=",".join(KINDS))
    arguments = parser.parse_args()
    modes, kinds, folder = arguments.modes.split(","), arguments.kinds.split(","), arguments.out.resolve()
    if not (folder / "base").exists():
        folder.mkdir(parents=True, exist_ok=True)
        runs.prepare(folder, **tiny.QUANTIZABLE)
    for mode in ("single", *modes):
        todo = [job for job in jobs(mode, kinds) if not (folder / job["out"] / "result.json").exists()]
        print(f"{mode}: {len(todo)} runs", flush=True)
        if todo and mode == "single":
            for job in todo:
                runs.train(folder, job["algorithm"], job["out"], "training.progress=off", *job["words"])
        elif todo:
            many.together(folder, todo)
    rows: list[dict[str, Any]] = []
    for kind in kinds:
        for algorithm in runs.ALGORITHMS:
            alone, _ = final(folder, f"{algorithm}-single-{kind}")
            row: dict[str, Any] = {"algorithm": algorithm, "trained": kind, "single": alone}
            for mode in modes:
                loss, engine = final(folder, f"{algorithm}-{mode}-{kind}")
                row[mode] = {"loss": loss, "difference": loss - alone, "engine": engine}
            rows.append(row)
    (folder / "modes.json").write_text(json.dumps(rows, indent=1))
    lines = ["| algorithm | trained | loss, 1 process | " + " | ".join(f"{m}, 2: Δ" for m in modes) + " |"]
    lines.append("|---" * (3 + len(modes)) + "|")
    for row in rows:
        cells = [f"{row[m]['difference']:+.0e}" for m in modes]
        lines.append(f"| {row['algorithm']} | {row['trained']} | {row['single']:.6f} | {' | '.join(cells)} |")
    lines += ["", *(f"{m}: {', '.join(sorted({r[m]['engine'] for r in rows}))}" for m in modes)]
    (folder / "modes.md").write_text("\n".join(lines) + "\n")
    worst = {m: max(abs(r[m]["difference"]) for r in rows) for m in modes}
    print(json.dumps({"runs": len(rows) * len(modes), "largest_difference": worst}))


if __name__ == "__main__":
    main()
