"""Commands as people type them."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path

from tests.training import runs

Mistake = Callable[..., str]
"""Runs a command that must fail; what it said."""


def training(folder: Path, *words: str, algorithm: str = "sft", out: str = "mistaken") -> list[str]:
    return ["train", *runs.words_for(folder, algorithm, out, "training.progress=off", "training.steps=1", *words)]


def spawn(*words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        words, env=runs.environment() | environment, capture_output=True, text=True, timeout=300, cwd=runs.REPOSITORY
    )
