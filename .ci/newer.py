"""Which libraries have versions newer than the ranges in pyproject.toml allow. Never fails: it is news, not an error.

python .ci/newer.py
"""

from __future__ import annotations

import subprocess
import sys
import tomllib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement
from packaging.version import Version

PROJECT = Path(__file__).parents[1] / "pyproject.toml"


def bounded(project: dict[str, Any]) -> Iterator[Requirement]:
    """The libraries whose range has an end."""
    for listed in (project["dependencies"], *project["optional-dependencies"].values()):
        for requirement in map(Requirement, listed):
            if any(part.operator == "<" for part in requirement.specifier):
                yield requirement


def newest(name: str) -> str:
    """The newest version that pip finds."""
    command = [sys.executable, "-m", "pip", "index", "versions", name, "--disable-pip-version-check"]
    said = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout
    return said.split("(", 1)[1].split(")")[0]  # torch (2.13.0)


def news(found: Iterable[tuple[Requirement, str]]) -> list[str]:
    """A line for each library whose newest version its range leaves out."""
    return [
        f"{wanted.name} {version} exists: pyproject.toml has {wanted.specifier}"
        for wanted, version in found
        if Version(version) not in wanted.specifier
    ]


def main() -> None:
    found, unknown = [], []
    for wanted in bounded(tomllib.loads(PROJECT.read_text())["project"]):
        try:
            found.append((wanted, newest(wanted.name)))
        except (subprocess.SubprocessError, IndexError, OSError):  # what pip says may name a package index
            unknown.append(wanted.name)
    print("\n".join(news(found) or ["no library has a version newer than its range"]))
    if unknown:
        print(f"not known of: {', '.join(unknown)}")


if __name__ == "__main__":
    main()
