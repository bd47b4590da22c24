"""Whether alignlab is right on this machine's GPU: a JSON line for each part, on stdout and in --out.

    python experiments/gpu/check.py --out experiments/gpu/h200.jsonl    # at most 8 minutes on one GPU
    python experiments/gpu/check.py --device cpu                        # the same, tiny, on a CPU
    python experiments/gpu/check.py --only flex train                   # some of it

Each part has a process of its own and a time-out. A part that fails, crashes or hangs is a line with its reason and the
rows that it had reported; the next one goes on. Progress goes to stderr. The status is 0 where nothing failed.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import resource
import signal
import sys
import tempfile
import time
import traceback
from contextlib import suppress
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parents[1])]

from checks.work import Size, Skip, size_of  # noqa: E402


@dataclass(frozen=True)
class Part:
    """A function of a module in `checks`, and the seconds that it may take on a GPU."""

    name: str
    where: str
    seconds: float


PARTS = (
    Part("model", "work.make_model", 40),
    Part("versions", "machine.versions", 30),
    Part("train", "training.train", 150),
    Part("load", "training.load", 60),
    Part("decode", "training.decode", 60),
    Part("quantized", "training.quantized", 60),
    Part("shortage", "training.shortage", 60),
    Part("processes", "commands.processes", 120),
    Part("resume", "commands.resume", 90),
    Part("plan", "commands.plan", 60),
    Part("flex", "machine.flex", 150),
    Part("vllm", "commands.vllm", 120),
)
"""What matters most comes first: what is left when the time is over is not done."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--only", nargs="+", choices=[part.name for part in PARTS[1:]], metavar="PART")
    parser.add_argument("--out", type=Path, help="also write the lines to this file")
    parser.add_argument("--minutes", type=float, help="no part begins or goes on after so many (GPU: 8; CPU: 60)")
    asked = parser.parse_args()
    on_gpu = asked.device == "cuda"
    deadline = time.monotonic() + 60 * (asked.minutes or (8 if on_gpu else 60))
    lines = []
    with tempfile.TemporaryDirectory(prefix="alignlab-check-") as folder:
        size = size_of(asked.device, Path(folder))
        if not on_gpu:
            preload()
        for part in PARTS:
            if part is not PARTS[0] and part.name not in (asked.only or [part.name]):
                continue
            allowed = part.seconds * (1 if on_gpu else 10)  # CPUs are often busy with something else
            line = done(part, size, min(allowed, deadline - time.monotonic()))
            lines.append(line)
            print(json.dumps(line), flush=True)
            if asked.out:
                asked.out.write_text("".join(json.dumps(each) + "\n" for each in lines))
    return int(any(line["result"] == "failed" for line in lines))


def preload() -> None:
    """On a CPU parts are forks of this process. Those that use a GPU start anew: CUDA does not survive a fork."""
    os.environ |= {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}  # the model is too small for more threads
    for module in ("machine", "training", "commands"):
        import_module(f"checks.{module}")


def done(part: Part, size: Size, seconds: float) -> dict[str, Any]:
    """The line of a part: `result` is "ok", "failed" or "skipped", with a `reason`; `rows` are what it reported."""
    print(f"{part.name} …", file=sys.stderr, flush=True)
    if seconds <= 1:
        return {"part": part.name, "result": "failed", "reason": "no time was left for it", "seconds": 0.0, "rows": []}
    file = size.folder / f"{part.name}.rows"
    start, used = time.monotonic(), cpu_seconds()
    process = multiprocessing.get_context("spawn" if size.on_gpu else "fork").Process(
        target=work, args=(part, size, file)
    )
    process.start()
    process.join(seconds)
    late = process.is_alive()
    if process.pid is not None:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # what it has started, too
    process.join()
    rows = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    ended = [row.pop("ended") for row in rows if "ended" in row]
    reasons = [ended[0]["reason"]] if ended and "reason" in ended[0] else []
    reasons += [f"no end after {seconds:.0f} s"] if late else []
    if not ended and not late:
        code = process.exitcode or 0
        reasons.append(f"ended by {signal.Signals(-code).name}" if code < 0 else f"ended with status {code}")
    rows = [row for row in rows if row]
    bad = sum(row.get("ok") is False for row in rows)
    reasons += [f"{bad} of {len(rows)} rows are not as they must be"] if bad else []
    skipped = bool(ended and ended[0].get("skipped"))
    line = {"part": part.name, "result": "skipped" if skipped else "failed" if reasons else "ok"}
    line |= {"reason": "; ".join(reasons)} if reasons else {}
    took = {"seconds": time.monotonic() - start, "cpu_seconds": cpu_seconds() - used}
    return line | {name: round(value, 1) for name, value in took.items()} | {"rows": rows}


def cpu_seconds() -> float:
    """Of the parts that have ended, and of what they have waited for."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def work(part: Part, size: Size, file: Path) -> None:
    """In the part's process."""
    from alignlab.core.children import end_with_parent

    os.setsid()
    end_with_parent()
    os.dup2(2, 1)  # what libraries print is progress

    def write(row: dict[str, Any]) -> None:
        with file.open("a") as out:
            out.write(json.dumps(row, default=str) + "\n")

    def say(**row: Any) -> None:
        write(row)
        print(f"  {part.name}: {json.dumps(row, default=str)[:300]}", file=sys.stderr, flush=True)

    module, function = part.where.split(".")
    try:
        getattr(import_module(f"checks.{module}"), function)(size, say)
        write({"ended": {}})
    except Skip as reason:
        write({"ended": {"skipped": True, "reason": str(reason)}})
    except BaseException as error:
        traceback.print_exc()
        write({"ended": {"reason": f"{type(error).__name__}: {error}"[:1000]}})
    sys.stderr.flush()
    os._exit(0)


if __name__ == "__main__":
    sys.exit(main())
