"""A rule whose runs last as long as a test needs, and say where they ran."""

from __future__ import annotations

import os
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from tests.training import runs

HOLD = "ALIGNLAB_TEST_HOLD"
"""A file: while it exists, each response takes as many seconds to score as it says."""

SEEN = "ALIGNLAB_TEST_SEEN"
"""A folder: each process leaves a file RANK there, with the name of its node and the size of its world."""


def count_of_a(prompt: str, response: str, extra: dict[str, Any]) -> float:
    """The rule of other tests' runs, slowed down."""
    if folder := os.environ.get(SEEN):
        import torch.distributed

        world = torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1
        path = Path(folder) / os.environ.get("RANK", "0")
        path.parent.mkdir(exist_ok=True)
        path.write_text(f"{os.environ['SLURMD_NODENAME']} {world}")
    with suppress(OSError):
        time.sleep(float(Path(os.environ.get(HOLD, "")).read_text()))
    return runs.count_of_a(prompt, response, extra)
