"""Callbacks of the runs that are commands, which have them by name."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import torch

from alignlab import Callback


class Backend(Callback):
    """Writes down what the processes communicate by."""

    def __init__(self, file: str) -> None:
        self.file = Path(file)

    def on_start(self, trainer: Any) -> None:
        here = torch.distributed.is_initialized()
        self.file.write_text(str(torch.distributed.get_backend_config()) if here else "none")


class Dies(Callback):
    """Ends the process by SIGKILL after a step, once: the file says that it has."""

    def __init__(self, step: int, file: str) -> None:
        self.step, self.file = step, Path(file)

    def on_step(self, trainer: Any) -> None:
        if trainer.state.step == self.step and not self.file.exists():
            self.file.touch()
            os.kill(os.getpid(), signal.SIGKILL)
