"""Bad inputs as data: what a user might type or have on disk, and the one line that must answer it.

Each file of `corpus/` is a boundary: data, models, configs, code, folders, judges, scripts. Its cases are:

    name of the case:
      files: {records.jsonl: "b'\\xff' * 8"}    # path → a Python expression of its content, with makers' names
      make: [broken_adapter, {cut: {file: a}}]  # functions of makers*.py with the case's folder, and their options
      run: train {sft} data.path={here}/records.jsonl
      status: 2                                 # of the command; 2 unless it says otherwise
      never: [owned]                            # what must not be there afterwards
      says: ["records.jsonl:1:", "not UTF-8"]   # what its message has in it
      process: true                             # in a process of its own, where this one would be harmed

`{here}` is the case's folder, which is the working directory too; `{base}` is a small model, `{sft}`, `{dpo}` and the
like are the words of a short run of that algorithm into `{here}/out`. `default` sets keys for all cases of a file.
"""

from __future__ import annotations

import shlex
from dataclasses import dataclass, field
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

import yaml

from tests.training import runs

HERE = Path(__file__).parent
CORPUS = HERE / "corpus"


@dataclass(frozen=True)
class Case:
    """One bad input. Attributes as above."""

    name: str
    run: str
    says: list[str] = field(default_factory=list)
    status: int = 2
    files: dict[str, str] = field(default_factory=dict)
    make: list[str | dict[str, dict[str, Any]]] = field(default_factory=list)
    never: list[str] = field(default_factory=list)
    process: bool = False

    def write(self, here: Path, prepared: Path) -> None:
        """Make its files."""
        known = makers()
        for path, expression in self.files.items():
            content = eval(expression, {**known, "here": here, "prepared": prepared})
            target = here / path
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8", "surrogatepass"))
        for maker in self.make:
            name, options = next(iter(maker.items())) if isinstance(maker, dict) else (maker, {})
            known[name](here, prepared, **options)

    def words(self, here: Path, prepared: Path) -> list[str]:
        """Its command line."""
        places = {"here": str(here), "base": str(prepared / "base"), "prepared": str(prepared)}
        text = self.run
        for algorithm in runs.ALGORITHMS:
            if f"{{{algorithm}}}" in text:
                text = text.replace(f"{{{algorithm}}}", shlex.join(short(algorithm, here, prepared)))
        for name, place in places.items():
            text = text.replace(f"{{{name}}}", place)
        return shlex.split(text)


@cache
def makers() -> dict[str, Any]:
    """What the modules `makers*.py` define, by name."""
    found: dict[str, Any] = {}
    for path in sorted(Path(__file__).parent.glob("makers*.py")):
        found |= vars(import_module(f"tests.hostile.{path.stem}"))
    return found


def short(algorithm: str, here: Path, prepared: Path) -> list[str]:
    """Overrides for two steps of an algorithm, into `here/out`."""
    quiet = ["training.progress=off", "training.steps=2", "training.batch_size=4", f"out={here}/out"]
    return [*runs.words_for(prepared, algorithm, "out"), *quiet]


def cases() -> dict[str, Case]:
    """Every case by its boundary and name, as in "data: a record that is a list"."""
    found: dict[str, Case] = {}
    for path in sorted(CORPUS.glob("*.yaml")):
        given: dict[str, Any] = yaml.safe_load(path.read_text(encoding="utf-8"))
        default = given.pop("default", {})
        for name, values in given.items():
            found[f"{path.stem}: {name}"] = Case(name=name, **{**default, **(values or {})})
    return found
