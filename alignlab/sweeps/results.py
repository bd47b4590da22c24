"""What the runs of a sweep have come to, put together: sweep.json, sweep.csv, sweep.md, sweep.html and a table."""

from __future__ import annotations

import math
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import TypeAdapter, ValidationError

from alignlab.benchmarks.evaluate import without_nan
from alignlab.comparison.collect import BOARD, is_complete
from alignlab.comparison.graph.node import Outcome, altered, outcome, planned, read, write_plan
from alignlab.comparison.report import METRICS, MISSING, Cell, Table, csv_text, format_number, plain
from alignlab.core import AlignlabError, did_you_mean
from alignlab.core.errors import one_line, shorten
from alignlab.core.files import read_json, read_lines, write_json, write_text
from alignlab.core.storage import storage_errors
from alignlab.sweeps.combinations import Combination
from alignlab.sweeps.settings import GridSettings, OptunaSettings, Sweeper
from alignlab.training.callbacks.pruning import PRUNED, Direction
from alignlab.training.run_folder import RESULT

if TYPE_CHECKING:
    from rich.console import Console

FILE = "sweep.json"
STATES = ("finished", "pruned", "failed", "unfinished")
USUAL = ("objective_score", "reward", "eval/loss", "loss")
"""What runs are compared by where nothing is said: the first of these that there is."""

NO_METRICS = ("step", "time")
"""Numbers in metrics.jsonl that say where a line belongs."""

NOTED = ("name", "values", "overrides")
"""What sweep.json says of a run before it has come to anything."""

SHOWN = 30
"""Rows that the terminal shows."""


@dataclass
class Run:
    """One of the sweep's.

    Attributes:
        name: of its folder within the sweep's.
        values: what varies, by key, as written on the command line.
        overrides: what `alignlab COMMAND` must be given to do the same.
        value: that of the metric which the runs are compared by.
    """

    name: str
    values: dict[str, str]
    overrides: list[str]
    state: str = "unfinished"
    value: float | None = None
    metrics: dict[str, float] | None = None
    reason: str = ""
    log: str = ""


@dataclass
class Results:
    """A sweep as it stands.

    Attributes:
        command: train or compare.
        own: the user's folder of configs.
        metric, direction: what the runs are compared by; the metric is None where none of the usual ones is there.
        runs: the best first, then those that were pruned, that failed, that are unfinished.
    """

    folder: Path
    command: str
    own: str | None
    metric: str | None
    direction: str
    runs: list[Run]

    @property
    def best(self) -> Run | None:
        first = self.runs[0] if self.runs else None
        return first if first is not None and first.state == "finished" and first.value is not None else None

    @property
    def varied(self) -> list[str]:
        """The keys that take several values, or all where none does."""
        keys = list(dict.fromkeys(key for run in self.runs for key in run.values))
        return [k for k in keys if len({run.values.get(k) for run in self.runs}) > 1] or keys

    def counts(self) -> str:
        """`10 finished, 2 pruned`."""
        found = [(sum(run.state == state for run in self.runs), state) for state in STATES]
        return ", ".join(f"{n} {state}" for n, state in found if n)

    def reproduce(self, run: Run) -> str:
        """The command that does a run by itself."""
        options = [] if self.own is None else ["--config-dir", self.own]
        return " ".join(_quoted(word) for word in ("alignlab", self.command, *options, *run.overrides))


def _quoted(word: str) -> str:
    """For a shell; in double quotes where the word has single ones."""
    return f'"{word}"' if "'" in word and not re.search(r'["$`\\!]', word) else shlex.quote(word)


def note(folder: Path, command: str, own: Path | None, sweeper: Sweeper, combinations: Sequence[Combination]) -> None:
    """Write down what a sweep consists of, so that its results can be put together whatever happens to it."""
    with storage_errors(folder, "the sweep could not be written"):
        folder.mkdir(parents=True, exist_ok=True)
        write_json(
            folder / FILE,
            {
                "command": command,
                "own": str(own) if own else None,
                "sweeper": sweeper.model_dump(),
                "runs": [{"name": c.name, "values": c.values, "overrides": c.overrides} for c in combinations],
            },
        )
        write_plan(folder, [c.node for c in combinations])


def gather(folder: Path) -> Results:
    """Look at every run of the sweep in `folder`, and write `sweep.json`, `.csv`, `.md` and `.html` there.

    Raises:
        AlignlabError: there is no sweep, or no run has the metric that was asked for; then what there is.
    """
    advice = "is this the folder of a sweep? The command that made it writes it anew"
    plan = read_json(folder / FILE, advice, {"command": str, "sweeper": dict, "runs": list})
    try:
        noted = [{k: each.get(k) for k in NOTED} if isinstance(each, dict) else each for each in plan["runs"]]
        runs = TypeAdapter(list[Run]).validate_python(noted)
        sweeper = TypeAdapter(GridSettings | OptunaSettings).validate_python(plan["sweeper"]).model_dump()
    except ValidationError as error:
        raise AlignlabError(f"{folder / FILE}: damaged: {shorten(error)}: {advice}") from error
    command = plan["command"]
    keys = planned(folder)
    for run in runs:
        found = state_of(command, folder / run.name, keys.get(run.name))
        run.state, run.reason, run.log = found.state, found.reason, found.log
        run.metrics = metrics_of(command, folder / run.name)
    metric = chosen_metric([r.metrics or {} for r in runs if r.state == "finished"], sweeper["metric"])
    direction = sweeper["direction"] or direction_of(metric or "")
    for run in runs:
        value = (run.metrics or {}).get(metric or "")
        run.value = value if value is not None and math.isfinite(value) else None
    sign = 1 if direction == "minimize" else -1
    runs.sort(key=lambda r: (STATES.index(r.state), r.value is None, sign * (r.value or 0)))
    results = Results(folder, command, plan.get("own"), metric, direction, runs)
    _write(results, plan)
    return results


def state_of(command: str, folder: Path, key: str | None) -> Outcome:
    """What a run has come to: finished, pruned, failed or unfinished."""
    found = outcome(folder, key)
    if found.state != "done":
        return found
    if what := altered(folder):
        return Outcome("failed", f"{what}; to have it again, delete {folder} and run the sweep again")
    if command == "compare" and not is_complete(folder):
        return Outcome("unfinished")
    return Outcome("pruned" if (folder / PRUNED).exists() else "finished")


def metrics_of(command: str, folder: Path) -> dict[str, float]:
    """Everything measured of a run: its evaluation, else the last line of metrics.jsonl that has it, else
    evaluation.json; of a comparison, what stands in the first row of its leaderboard."""
    if command == "compare":
        rows = read(folder / BOARD).get("rows")
        return _numbers(rows[0]) if isinstance(rows, list) and rows else {}
    found = _numbers(read(folder / "evaluation.json"))
    for _, line in read_lines(folder / "metrics.jsonl", {}):
        found |= _numbers(line)
    result = read(folder / RESULT) or read(folder / PRUNED)
    found |= _numbers(result) | _numbers(result.get("evaluation"))
    return {k: v for k, v in found.items() if k not in NO_METRICS} | _numbers({"steps": result.get("step")})


def _numbers(values: Any) -> dict[str, float]:
    if not isinstance(values, dict):
        return {}
    return {k: v for k, v in values.items() if isinstance(v, int | float) and not isinstance(v, bool)}


def chosen_metric(measured: Sequence[Mapping[str, float]], wanted: str | None) -> str | None:
    """What finished runs are compared by.

    Raises:
        AlignlabError: none has the one that is wanted.
    """
    there = {name for each in measured for name in each}
    if wanted is None:
        return next((name for name in USUAL if name in there), None)
    if there and wanted not in there:
        raise AlignlabError(
            f"sweeper.metric={wanted}: no run has it{did_you_mean(wanted, there)}; there are: "
            f"{', '.join(sorted(there))}. The same command with another sweeper.metric runs nothing again"
        )
    return wanted


def direction_of(metric: str) -> Direction:
    """Which way is better, by a metric's name."""
    name = metric.rpartition("/")[2]
    known = METRICS.get(name)
    low = known.better < 0 if known else any(part in name for part in ("loss", "nll", "perplexity", "error"))
    return "minimize" if low else "maximize"


def _write(results: Results, plan: Mapping[str, Any]) -> None:
    from alignlab.sweeps.page import render

    best = results.best
    told = {
        **plan,
        "metric": results.metric,
        "direction": results.direction,
        "best": best.name if best else None,
        "counts": {s: sum(r.state == s for r in results.runs) for s in STATES},
        "runs": [asdict(run) for run in results.runs],
    }
    with storage_errors(results.folder, "the sweep's results could not be written"):
        write_json(results.folder / FILE, without_nan(told))
        write_text(results.folder / "sweep.csv", to_csv(results))
        write_text(results.folder / "sweep.md", to_markdown(results))
        write_text(results.folder / "sweep.html", render(results))


def heading(results: Results) -> str:
    arrow = "↓" if results.direction == "minimize" else "↑"
    return f"{results.metric} {arrow}" if results.metric else "metric"


def shortest(keys: Sequence[str]) -> dict[str, str]:
    """Keys' last parts, where they tell them apart."""
    last = [key.rpartition(".")[2] for key in keys]
    return {key: short if last.count(short) == 1 else key for key, short in zip(keys, last, strict=True)}


def table(results: Results) -> Table:
    """The runs: name, what varies, the metric, state, seconds."""
    head = ["run", *shortest(results.varied).values(), heading(results), "state", "time s"]
    rows = []
    for run in results.runs:
        varied = [short_value(run.values.get(key, MISSING)) for key in results.varied]
        value, seconds = format_number(run.value, 4), format_number((run.metrics or {}).get("seconds"), None)
        kind = "best" if run is results.best else run.state
        rows.append([Cell(text, kind=kind) for text in (run.name, *varied, value, run.state, seconds)])
    return Table("Runs of the sweep", head, rows)


def short_value(text: str) -> str:
    """A value as in a table: long numbers to four digits."""
    try:
        return f"{float(text):.4g}" if len(text) > 8 else text
    except ValueError:
        return text


def to_csv(results: Results) -> str:
    """One line for each run, numbers in full: what varies, the state, and everything that was measured."""
    known = dict.fromkeys(name for run in results.runs for name in run.metrics or {})
    rows: list[list[Any]] = [["run", "state", *results.varied, *known, "reason"]]
    for run in results.runs:
        values = [run.values.get(k, "") for k in results.varied]
        measured = [(run.metrics or {}).get(k, "") for k in known]
        rows.append([run.name, run.state, *values, *measured, run.reason])
    return csv_text(rows)


def to_markdown(results: Results) -> str:
    failed = [f"* {plain(run.name)}: {plain(run.reason)}" for run in results.runs if run.state == "failed"]
    best = told_best(results)
    told = [plain(best[0]), f"    {one_line(best[1].strip())}"] if best else []  # indented: as it is
    parts = [f"# Sweep: {plain(results.folder.resolve().name)}", results.counts(), *told]
    parts += [table(results).markdown(), *(["Failed:\n\n" + "\n".join(failed)] if failed else [])]
    return "\n\n".join(parts) + "\n"


def told_best(results: Results) -> list[str]:
    """The best run, and how to do it by itself; nothing where there is none."""
    best = results.best
    if best is None:
        return []
    where = f"{results.folder / best.name}"
    return [f"best: {best.name}: {results.metric} {best.value:.6g} → {where}", f"    {results.reproduce(best)}"]


def show(results: Results, console: Console | None = None) -> None:
    """Print the table, the best run, and what failed and why."""
    from rich.console import Console

    console = console or Console()
    shown = table(results)
    console.print(replace(shown, rows=shown.rows[:SHOWN]).rich(fold=True))

    def say(text: str, style: str = "") -> None:
        console.print(text, style=style, markup=False, highlight=False, soft_wrap=True)

    if more := results.runs[SHOWN:]:
        say(f"and {len(more)} more: {results.folder}/sweep.md", "dim")
    say(results.counts())
    for text in told_best(results):
        say(text)
    for run in results.runs:
        if run.state == "failed":
            say(f"failed: {run.name}: {run.reason}{f' (log: {run.log})' if run.log else ''}")
    say(f"{results.folder}/{FILE}, .csv, .md and .html")


def rebuild(folder: Path) -> None:
    """The results again from what is on disk, printed."""
    show(gather(folder))
