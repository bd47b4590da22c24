"""What the cases of the corpus have on disk, beyond files of given content. Each function gets the case's folder and a
folder with a small model (`base`) and records of every kind."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any


def model(here: Path, prepared: Path) -> None:
    """A copy of the small model, to be damaged."""
    shutil.copytree(prepared / "base", here / "model")


def config_of_model(here: Path, **changes: Any) -> None:
    """Change keys of the copied model's config."""
    path = here / "model/config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def pipe(here: Path, prepared: Path) -> None:
    """A FIFO that nobody writes to."""
    os.mkfifo(here / "pipe")
