"""How long it takes from the command to its first words, and to the first step of a training run."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

from measuring.processes import Case
from measuring.report import Measured, Part, Summary, Target
from measuring.work import SMALL_SHAPE, Scale, Words, model_folder, text_of

HELP, TRAIN = 0.5, 8.0


def command() -> list[str]:
    """The installed command, where it is beside this Python."""
    script = Path(sys.executable).with_name("alignlab")
    return [str(script)] if script.exists() else [sys.executable, "-c", "import alignlab.cli as c; c.main()"]


def help_text(scale: Scale) -> dict[str, Any]:
    """Seconds of `alignlab --help`, each a process."""
    took = []
    for _ in range(6):
        start = time.perf_counter()
        subprocess.run([*command(), "--help"], check=True, stdout=subprocess.DEVNULL)
        took.append(time.perf_counter() - start)
    return {"seconds": took[1:]}


def first_step(scale: Scale) -> dict[str, Any]:
    """Seconds from the command `alignlab train` to the first line of metrics.jsonl, on a tiny model."""
    took = []
    words = Words(SMALL_SHAPE.vocabulary)
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "data.jsonl"
        records = [{"prompt": text_of(words.ids(32)), "completion": text_of(words.ids(16))} for _ in range(64)]
        data.write_text("".join(json.dumps(record) + "\n" for record in records))
        model = model_folder(scale.folder, SMALL_SHAPE)
        for number in range(3):
            out = Path(folder) / f"run-{number}"
            words_of = ["train", "algorithm=sft", f"model={model}", "data=demonstrations", f"data.path={data}"]
            words_of += [f"out={out}", "training.steps=1000", "training.batch_size=4", "training.epochs=null"]
            with (Path(folder) / "said.txt").open("w") as said:
                start = time.perf_counter()
                process = subprocess.Popen(
                    [*command(), *words_of], stdout=said, stderr=subprocess.STDOUT, start_new_session=True
                )
                while not _has_line(out / "metrics.jsonl"):
                    if process.poll() is not None:
                        raise SystemExit((Path(folder) / "said.txt").read_text()[-2000:])
                    time.sleep(0.005)
                took.append(time.perf_counter() - start)
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    return {"seconds": took[1:]}


def _has_line(file: Path) -> bool:
    try:
        return b"\n" in file.read_bytes()
    except OSError:
        return False


def cases(scale: Scale) -> list[Case]:
    return [
        Case("help", "alignlab --help", "start", help_text, slow=True),
        Case("train", "alignlab train, to its first step", "start", first_step, slow=True),
    ]


def summarise(scale: Scale, cases: Sequence[Case], measured: Sequence[Measured]) -> Summary:
    summary = Summary(table=["| command | seconds (range) |", "|:--|--:|"])
    for case, wanted in zip(cases, (HELP, TRAIN), strict=True):
        runs = [m.figures for m in measured if m.key == case.key]
        failed = [m["failed"] for m in runs if "failed" in m]
        summary.problems += [f"startup: {case.label}: {f.strip().splitlines()[-1]}" for f in failed]
        took = [s for m in runs for s in m.get("seconds", [])]
        if took:
            summary.table.append(f"| {case.label} | {median(took):.2f} ({min(took):.2f} to {max(took):.2f}) |")
        measured_seconds = median(took) if took else math.nan
        summary.targets.append(
            Target("startup", "a tiny model", case.label, "seconds", wanted, measured_seconds, at_least=False)
        )
    return summary


PART = Part("startup", "Start-up", cases, summarise)
