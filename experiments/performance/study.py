"""What alignlab's core costs beside the usual trainers: seconds, memory, share of what the machine can do.

    python experiments/performance/study.py                        # everything; 25 minutes on two quiet cores
    python experiments/performance/study.py --only dpo share       # some parts
    python experiments/performance/study.py --small                # everything, tiny: does it run?
    python experiments/performance/study.py --device cuda --model 1b
    python experiments/performance/study.py --small --threads 1 --record    # new ratios for `make guard`

Each measurement is a process of its own; those that are compared take turns. Prints Markdown; writes everything as JSON
to `--out`, and with `--write` to results.json beside this script, and the tables into README.md.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from measuring import gauge, guard, processes
from measuring.parts import PARTS
from measuring.processes import Case, Failed
from measuring.report import Measured, Part, Summary, target_lines
from measuring.work import Scale, describe, scale

HERE = Path(__file__).resolve().parent
OUT = Path("runs/performance/study.json")
BEGIN, END = "<!-- study: written by study.py --write -->", "<!-- end of study -->"


def main() -> int:
    asked = _arguments()
    chosen = [PARTS[name] for name in PARTS if name in asked.only]
    with tempfile.TemporaryDirectory() as folder:
        sizes = scale(asked.small, asked.device, asked.model, Path(folder), asked.threads, asked.steps)
        processes.prepare(sizes)
        found = study(chosen, sizes, asked.repeats)
    asked.out.parent.mkdir(parents=True, exist_ok=True)
    asked.out.write_text(_json(found))
    text = markdown(found)
    print(text)
    print(f"\nEverything measured: {asked.out}", file=sys.stderr)
    if asked.write:
        (HERE / "results.json").write_text(_json(found))
        readme = HERE / "README.md"
        readme.write_text(inserted(readme.read_text(), text))
    if asked.record:
        (HERE / "guard.json").write_text(_json({"versions": found["versions"], "ratios": guard.ratios(found)}))
    for problem in found["problems"]:
        print(problem, file=sys.stderr)
    return 1 if found["problems"] else 0


def study(parts: list[Part], sizes: Scale, repeats: int) -> dict[str, Any]:
    """Measure the parts; everything that is to be known of it, as JSON can hold it."""
    from rich.console import Console
    from rich.markup import escape
    from rich.progress import Progress, TextColumn, TimeElapsedColumn

    found: dict[str, Any] = {
        "machine": gauge.machine(sizes.device, sizes.threads),
        "versions": gauge.versions(),
        "scale": describe(sizes),
        "parts": {},
        "targets": [],
        "problems": [],
    }
    plans = {part.name: _plan(part, sizes, repeats, found["problems"]) for part in parts}
    columns = TextColumn("{task.description}"), TextColumn("{task.completed}/{task.total}"), TimeElapsedColumn()
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task("", total=sum(map(len, plans.values())))
        for part in parts:
            measured: list[Measured] = []
            begun = time.monotonic()
            for repeat, case in plans[part.name]:
                progress.update(task, description=escape(f"{part.name}: {case.work}: {case.label}"))
                start = time.monotonic()
                try:
                    figures = processes.measure(case, sizes)
                except Failed as error:
                    figures = {"failed": str(error)}
                measured.append(Measured(case.work, case.key, repeat, figures))
                took = f"{time.monotonic() - start:.0f} s"
                outcome = " FAILED" if "failed" in figures else ""
                progress.console.print(
                    f"{part.name}: {case.work}: {case.label}: {took}{outcome}", highlight=False, soft_wrap=True
                )
                progress.advance(task)
            cases = part.cases(sizes)
            summary = part.summarise(sizes, cases, measured)
            _keep(found, part, summary, measured, time.monotonic() - begun)
    return found


def _plan(part: Part, sizes: Scale, repeats: int, problems: list[str]) -> list[tuple[int, Case]]:
    """The cases in the order in which they are measured: round by round, slow ones in the first alone."""
    cases = part.cases(sizes)
    lacking = {reason for case in cases if (reason := processes.missing(case.needs))}
    problems += [f"{part.name}: {reason}; what needs it is left out" for reason in sorted(lacking)]
    cases = [case for case in cases if not processes.missing(case.needs)]
    works = dict.fromkeys(case.work for case in cases)
    return [
        (repeat, case)
        for work in works
        for repeat in range(repeats)
        for case in cases
        if case.work == work and (repeat == 0 or not case.slow)
    ]


def _keep(found: dict[str, Any], part: Part, summary: Summary, measured: list[Measured], took: float) -> None:
    found["parts"][part.name] = {
        "title": part.title,
        "took_seconds": round(took, 1),
        "rows": [asdict(row) for row in summary.rows],
        "table": summary.table,
        **summary.more,
        "measurements": [asdict(m) for m in measured],
    }
    found["targets"] += [asdict(t) | {"met": t.met, "key": t.key} for t in summary.targets]
    found["problems"] += summary.problems


def _json(found: dict[str, Any]) -> str:
    """NaN, which JSON does not have, becomes null."""

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {k: plain(v) for k, v in value.items()}
        if isinstance(value, list | tuple):
            return [plain(v) for v in value]
        return None if isinstance(value, float) and not math.isfinite(value) else value

    return json.dumps(plain(found), indent=1, ensure_ascii=False) + "\n"


def markdown(found: dict[str, Any]) -> str:
    """Targets, then the table of each part."""
    from measuring.report import Target

    machine, versions = found["machine"], found["versions"]
    names = {"part", "work", "against", "quantity", "wanted", "measured", "cpu", "least", "at_least"}
    targets = [Target(**{k: v for k, v in t.items() if k in names}) for t in found["targets"]]
    model = found["scale"]["model"]
    lines = [
        f"{machine.get('gpu', machine['cpu'])}, {machine['cores']} cores, {machine['threads']} threads; "
        + ", ".join(f"{name} {version}" for name, version in versions.items())
        + f"; a Llama of {model['layers']} layers of width {model['hidden']}, V = {model['vocabulary']:,}, "
        f"{found['scale']['dtype']}. Ratios are other / alignlab.",
        "",
        *target_lines(targets),
    ]
    for part in found["parts"].values():
        lines += ["", f"### {part['title']}", "", *part["table"]]
    return "\n".join(lines)


def inserted(readme: str, text: str) -> str:
    """The README with the study's tables in their place."""
    before, found, rest = readme.partition(BEGIN)
    _, ended, after = rest.partition(END)
    if not found or not ended:
        raise SystemExit(f"README.md: there is no place for the tables: it is between {BEGIN!r} and {END!r}")
    return f"{before}{BEGIN}\n\n{text}\n\n{END}{after}"


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = list(PARTS)
    parser.add_argument("--only", nargs="+", choices=names, default=names, metavar="PART", help=", ".join(names))
    parser.add_argument("--small", action="store_true", help="tiny models and one repeat: under four minutes")
    parser.add_argument("--repeats", type=int, metavar="N", help="rounds of what is not slow (2; small: 1)")
    parser.add_argument("--steps", type=int, metavar="N", help="measured steps in a process, after one of warm-up (3)")
    parser.add_argument("--threads", type=int, default=2, metavar="N", help="CPU threads (2)")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--model", choices=("21m", "1b"), default="21m")
    parser.add_argument("--out", type=Path, default=OUT, metavar="FILE", help=f"({OUT})")
    parser.add_argument("--write", action="store_true", help="also to results.json and README.md of this folder")
    parser.add_argument("--record", action="store_true", help="the ratios that `make guard` holds on to")
    asked = parser.parse_args()
    if asked.record:
        asked.only = [name for name in asked.only if name in guard.PARTS]
    asked.repeats = asked.repeats or (1 if asked.small else 2)
    return asked


if __name__ == "__main__":
    sys.exit(main())
