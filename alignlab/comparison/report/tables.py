"""The leaderboard as CSV, as Markdown and on the terminal."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from alignlab.comparison.report.leaderboard import Leaderboard
from alignlab.comparison.report.metrics import MISSING, format_interval, format_number, metric
from alignlab.comparison.report.verdict import method, verdict

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table


def cell(board: Leaderboard, row: Mapping[str, Any], name: str) -> tuple[str, str]:
    """One metric as text: the mean, and its interval with, where some seeds lack it, the count of those that
    have it. `("0.953", "±0.012")`, `("–", "")`, `("0.412", "±0.020 (2 of 3 seeds)")`."""
    found = board.estimate(row, name)
    if found is None:
        return MISSING, ""
    decimals = metric(name).decimals
    interval = format_interval(found, decimals)
    if f"{name}_seeds" in row:
        interval += f" ({row[f'{name}_seeds']} of {len(row['seeds'])} seeds)"
    return format_number(found.mean, decimals), interval.strip()


def place(row: Mapping[str, Any]) -> str:
    """Rank and mark: `1`, `2 ≈` (not distinguishable from the best), `3 ?` (not testable), or a dash."""
    if row["rank"] is None:
        return MISSING
    mark = {True: " ≈", False: "", None: " ?"}[row["indistinguishable_from_best"]] if row["rank"] > 1 else ""
    return f"{row['rank']}{mark}"


def to_csv(board: Leaderboard) -> str:
    """One line per algorithm, numbers in full; a missing one is empty, seeds are separated by spaces."""
    keys = dict.fromkeys(["rank", "algorithm", *(key for row in board.rows for key in row)])
    out = io.StringIO()
    writer = csv.DictWriter(out, list(keys), restval="", lineterminator="\n")
    writer.writeheader()
    for row in board.rows:
        writer.writerow({**row, "seeds": " ".join(map(str, row["seeds"]))})
    return out.getvalue()


def to_markdown(board: Leaderboard) -> str:
    """A heading, the verdict, a pipe table and how it was made."""

    def line(cells: list[str]) -> str:
        return "| " + " | ".join(text.replace("|", "\\|") for text in cells) + " |"

    best = {name: board.best(name) for name in board.columns}
    table = [
        line(["#", "algorithm", "seeds", *(metric(name).heading for name in board.columns)]),
        line(["--:", ":--", *["--:"] * (1 + len(board.columns))]),
    ]
    for row in board.rows:
        cells = [place(row), row["algorithm"], str(len(row["seeds"]))]
        for name in board.columns:
            mean, interval = cell(board, row, name)
            mean = f"**{mean}**" if row["algorithm"] in best[name] else mean
            cells.append(f"{mean} {interval}".strip())
        table.append(line(cells))
    budget = f"{text}\n\n" if (text := budget_text(board)) else ""
    body = "\n".join(table)
    return f"# Leaderboard: {board.benchmark}\n\n{' '.join(verdict(board))}\n\n{budget}{body}\n\n{method(board)}\n"


def limits_text(board: Leaderboard) -> str:
    """What each run was allowed: `300 steps, 1,000,000 generated tokens`; what is not limited is left out."""
    return _items({key: value for key, value in board.budget.items() if key != "shared"})


def budget_text(board: Leaderboard) -> str:
    """What each run was allowed, and what was made once for all of them, in sentences."""
    limits, shared = limits_text(board), board.budget.get("shared")
    sentences = [f"Budget of each run: {limits}."] if limits else []
    if isinstance(shared, Mapping) and shared:
        sentences.append(f"Made once, before these runs, and used by all of them: {_items(shared)}.")
    return " ".join(sentences)


def _items(values: Mapping[str, Any]) -> str:
    """`300 steps, sft (51,588 trained tokens, 2.25 seconds)`; without what is null or 0."""
    texts = []
    for key, value in values.items():
        name = key.replace("_", " ")
        if isinstance(value, Mapping):
            texts.append(f"{name} ({inner})" if (inner := _items(value)) else name)
        elif type(value) is int and value:
            texts.append(f"{value:,} {name}")
        elif isinstance(value, float) and value:
            texts.append(f"{format_number(value, None) if value < 1e4 else f'{value:,.0f}'} {name}")
        elif value:
            texts.append(f"{name} {value}")
    return ", ".join(texts)


def print_leaderboard(board: Leaderboard, console: Console | None = None) -> None:
    """Print the table with the verdict above it. Where the terminal is narrow, intervals go below their means, and
    then the last columns are left out and named below."""
    from rich.console import Console
    from rich.text import Text

    console = console or Console()
    unbounded = console.options.update(max_width=10_000)
    shown, table = list(board.columns), _table(board, board.columns, " ")
    while shown and console.measure(table, options=unbounded).maximum > console.width:
        table = _table(board, shown, "\n")
        shown = shown if console.measure(table, options=unbounded).maximum <= console.width else shown[:-1]
    for sentence in verdict(board):
        console.print(Text(sentence))
    console.print(table)
    console.print(Text(method(board), style="dim"))
    if hidden := [metric(name).title for name in board.columns[len(shown) :]]:
        console.print(Text(f"Left out for want of room: {', '.join(hidden)}; the files have them.", style="dim"))


def _table(board: Leaderboard, names: list[str], gap: str) -> Table:
    """The table of some metrics, with `gap` between a mean and its interval and between the words of a heading."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    for heading in ("#", "algorithm", "seeds"):
        table.add_column(heading, justify="left" if heading == "algorithm" else "right", no_wrap=True)
    for name in names:
        table.add_column(Text(metric(name).short.replace(" ", gap)), justify="right", no_wrap=True)
    for row in board.rows:
        cells = [Text(place(row)), Text(row["algorithm"]), Text(str(len(row["seeds"])))]
        for name in names:
            mean, interval = cell(board, row, name)
            if metric(name).cost and name != "kl":
                interval = ""  # in the files; here it would take the room of what matters
            elif gap == "\n":
                interval = interval.replace(",", ",\n")  # of a lopsided one, the bounds
            text = Text(mean, style="bold" if row["algorithm"] in board.best(name) else "")
            cells.append(text.append(f"{gap}{interval}", style="not bold dim") if interval else text)
        table.add_row(*cells)
    return table
