"""Stopping on request: a scheduler's signal or Ctrl-C sets a flag; the loop looks at it between steps."""

from __future__ import annotations

import os
import signal
import threading
from contextlib import suppress
from types import FrameType, TracebackType
from typing import Any

SIGNALS = ("SIGTERM", "SIGUSR1", "SIGUSR2", "SIGINT", "SIGHUP")
"""Termination and pre-emption, Slurm's warning before the time limit (`--signal=USR1@60`), submitit's, Ctrl-C, and a
terminal that is closed."""


def heeded() -> list[int]:
    """The numbers of those that ask for a stop: under `nohup` a closed terminal does not."""
    ignored = signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    return [getattr(signal, name) for name in SIGNALS if not (ignored and name == "SIGHUP")]


class StopRequest:
    """Within it, the first signal of `SIGNALS` asks for a clean stop; a second Ctrl-C stops at once.

        with StopRequest() as stop:
            for step in steps:
                ...
                if stop:
                    save_and_leave(stop.signal)

    In a run of several processes the signal may reach them at different steps, or only some: agree on it (the
    maximum over all processes) before acting, or they wait for each other for ever.

    Signals can be handled in the main thread alone; in another, nothing is installed and nothing is ever requested.

    Attributes:
        signal: name of the first signal that came, e.g. "SIGTERM", or None.

    Raises:
        KeyboardInterrupt: in the main thread, at the second Ctrl-C.
    """

    def __init__(self) -> None:
        self.signal: str | None = None
        self._ctrl_c = False
        self._former: dict[int, Any] = {}

    def __bool__(self) -> bool:
        """Whether a stop has been requested."""
        return self.signal is not None

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            for number in heeded():
                self._former[number] = signal.signal(number, self._handle)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for number, handler in self._former.items():
            # None: a handler that was not installed from Python, which Python cannot put back.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        self._former.clear()

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT:
            if self._ctrl_c:
                raise KeyboardInterrupt
            self._ctrl_c = True
        if self.signal is None:
            self.signal = signal.Signals(number).name
            again = "; Ctrl-C again stops at once, without one" if number == signal.SIGINT else ""
            self._say(f"{self.signal}: stopping after this step, with a checkpoint{again}")

    @staticmethod
    def _say(text: str) -> None:
        # Not print: the signal may have come in the middle of one, whose buffer must not be entered twice.
        with suppress(OSError):  # standard error may be closed or a broken pipe: no reason not to stop cleanly
            os.write(2, f"\n{text}\n".encode())
