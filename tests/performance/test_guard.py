"""The study run small: what is several times faster and leaner than others is still so; `make guard`."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from measuring import guard

from tests.components import need

STUDY = Path(__file__).parents[2] / "experiments" / "performance"
TRIES = 3
"""Machines are noisy: a ratio has fallen where it has in all of these."""

need("trl")


def small_study(parts: list[str], out: Path) -> dict[str, Any]:
    """Run by its own command, in a process that has not loaded torch yet."""
    command = [
        sys.executable,
        str(STUDY / "study.py"),
        "--small",
        "--threads",
        "1",
        "--out",
        str(out),
        "--only",
        *parts,
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    assert out.exists(), done.stderr[-3000:]
    found: dict[str, Any] = json.loads(out.read_text())
    return found


@pytest.mark.timeout(900)
def test_no_ratio_has_fallen(tmp_path: Path) -> None:
    recorded = json.loads((STUDY / "guard.json").read_text())["ratios"]
    wanted, best, wrong = list(guard.PARTS), dict[str, float](), dict[str, str]()
    for number in range(TRIES):
        found = small_study(wanted, tmp_path / f"study-{number}.json")
        assert not found["problems"]  # a measurement that failed, or losses that differ
        for name, value in guard.ratios(found).items():
            best[name] = max(value, best.get(name, 0.0))
        wrong = guard.fallen(best, recorded)
        wanted = sorted({name.split(" | ")[0] for name in wrong})
        if not wanted:
            return
    pytest.fail("fallen: " + "; ".join(f"{name}: {problem}" for name, problem in wrong.items()))
