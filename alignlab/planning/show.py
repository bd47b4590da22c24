"""A plan as tables for people, 80 columns wide."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

ITEMS = {
    "weights": "weights",
    "float32 copy": "float32 copy of trained weights (ZeRO)",
    "reference": "reference policy",
    "optimizer states": "optimiser states",
    "scorers": "models that score",
    "communication": "gradient buckets",
    "gradients": "gradients",
    "activations": "activations",
    "gathered weights": "weights gathered from the others",
    "temporary": "temporaries of the update",
    "generation": "keys, values and logits of sampling",
    "whole model": "the model before it is divided",
    "merged copy": "copy that the adapter is folded into",
}
PHASES = {
    "training": "forward and backward",
    "gradients": "backward's end",
    "update": "update",
    "scoring": "log-probs before it",
    "sampling": "sampling",
    "saving": "saving the model",
    "loading": "loading",
}


def show(plan: dict[str, Any], console: Console | None = None) -> None:
    """Print a plan."""
    console = console or Console(highlight=False)
    for line in plan["run"]:
        console.print(line, markup=False, soft_wrap=False)
    console.print(_memory(plan))
    for line in [*plan["memory"]["notes"], "", *plan["speed"]["lines"]]:
        console.print(line, markup=False)
    if plan["fits"]:
        console.print()
        console.print(_fits(plan))
        console.print()
        for line in plan["cheapest"]["lines"]:
            # a command is to be copied: no line breaks in it
            console.print(line, markup=False, soft_wrap=line.startswith("  alignlab "))
    if plan["published"]:
        console.print()
        console.print(_published(plan["published"]))


def _gb(value: float) -> str:
    return f"{value:,.1f}" if value >= 0.95 else f"{value:.2f}"


def _memory(plan: dict[str, Any]) -> Table:
    memory = plan["memory"]
    table = Table(title="Memory of one device, GB", title_justify="left", width=80, box=None, pad_edge=False)
    table.add_column("")
    table.add_column("GB", justify="right", width=9)
    for name, value in memory["held"].items():
        table.add_row(f"always        {ITEMS[name]}", _gb(value))
    if memory["overhead"]:
        table.add_row("always        framework: CUDA context, libraries (a constant)", _gb(memory["overhead"]))
    for phase, items in memory["phases"].items():
        peak = phase == memory["peak"]
        named = " + ".join(f"{ITEMS[k]} {_gb(v)}" for k, v in items.items() if v)
        style = "bold" if peak else "dim"
        table.add_row(
            Text(f"{'+' if peak else 'or':<2} {PHASES[phase]}: {named}", style), Text(_gb(sum(items.values())), style)
        )
    table.add_row(Text("peak", "bold"), Text(_gb(memory["total"]), "bold"))
    if memory["host"]:
        table.add_row("of the host's memory, for each device (at most, also while loading)", _gb(memory["host"]))
    return table


def _fits(plan: dict[str, Any]) -> Table:
    counts = plan["counts"]
    title = f"GB on each of so many devices; * fits {plan['device']['name']} ({plan['device']['memory_gb']:g} GB)"
    table = Table(title=title, title_justify="left", width=80, box=None, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column("")
    table.add_column("distributed=")
    for count in counts:
        table.add_column(str(count), justify="right")
    before = ""
    for row in plan["fits"]:
        cells = []
        for count in counts:
            cell = row["devices"].get(str(count))
            if cell is None:
                cells.append(Text(""))
                continue
            size = f"{cell['gb']:,.0f}" if cell["gb"] >= 99.95 else f"{cell['gb']:.1f}"
            cells.append(Text(f"{size}*", "green") if cell["fits"] else Text(f"{size} ", "red"))
        table.add_row(row["trained"] if row["trained"] != before else "", row["mode"], *cells)
        before = row["trained"]
    return table


def _published(case: dict[str, Any]) -> Table:
    table = Table(
        title="LLaMA 65B, one sequence of 512 tokens at a time (QLoRA, arXiv:2305.14314), GB",
        title_justify="left",
        width=80,
        box=None,
        pad_edge=False,
    )
    for column in ("", "published", "here"):
        table.add_column(column, justify="left" if not column else "right")
    paged = f"{case['qlora_gb'] - case['paged_gb']:.1f} + {case['paged_gb']:.1f} paged"
    table.add_row(
        "full, 16 bits (weights, gradients, Adam)", f"> {case['full_published_gb']:g}", f"{case['full_gb']:.1f}"
    )
    table.add_row("QLoRA (NF4, rank 64, paged AdamW)", f"< {case['qlora_published_gb']:g}", paged)
    return table
