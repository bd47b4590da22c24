"""The leaderboard as CSV, as Markdown and on the terminal."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from alignlab.comparison.leaderboard import Leaderboard
from alignlab.comparison.metrics import MISSING, format_interval, format_number, metric
from alignlab.comparison.verdict import method, verdict

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table


def cell(board: Leaderboard, row: Mapping[str, Any], figure: str) -> tuple[str, str]:
    """One figure as text: the mean, and its interval with, where some seeds lack the figure, the count of those that
    have it. `("0.953", "±0.012")`, `("–", "")`, `("0.412", "±0.020 (2 of 3 seeds)")`."""
    found = board.estimate(row, figure)
    if found is None:
        return MISSING, ""
    decimals = metric(figure).decimals
    interval = format_interval(found, decimals)
    if f"{figure}_seeds" in row:
        interval += f" ({row[f'{figure}_seeds']} of {len(row['seeds'])} seeds)"
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

    best = {figure: board.best(figure) for figure in board.columns}
    table = [
        line(["#", "algorithm", "seeds", *(metric(figure).heading for figure in board.columns)]),
        line(["--:", ":--", *["--:"] * (1 + len(board.columns))]),
    ]
    for row in board.rows:
        cells = [place(row), row["algorithm"], str(len(row["seeds"]))]
        for figure in board.columns:
            mean, interval = cell(board, row, figure)
            mean = f"**{mean}**" if row["algorithm"] in best[figure] else mean
            cells.append(f"{mean} {interval}".strip())
        table.append(line(cells))
    budget = f"Budget: {budget_text(board)}\n\n" if board.budget else ""
    body = "\n".join(table)
    return f"# Leaderboard: {board.benchmark}\n\n{' '.join(verdict(board))}\n\n{budget}{body}\n\n{method(board)}\n"


def budget_text(board: Leaderboard) -> str:
    """`generated tokens 1,000,000 · shared (sft (seconds 12))`; what is not set is left out."""
    return _items(board.budget, " · ")


def _items(values: Mapping[str, Any], separator: str) -> str:
    texts = []
    for key, value in values.items():
        if isinstance(value, Mapping):
            text = f"({_items(value, ', ')})" if value else None
        elif isinstance(value, float):
            text = format_number(value, None) if value < 1e4 else f"{value:,.0f}"
        else:
            text = f"{value:,}" if type(value) is int else value
        if text is not None:
            texts.append(f"{key.replace('_', ' ')} {text}")
    return separator.join(texts)


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
    if hidden := [metric(figure).title for figure in board.columns[len(shown) :]]:
        console.print(Text(f"Left out for want of room: {', '.join(hidden)}; the files have them.", style="dim"))


def _table(board: Leaderboard, figures: list[str], gap: str) -> Table:
    """The table of some figures, with `gap` between a mean and its interval and between the words of a heading."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    for heading in ("#", "algorithm", "seeds"):
        table.add_column(heading, justify="left" if heading == "algorithm" else "right", no_wrap=True)
    for figure in figures:
        table.add_column(Text(metric(figure).short.replace(" ", gap)), justify="right", no_wrap=True)
    for row in board.rows:
        cells = [Text(place(row)), Text(row["algorithm"]), Text(str(len(row["seeds"])))]
        for figure in figures:
            mean, interval = cell(board, row, figure)
            if metric(figure).cost and figure != "kl":
                interval = ""  # in the files; here it would take the room of what matters
            elif gap == "\n":
                interval = interval.replace(",", ",\n")  # of a lopsided one, the bounds
            text = Text(mean, style="bold" if row["algorithm"] in board.best(figure) else "")
            cells.append(text.append(f"{gap}{interval}", style="not bold dim") if interval else text)
        table.add_row(*cells)
    return table
