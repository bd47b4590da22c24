"""The house as it is drawn: imports go down only, algorithms stand on the core alone, files stay short."""

from __future__ import annotations

import ast
import importlib
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "alignlab"
FILES = sorted(p for p in PACKAGE.rglob("*.py") if "_configs" not in p.parts)

LAYERS = (
    "commands",
    "api",
    "sweeps",
    "comparison",
    "planning",
    "benchmarks",
    "launch",
    "training",
    "rollout",
    "scoring",
    "models",
    "algorithms",
    "data",
    "core",
)
"""From the top down. Above them is `cli`, which finds the commands."""

BESIDE = {"config": ("build", "core"), "build": ("core",)}
"""Not layers: what they may import themselves. Everything from training up may import them, and `build`, which makes
what a config names, everything above the algorithms."""

EXCEPTIONS = {  # what makes objects of a config's sections
    "alignlab.rollout": {"build"},
    "alignlab.rollout.produce": {"build"},
    "alignlab.scoring": {"build"},
}

LONGEST, LONGEST_ALGORITHM = 430, 150
"""Lines of a file."""


def module(path: Path) -> str:
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(path: Path) -> set[str]:
    """Every module of ours that a file imports, anywhere in it: at the top, in functions, for type checking alone."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: a relative import hides the layer it goes to"
            found |= {f"{node.module}.{alias.name}" for alias in node.names} | {str(node.module)}
    return {name for name in found if name.split(".")[0] == "alignlab"}


def layer(name: str) -> str | None:
    """`alignlab.training.trainer` → "training"; None for the package itself."""
    parts = name.split(".")
    return parts[1] if len(parts) > 1 else None


def allowed(name: str) -> set[str]:
    """The layers a module may import from."""
    mine = layer(name)
    if name == "alignlab.__main__":
        return {"cli"}
    if mine is None:  # the package: it hands out names from everywhere but the commands
        return set(LAYERS) - {"commands"}
    if mine == "cli":  # it says what went wrong, and ends what commands started
        return {"commands", "core"}
    if mine in BESIDE:
        return set(BESIDE[mine])
    place = LAYERS.index(mine)
    below = set(LAYERS[place:]) | EXCEPTIONS.get(name, set())
    beside = (
        set(BESIDE) if place <= LAYERS.index("training") else {"build"} if mine not in ("algorithms", "core") else set()
    )
    return below | beside


def ours(name: str) -> set[str]:
    """The layers that a module's imports go to; the package's own attributes, such as its version, are nobody's."""
    path = next(p for p in FILES if module(p) == name)
    known = {"cli", *LAYERS, *BESIDE}
    return {found for found in map(layer, imports(path)) if found in known}


def test_every_folder_is_a_layer() -> None:
    there = {layer(module(p)) for p in FILES} - {None, "__main__"}
    assert there == {"cli", *LAYERS, *BESIDE}


@pytest.mark.parametrize("name", [module(p) for p in FILES])
def test_imports_only_go_down(name: str) -> None:
    assert ours(name) <= allowed(name)


def test_exceptions_are_needed() -> None:
    for name, layers in EXCEPTIONS.items():
        assert layers <= ours(name)
        assert not layers & (set(LAYERS[LAYERS.index(str(layer(name))) :]))


@pytest.mark.parametrize("path", sorted(PACKAGE.glob("algorithms/*.py")), ids=lambda p: p.stem)
def test_algorithms_stand_on_the_core_alone(path: Path) -> None:
    assert {layer(name) for name in imports(path)} <= {"core", "algorithms"}
    assert len(path.read_text().splitlines()) < LONGEST_ALGORITHM


def test_the_core_imports_nothing_of_ours_but_itself_nor_anything_heavy() -> None:
    for path in sorted(PACKAGE.glob("core/*.py")):
        assert {layer(name) for name in imports(path)} <= {"core"}
        tree = ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        names = {a.name for n in tree if isinstance(n, ast.Import) for a in n.names}
        assert not {n.split(".")[0] for n in names} & {"transformers", "peft", "accelerate", "hydra", "datasets"}


@pytest.mark.parametrize("path", FILES, ids=module)
def test_files_are_short(path: Path) -> None:
    assert len(path.read_text(encoding="utf-8").splitlines()) <= LONGEST


SCRIPTS = sorted((PACKAGE.parent / "experiments").rglob("*.py"))


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: str(path.relative_to(PACKAGE.parent / "experiments")))
def test_what_an_experiment_imports_is_there(path: Path) -> None:
    """No other test runs the scripts: what moves would be missed where they name it."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and str(node.module).split(".")[0] in ("alignlab", "tests"):
            found = importlib.import_module(str(node.module))
            for alias in node.names:
                if not hasattr(found, alias.name):
                    importlib.import_module(f"{node.module}.{alias.name}")
