"""How a graph on a cluster goes: each part's state, why it waits, how far it is, where its log is; and its end."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from alignlab.comparison.collect import is_current
from alignlab.comparison.graph.ledger import EVALUATE, FILE, REPORT, Entry, Ledger
from alignlab.comparison.graph.node import PLAN, altered, is_result, last_words, planned, read
from alignlab.comparison.report import Cell, Table
from alignlab.core import AlignlabError
from alignlab.core.files import read_lines
from alignlab.launch.slurm import commands
from alignlab.launch.slurm.commands import QUEUED, State
from alignlab.training.run_folder import RESULT

DONE, RUNNING, WAITING, FAILED, CANCELLED, BLOCKED, OPEN = (
    *("done", "running", "waiting", "failed", "cancelled"),
    *("not run", "not submitted"),
)

WHY = {
    "TIMEOUT": "the time limit came before it could save: give it more, or more of launcher.signal_delay_s",
    "OUT_OF_MEMORY": "it needs more main memory: launcher.mem_gb",
    "NODE_FAIL": "its node failed",
    "BOOT_FAIL": "its node did not start",
    "DEADLINE": "its deadline passed",
}
"""What Slurm's words for an end mean, where the log cannot say."""


@dataclass(frozen=True)
class Part:
    """Where a part of a graph stands.

    Attributes:
        state: done, running, waiting, failed, cancelled, not run, or not submitted.
        why: why it waits, or what it failed of.
        job: Slurm's id of its last attempt.
        progress: of a training run, as in "step 30 of 300".
        log: where it writes.
    """

    name: str
    state: str
    why: str = ""
    job: str = ""
    nodes: str = ""
    elapsed: str = ""
    progress: str = ""
    log: str = ""


def parts(out: Path) -> list[Part]:
    """All parts of a comparison that was submitted, in the order of its graph.

    Raises:
        AlignlabError: none was submitted there, or Slurm does not answer.
    """
    ledger = Ledger.read(out)
    if not ledger.graph:
        raise AlignlabError(f"{out}: nothing was submitted from here (there is no {FILE}): see `alignlab submit`")
    known = ledger.states()
    found: dict[str, Part] = {}
    for name, parents in ledger.graph.items():
        entry = ledger.entries.get(name)
        found[name] = _part(out, name, entry, known.get(name), [found[p] for p in parents if p in found])
    return list(found.values())


def _part(out: Path, name: str, entry: Entry | None, state: State | None, parents: Sequence[Part]) -> Part:
    if _done(out, name, entry) and not (state and state.active):
        why = altered(out / name) if name != REPORT else ""
        return Part(name, DONE, why, entry.id if entry else "", elapsed=state.elapsed if state else "")
    if entry is None:
        return Part(name, OPEN)
    log = entry.log if Path(entry.log).exists() else ""
    if state is None:
        why = last_words(Path(log)) if log else "Slurm no longer knows its job"
        return Part(name, FAILED, why, entry.id, log=log)
    part = {"job": entry.id, "nodes": state.nodes, "elapsed": state.elapsed, "log": log}
    if state.active:
        progress = _progress(out / entry.folder) if name != REPORT and not name.endswith(EVALUATE) else ""
        before = [_said(p.name, name) for p in parents if p.state != DONE]
        why = f"after {', '.join(before)}" if state.reason == "Dependency" and before else state.reason
        if name == REPORT and before:
            why = "when all others have ended"
        return Part(name, WAITING if state.state in QUEUED else RUNNING, why, progress=progress, **part)
    lost = [_said(p.name, name) for p in parents if p.state in (FAILED, CANCELLED, BLOCKED)]
    if state.state == "CANCELLED" and lost:
        return Part(name, BLOCKED, f"needs {', '.join(lost)}", entry.id)
    if state.state == "CANCELLED":
        return Part(name, CANCELLED, **part)
    why = WHY.get(state.state) or (last_words(Path(log)) if log else "")
    return Part(name, FAILED, f"{state.state}: {why}" if why else state.state, **part)


def _said(parent: str, part: str) -> str:
    return "its training" if part == parent + EVALUATE else parent.removeprefix("runs/")


def _done(out: Path, name: str, entry: Entry | None) -> bool:
    """Whether a task's result is there, as it was last planned."""
    if name == REPORT:
        return is_current(out)
    if is_result(out, name.removesuffix(EVALUATE)):
        return True
    here = read(out / name / PLAN)  # there is none of an evaluation apart
    trained = bool(here) and here.get("key") == planned(out).get(name) and bool(read(out / name / RESULT))
    commands = here.get("commands")
    return trained and any(c[:1] == ["evaluate"] for c in (commands if isinstance(commands, list) else []))


def _progress(folder: Path) -> str:
    """How far a training run is, by its metrics and its settings."""
    try:
        last = read_lines(folder / "metrics.jsonl", {"step": int})[-1][1]
        training = read(folder / PLAN)["commands"][0][1]["training"]
    except (AlignlabError, KeyError, IndexError, TypeError):  # it has not begun, or is writing
        return ""
    ends = ("steps", "epochs", "max_trained_tokens", "max_generated_tokens", "max_seconds")
    limits = {
        "epoch": training.get("epochs") or (None if any(training.get(name) for name in ends) else 1),
        "trained_tokens": training.get("max_trained_tokens"),
        "generated_tokens": training.get("max_generated_tokens"),
        "seconds": training.get("max_seconds"),
    }
    shares = [f"{last[k]:.4g} of {v:,} {k.replace('_', ' ')}" for k, v in limits.items() if v and k in last]
    steps = f"step {last['step']}" + (f" of {training['steps']}" if training.get("steps") else "")
    return ", ".join([steps, *shares])


def show(out: Path) -> int:
    """Print the parts of a comparison; 1 where one failed, else 0."""
    from rich.console import Console

    found = parts(out)
    counts = {state: sum(p.state == state for p in found) for state in dict.fromkeys(p.state for p in found)}
    rows = []
    for p in found:
        told = [p.nodes if p.state == RUNNING else "", p.progress, p.why if p.state in (WAITING, BLOCKED, DONE) else ""]
        texts = (p.name.removeprefix("runs/"), p.state, p.job, p.elapsed, ", ".join(t for t in told if t))
        rows.append([Cell(text, kind=p.state) for text in texts])
    screen = Console()
    screen.print(Table("Parts", ["part", "state", "job", "time", ""], rows).rich(fold=True))
    screen.print(f"\n{out}: " + ", ".join(f"{n} {state}" for state, n in counts.items()), markup=False, highlight=False)
    for p in found:
        if p.state in (RUNNING, FAILED, CANCELLED) and (p.log or p.why):
            text = f"{p.name}: {p.why + ' ' if p.why else ''}({p.log or 'no log'})"
            screen.print(text, markup=False, highlight=False, soft_wrap=True)
    again = [p for p in found if p.state in (FAILED, CANCELLED, BLOCKED, OPEN)]
    if again:
        screen.print("the same command hands over again what is not done", markup=False)
    elif counts.get(DONE) == len(found):
        screen.print(f"leaderboard: {out}/leaderboard.md, report: {out}/report.html", markup=False, soft_wrap=True)
    return 1 if any(p.state == FAILED for p in found) else 0


def as_json(folders: Sequence[Path]) -> str:
    """The parts of comparisons for programs, by folder."""
    return json.dumps({str(out): [asdict(part) for part in parts(out)] for out in folders}, indent=2)


def cancel(out: Path) -> None:
    """Cancel what is in the queue or going on, and say what that was.

    Raises:
        AlignlabError: nothing was submitted there, or Slurm does not answer.
    """
    ledger = Ledger.read(out)
    if not ledger.graph:
        raise AlignlabError(f"{out}: nothing was submitted from here (there is no {FILE})")
    active = ledger.active()
    commands.cancel([entry.id for entry in active.values()])
    print(f"{out}: {len(active)} jobs cancelled{': ' if active else ''}{', '.join(active)}")
    if active:
        print("what was done stays; the same command goes on from there")


def submitted(root: Path = Path("runs")) -> list[Path]:
    """The comparisons below a folder that were submitted."""
    return sorted(path.parent for path in root.glob(f"*/{FILE}"))
