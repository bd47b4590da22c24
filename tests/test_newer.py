"""`make newer`: which libraries have gone beyond the ranges that were tested."""

from __future__ import annotations

import runpy
import tomllib
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement
from packaging.version import Version

ROOT = Path(__file__).parents[1]
NEWER: dict[str, Any] = runpy.run_path(str(ROOT / ".ci" / "newer.py"))
RANGES = {r.name: r for r in NEWER["bounded"](tomllib.loads((ROOT / "pyproject.toml").read_text())["project"])}
PINS = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().split() if "==" in line)


def test_ranges_end_with_the_minor_version_that_is_pinned() -> None:
    libraries = "torch transformers peft accelerate deepspeed bitsandbytes hydra-core optuna wandb"
    assert set(RANGES) == set(libraries.split())
    for name, wanted in RANGES.items():
        pinned = Version(PINS[name])
        assert str(pinned) in wanted.specifier
        assert f"{pinned.major}.{pinned.minor}.999" in wanted.specifier
        assert f"{pinned.major}.{pinned.minor + 1}.0" not in wanted.specifier, name


def test_news_are_versions_beyond_the_range() -> None:
    torch, peft = Requirement("torch>=2.6,<2.14"), Requirement("peft>=0.18,<0.22")
    assert NEWER["news"]([(torch, "2.14.1"), (peft, "0.21.9")]) == [
        "torch 2.14.1 exists: pyproject.toml has <2.14,>=2.6"
    ]
