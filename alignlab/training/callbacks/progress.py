"""How far training is, for people: a live line on a terminal, a plain line now and then in a log file."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from datetime import timedelta
from typing import TYPE_CHECKING, Literal

from alignlab.core.progress import console

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress

ProgressMode = Literal["auto", "rich", "plain", "off"]
"""`rich`: one live line; `plain`: a line now and then; `off`: nothing; `auto`: rich on a terminal, else plain."""

SECONDS = 10.0
"""Plain lines are at least this far apart."""

SHOWN = ("loss", "reward", "kl", "eval/loss")
"""Metrics shown where there are any, besides `tokens_per_second`."""


class ProgressDisplay:
    """Shows step, share done, loss, tokens per second and the time left.

    Args:
        mode: what is shown; see `ProgressMode`.
        is_main: whether this is the main process; the others show nothing.
        out: the console to draw on; standard error's by default.
        clock: seconds from an arbitrary origin.
    """

    def __init__(
        self,
        mode: ProgressMode = "auto",
        is_main: bool = True,
        out: Console | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.clock = clock
        self.mode: ProgressMode = mode if is_main else "off"
        if self.mode == "off":
            return
        self.console = out if out is not None else console()
        if self.mode == "auto":
            live = self.console.is_terminal and not self.console.is_dumb_terminal
            self.mode = "rich" if live else "plain"
        self._latest: dict[str, float] = {}
        self._first: tuple[float, float] | None = None
        self._live: Progress | None = None
        self._unprinted: str | None = None
        self._printed_at = -SECONDS

    def update(self, step: int, metrics: Mapping[str, float]) -> None:
        """Show that `step` is done.

        Args:
            metrics: `done`, the share of the run that is over, in [0, 1]; what is shown besides are
                `tokens_per_second` and `SHOWN`, each as last given.
        """
        if self.mode == "off":
            return
        self._latest.update(metrics)
        done = metrics["done"]
        where, shown = f"step {step} ({done:.0%})", self._shown(done)
        if self.mode == "rich":
            self._draw(where, done, shown)
            return
        self._unprinted = f"{where}  {shown}"
        if done >= 1 or self.clock() - self._printed_at >= SECONDS:
            self._print()

    def close(self) -> None:
        """Leave the last line standing: the last step's, also where training was stopped early."""
        if self.mode == "off":
            return
        if self._live is not None:
            self._live.stop()
            self._live = None
        if self._unprinted is not None:
            self._print()

    def _shown(self, done: float) -> str:
        parts = [f"{name} {self._latest[name]:.4g}" for name in SHOWN if name in self._latest]
        if "tokens_per_second" in self._latest:
            parts.append(f"{self._latest['tokens_per_second']:,.0f} tokens/s")
        now = self.clock()
        # Reckoned from the first step on: it is slower than the others, and a resumed run starts in the middle.
        self._first = self._first or (now, done)
        began, already = self._first
        if done > already:
            left = round((now - began) / (done - already) * max(1 - done, 0))
            parts.append(f"ETA {timedelta(seconds=left)}")
        return "  ".join(parts)

    def _print(self) -> None:
        self.console.print(self._unprinted, markup=False, highlight=False, soft_wrap=True)
        self._unprinted, self._printed_at = None, self.clock()

    def _draw(self, where: str, done: float, shown: str) -> None:
        if self._live is None:
            from rich.progress import BarColumn, Progress, TextColumn

            columns = TextColumn("{task.description}"), BarColumn(20), TextColumn("{task.fields[shown]}")
            self._live = Progress(*columns, console=self.console, refresh_per_second=4)
            self._live.add_task(where, total=1.0, shown=shown)
            self._live.start()
        self._live.update(self._live.task_ids[0], completed=done, description=where, shown=shown)
