"""What the cases of the corpus have on disk, beyond files of given content. Each function gets the case's folder and a
folder with a small model (`base`) and records of every kind."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import yaml


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


def finished_run(here: Path, prepared: Path) -> None:
    """The folder of a finished run of SFT, with checkpoints."""
    shutil.copytree(prepared / "run", here / "run")


def _change_config(here: Path, **sections: Any) -> None:
    path = here / "run/config.yaml"
    path.write_text(yaml.safe_dump({**yaml.safe_load(path.read_text()), **sections}))


def owning_config(here: Path, prepared: Path) -> None:
    """A run whose config would start a program where its algorithm is made."""
    _change_config(here, algorithm={"_target_": "os.system", "command": f"touch {here}/owned"})


def popen_config(here: Path, prepared: Path) -> None:
    """The same by a class."""
    _change_config(here, algorithm={"_target_": "subprocess.Popen", "args": ["touch", f"{here}/owned"]})
