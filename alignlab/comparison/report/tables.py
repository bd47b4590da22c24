"""Tables, made once and shown in three ways: on the terminal, in Markdown and in a page; and the leaderboard's."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import TYPE_CHECKING, Any

from alignlab.comparison.report.leaderboard import Leaderboard
from alignlab.comparison.report.metrics import MISSING, format_interval, format_number, metric
from alignlab.comparison.report.verdict import method, verdict
from alignlab.core.errors import one_line

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table as RichTable

STYLES = {
    **{"best": "bold", "pruned": "dim", "unfinished": "dim"},
    **{"done": "green", "running": "cyan", "failed": "red", "cancelled": "red", "not run": "yellow"},
}
"""How a kind of cell looks on the terminal; in a page it is a CSS class."""


def plain(text: str) -> str:
    """A text as Markdown shows it: in one line, nothing in it taken for HTML, an image, a link or a cell's end."""
    return re.sub(r"([|`]|\](?=[(\[]))", r"\\\1", escape(one_line(text), quote=False))


def csv_text(rows: Iterable[Sequence[Any]]) -> str:
    """Rows as CSV. What a spreadsheet would take for a formula gets a ' before it, as spreadsheets mark texts."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerows([[_cell(value) for value in row] for row in rows])
    return out.getvalue()


def _cell(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    text = one_line(value)
    try:
        float(text)
    except ValueError:
        return f"'{text}" if text.lstrip().startswith(("=", "+", "-", "@")) else text
    return text


@dataclass(frozen=True)
class Cell:
    """A cell of a table's body.

    Attributes:
        small: a second, smaller text, such as an interval.
        kind: "best", "failed", "win", "loss", …: decides how it looks.
    """

    text: str
    small: str = ""
    kind: str = ""


@dataclass(frozen=True)
class Table:
    """A table.

    Attributes:
        label: names it to screen readers.
        names: the column that says what a row is about; it stands at the left, others at the right.
        short: headings for the terminal, where they differ.
    """

    label: str
    head: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    names: int = 0
    short: Sequence[str] = ()

    def markdown(self) -> str:
        """A pipe table; the best values are bold."""

        def line(cells: Sequence[str]) -> str:
            return "| " + " | ".join(cells) + " |"

        def text(cell: Cell) -> str:
            shown = plain(cell.text)
            return f"{f'**{shown}**' if cell.kind == 'best' else shown} {plain(cell.small)}".strip()

        aligned = [":--" if i == self.names else "--:" for i in range(len(self.head))]
        head = [plain(heading) for heading in self.head]
        return "\n".join([line(head), line(aligned), *(line([text(c) for c in row]) for row in self.rows)])

    def rich(self, gap: str = " ", fold: bool = False) -> RichTable:
        """For the terminal.

        Args:
            gap: between a text and its small one, and between the words of a heading.
            fold: whether long texts are broken.
        """
        from rich import box
        from rich.table import Table as RichTable
        from rich.text import Text

        table = RichTable(box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
        for i, heading in enumerate(self.short or self.head):
            side = "left" if i == self.names else "right"
            table.add_column(Text(heading.replace(" ", gap)), justify=side, no_wrap=not fold, overflow="fold")  # type: ignore[arg-type]
        for row in self.rows:
            cells = []
            for c in row:
                small = c.small.replace(",", ",\n") if gap == "\n" else c.small  # of a lopsided interval, the bounds
                text = Text(one_line(c.text), style=STYLES.get(c.kind, ""))
                cells.append(text.append(f"{gap}{small}", style="not bold dim") if small else text)
            table.add_row(*cells)
        return table


# ------------------------------------------------------------------ the leaderboard


def cell(board: Leaderboard, row: Mapping[str, Any], name: str) -> Cell:
    """One metric: the mean, and its interval with, where some seeds lack it, the count of those that have it, as in
    `±0.020 (2 of 3 seeds)`."""
    found = board.estimate(row, name)
    if found is None:
        return Cell(MISSING)
    decimals = metric(name).decimals
    interval = format_interval(found, decimals)
    if f"{name}_seeds" in row:
        interval += f" ({row[f'{name}_seeds']} of {len(row['seeds'])} seeds)"
    kind = "best" if row["algorithm"] in board.best(name) else ""
    return Cell(format_number(found.mean, decimals), interval.strip(), kind)


def place(row: Mapping[str, Any]) -> str:
    """Rank and mark: `1`, `2 ≈` (not distinguishable from the best), `3 ?` (not testable), or a dash."""
    if row["rank"] is None:
        return MISSING
    mark = {True: " ≈", False: "", None: " ?"}[row["indistinguishable_from_best"]] if row["rank"] > 1 else ""
    return f"{row['rank']}{mark}"


def leaderboard_table(board: Leaderboard, names: Sequence[str]) -> Table:
    """The table of some metrics."""
    fixed, known = ["#", "algorithm", "seeds"], [metric(name) for name in names]
    rows = [
        [Cell(place(row)), Cell(row["algorithm"]), Cell(str(len(row["seeds"]))), *(cell(board, row, n) for n in names)]
        for row in board.rows
    ]
    head, short = [*fixed, *(m.heading for m in known)], [*fixed, *(m.short for m in known)]
    return Table("Leaderboard", head, rows, names=1, short=short)


def to_csv(board: Leaderboard) -> str:
    """One line per algorithm, numbers in full; a missing one is empty, seeds are separated by spaces."""
    keys = dict.fromkeys(["rank", "algorithm", *(key for row in board.rows for key in row)])
    rows = [{**row, "seeds": " ".join(map(str, row["seeds"]))} for row in board.rows]
    return csv_text([list(keys), *([row.get(key, "") for key in keys] for row in rows)])


def to_markdown(board: Leaderboard) -> str:
    """A heading, the verdict, the table and how it was made."""
    table = leaderboard_table(board, board.columns).markdown()
    said = [plain(text) for text in (" ".join(verdict(board)), budget_text(board))]
    parts = [f"# Leaderboard: {plain(board.benchmark)}", *said, table, plain(method(board))]
    return "\n\n".join(part for part in parts if part) + "\n"


def limits_text(board: Leaderboard) -> str:
    """What each run was allowed: `300 steps, 1,000,000 generated tokens`; what is not limited is left out."""
    return _items({key: value for key, value in board.budget.items() if key != "shared"})


def shared_text(board: Leaderboard) -> str:
    """What was made once for all runs, in a sentence; nothing where there is nothing."""
    shared = board.budget.get("shared")
    return f"Made once, before these runs, and used by all of them: {_items(shared)}." if shared else ""


def budget_text(board: Leaderboard) -> str:
    """What each run was allowed, and what was made once for all of them, in sentences."""
    limits, shared = limits_text(board), shared_text(board)
    return f"{f'Budget of each run: {limits}.' if limits else ''} {shared}".strip()


def _items(values: Mapping[str, Any]) -> str:
    """`300 steps, sft (51,588 trained tokens, 2.25 seconds)`; without what is null or 0."""
    texts = []
    for key, value in values.items():
        name = key.replace("_", " ")
        if isinstance(value, Mapping):
            texts.append(f"{name} ({inner})" if (inner := _items(value)) else name)
        elif isinstance(value, float) and value:
            texts.append(f"{format_number(value, None) if value < 1e4 else f'{value:,.0f}'} {name}")
        elif value:
            texts.append(f"{value:,} {name}")
    return ", ".join(texts)


def print_leaderboard(board: Leaderboard, console: Console | None = None) -> None:
    """Print the table with the verdict above it. Where the terminal is narrow, intervals go below their means, and
    then the last columns are left out and named below."""
    from rich.console import Console
    from rich.text import Text

    console = console or Console()
    unbounded = console.options.update(max_width=10_000)
    shown, table = list(board.columns), leaderboard_table(board, board.columns).rich()
    while shown and console.measure(table, options=unbounded).maximum > console.width:
        table = leaderboard_table(board, shown).rich("\n")
        shown = shown if console.measure(table, options=unbounded).maximum <= console.width else shown[:-1]
    for sentence in verdict(board):
        console.print(Text(sentence))
    console.print(table)
    console.print(Text(method(board), style="dim"))
    if hidden := [metric(name).title for name in board.columns[len(shown) :]]:
        console.print(Text(f"Left out for want of room: {', '.join(hidden)}; the files have them.", style="dim"))
