"""What runs hold and compute in, and the share of weights they change: every algorithm, full, LoRA and NF4, every mode.

    python experiments/precision/table.py OUT [--modes single,fsdp] [--kinds full,lora]

Makes a small Llama with random weights and records for it in OUT, trains each algorithm on it in bfloat16 for two steps
of AdamW at a learning rate of 1e-5, in one process or two, and writes OUT/table.json and OUT/table.md. Dtypes are those
that each run found by a forward pass and that its checkpoint holds. Runs that are there are not done again. About
half an hour on two cores.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

from tests import tiny  # the small model and its records are those of the tests
from tests.training import many, precision, runs

MODES = ("single", "ddp", "fsdp", "zero1", "zero2", "zero3", "zero3_offload")


def measured(folder: Path, out: str) -> dict[str, Any]:
    """Of one run: dtypes, share of weights changed, and how far it begins from its reference."""
    found = json.loads((folder / out / "result.json").read_text())
    last, first = precision.checkpoint(folder, out, precision.STEPS), runs.metrics(folder, out)[0]
    states = {str(t.dtype).removeprefix("torch.") for s in last.values() for k, t in s.items() if k != "weight"}
    return {
        "engine": found["engine"],
        **found["precision"],
        "states": " and ".join(sorted(states)),
        "changed": round(precision.share_changed(folder, out), 4),
        "first_kl": max((abs(first[n]) for n in ("approx_kl", "kl") if n in first), default=None),
    }


def cell(found: dict[str, Any] | None) -> str:
    """As "f32/bf16, 100 %": weights, states, heads and reductions, where all are one, over products; the share."""
    if found is None:
        return "–"
    full = {found[k] for k in ("weights", "states", "heads", "reduced") if k in found}
    short = {"float32": "f32", "bfloat16": "bf16"}
    held = "+".join(sorted(short.get(f, f) for f in full))
    return f"{held}/{short.get(found['products'], found['products'])}, {100 * found['changed']:.1f} %"


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("out", type=Path)
    parser.add_argument("--modes", default=",".join(MODES))
    parser.add_argument("--kinds", default=",".join(precision.KINDS))
    arguments = parser.parse_args()
    modes, kinds, folder = arguments.modes.split(","), arguments.kinds.split(","), arguments.out.resolve()
    if not (folder / "base").exists():
        folder.mkdir(parents=True, exist_ok=True)
        runs.prepare(folder, **tiny.QUANTIZABLE)
    table: dict[str, dict[str, Any]] = {}
    for mode in modes:
        for kind in kinds:
            words = [*precision.KINDS[kind], *precision.WORDS, f"distributed={mode}"]
            names = {a: f"{a}-{mode}-{kind}" for a in runs.ALGORITHMS}
            todo = [a for a in names if not (folder / names[a] / "result.json").exists()]
            print(f"{mode} {kind}: {len(todo)} runs", flush=True)
            if mode == "single":
                for algorithm in todo:
                    runs.train(folder, algorithm, names[algorithm], "training.progress=off", *words)
            elif todo:
                many.together(folder, [{"algorithm": a, "out": names[a], "words": words} for a in todo])
            table |= {out: measured(folder, out) for out in names.values()}
            (folder / "table.json").write_text(json.dumps(table, indent=1) + "\n")
    lines = [f"| algorithm | trained | {' | '.join(modes)} |", f"|:--|:--|{':--|' * len(modes)}"]
    for algorithm in runs.ALGORITHMS:
        for kind in kinds:
            cells = [cell(table.get(f"{algorithm}-{mode}-{kind}")) for mode in modes]
            lines.append(f"| {algorithm} | {kind} | {' | '.join(cells)} |")
    (folder / "table.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
