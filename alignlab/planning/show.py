"""A plan as tables for people, 80 columns wide."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text


def show(plan: dict[str, Any], console: Console | None = None) -> None:
    """Print a plan."""
    console = console or Console(highlight=False)
    for line in plan["run"]:
        console.print(line, markup=False)
    console.print(_memory(plan))
    for line in [*plan["memory"]["notes"], "", *plan["speed"]["lines"]]:
        console.print(line, markup=False)
    if plan["fits"]:
        console.print("", _fits(plan), "", sep="\n")
        for line in plan["cheapest"]["lines"]:
            # a command is to be copied: no line breaks in it
            console.print(line, markup=False, soft_wrap=line.startswith("  alignlab "))


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", width=80, box=None, pad_edge=False, padding=(0, 1, 0, 0))
    for column in columns:
        table.add_column(column, justify="left" if column in ("", "distributed=") else "right")
    return table


def _gb(value: float) -> str:
    return f"{value:,.1f}" if value >= 0.95 else f"{value:.2f}"


def _memory(plan: dict[str, Any]) -> Table:
    memory = plan["memory"]
    table = _table("Memory of one device, GB", "", "GB")
    for name, value in memory["held"].items():
        table.add_row(f"always        {name}", _gb(value))
    if memory["overhead"]:
        table.add_row("always        framework: CUDA context, libraries (a constant)", _gb(memory["overhead"]))
    for phase, items in memory["phases"].items():
        peak = phase == memory["peak"]
        named = " + ".join(f"{k} {_gb(v)}" for k, v in items.items() if v)
        text = f"{'+' if peak else 'or':<2} {phase}: {named}"
        table.add_row(*(Text(cell, "bold" if peak else "dim") for cell in (text, _gb(sum(items.values())))))
    table.add_row(Text("peak", "bold"), Text(_gb(memory["total"]), "bold"))
    if memory["host"]:
        table.add_row("of the host's memory, for each device (at most, also while loading)", _gb(memory["host"]))
    return table


def _fits(plan: dict[str, Any]) -> Table:
    device, counts = plan["device"], plan["counts"]
    title = f"GB on each of so many devices; * fits {device['name']} ({device['memory_gb']:g} GB)"
    table = _table(title, "", "distributed=", *map(str, counts))
    before = ""
    for row in plan["fits"]:
        cells = [row["devices"].get(str(count)) for count in counts]
        table.add_row(row["trained"] if row["trained"] != before else "", row["mode"], *map(_cell, cells))
        before = row["trained"]
    return table


def _cell(found: dict[str, Any] | None) -> Text:
    if found is None:
        return Text("")
    size = f"{found['gb']:,.0f}" if found["gb"] >= 99.95 else f"{found['gb']:.1f}"
    return Text(f"{size}*", "green") if found["fits"] else Text(f"{size} ", "red")
