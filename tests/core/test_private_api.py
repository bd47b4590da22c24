"""Private API of libraries: it works with those installed, is told where it does not, and is used nowhere else."""

from __future__ import annotations

import ast
import logging
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import alignlab
import alignlab.models.private_api  # adds what models use
from alignlab.core import AlignlabError, private_api
from alignlab.core.private_api import REACHES

PACKAGE = Path(alignlab.__file__).parent
ALLOWED = [PACKAGE / "core" / "private_api.py", PACKAGE / "models" / "private_api.py"]
OTHERS = [path for path in sorted(PACKAGE.rglob("*.py")) if path not in ALLOWED]


@pytest.mark.parametrize("name", REACHES)
def test_it_works_with_the_libraries_installed(name: str) -> None:
    """After an upgrade: look at what the library changed, run the tests, add the version."""
    assert private_api.problem(name) is None
    assert REACHES[name].is_known, REACHES[name].version


def test_versions_are_compared_part_by_part() -> None:
    reach = replace(REACHES["LoRA layers"], known=("0.2",))
    assert not reach.is_known, "0.21 is no 0.2"
    assert replace(reach, library="no-such-library").version is None


def test_trying_it_moves_no_random_number() -> None:
    state = torch.get_rng_state()
    private_api.problem.cache_clear()
    assert [private_api.problem(name) for name in REACHES] == [None] * len(REACHES)
    assert torch.equal(torch.get_rng_state(), state)


# ---------------------------------------------------------------------- where it is not there


@pytest.fixture
def without(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Libraries of versions that lack everything."""

    def fails() -> None:
        raise AttributeError("no such thing")

    for name, reach in REACHES.items():
        monkeypatch.setitem(REACHES, name, replace(reach, probe=fails))
    private_api.problem.cache_clear()
    private_api._warn.cache_clear()
    yield
    private_api.problem.cache_clear()
    private_api._warn.cache_clear()


@pytest.mark.usefixtures("without")
def test_the_plain_way_is_told_once(caplog: pytest.LogCaptureFixture) -> None:
    before = torch._dynamo.config.recompile_limit
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            private_api.same_timeout(3.0)
            private_api.forget_accelerator()
            with private_api.recompiling(99):
                assert torch._dynamo.config.recompile_limit == before
    said = [record.message for record in caplog.records]
    assert len(said) == 3
    assert "(no such thing): groups of processes that libraries make wait as long as these say" in said[0]


@pytest.mark.usefixtures("without")
@pytest.mark.parametrize(
    ("use", "message"),
    [
        (private_api.fake_tensors, "alignlab plan"),
        (lambda: private_api.make_root(None), "distributed=fsdp"),
        (lambda: private_api.hook_modules(None), "distributed=zero3"),
        (lambda: private_api.link_states(None), "distributed=zero1 and zero2"),
        (lambda: private_api.storage_of(None), "pruning"),
        (lambda: private_api.submission_text(None), "launcher=slurm"),
    ],
)
def test_what_has_no_plain_way_is_refused(use: object, message: str) -> None:
    with pytest.raises(AlignlabError, match=f"no such thing.*{message}"):
        use()  # type: ignore[operator]


# ---------------------------------------------------------------------- nowhere else


def private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


def owner(node: ast.Attribute) -> str:
    return node.value.id if isinstance(node.value, ast.Name) else ""


def defined(tree: ast.AST) -> set[str]:
    """Private names that a file gives to things of its own."""
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            found.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            found.add(node.id)
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and owner(node) in ("self", "cls"):
            found.add(node.attr)
    return {name for name in found if private(name)}


OURS = set[str]().union(*(defined(ast.parse(path.read_text())) for path in OTHERS))


def uses(text: str) -> list[str]:
    """Private API of libraries in a file: names that nothing of ours has, private modules, private operators, classes
    that are swapped."""
    tree, found = ast.parse(text), []
    mine = defined(tree)
    for node in ast.walk(tree):
        line = getattr(node, "lineno", 0)
        if isinstance(node, ast.Attribute):
            known = OURS | mine if owner(node) in ("self", "cls", "model") else mine
            foreign = private(node.attr) and node.attr not in known | OF_PYTHON
            swaps = node.attr == "__class__" and isinstance(node.ctx, ast.Store)
            if foreign or swaps or (owner(node), node.attr) == ("torch", "ops"):
                found.append(f"{line}: {node.attr}")
        elif isinstance(node, ast.ImportFrom) and not str(node.module).startswith("alignlab"):
            names = [*str(node.module).split("."), *(alias.name for alias in node.names)]
            found += [f"{line}: {name}" for name in names if private(name)]
        elif isinstance(node, ast.Import):
            names = [name for alias in node.names for name in alias.name.split(".")]
            found += [f"{line}: {name}" for name in names if private(name)]
        elif isinstance(node, ast.Call) and getattr(node.func, "id", "") in BY_NAME:
            name = getattr(node.args[1], "value", "")
            if isinstance(name, str) and private(name) and name not in OURS | OF_PYTHON:
                found.append(f"{line}: {name}")
    return found


BY_NAME = ("getattr", "setattr", "hasattr", "delattr")

OF_PYTHON = {"_exit", "_run_exitfuncs", "_is_protocol"}
"""Of Python itself, which `requires-python` bounds."""


@pytest.mark.parametrize(
    "text",
    [
        "import torch._dynamo",
        "from torch._subclasses import fake_tensor",
        "from optuna.storages.journal._file import get_lock_file",
        "from transformers import _private",
        "def f(network): return network._forward_hooks",
        "class A:\n    def f(self): return self._forward_hooks",
        "def f(network): return getattr(network.config, '_attn_implementation', None)",
        "import torch\nx = torch._C._get_tracing_state",
        "import torch\nx = torch.ops.aten.add",
        "def f(layer): layer.__class__ = int",
    ],
)
def test_a_use_is_seen(text: str) -> None:
    assert uses(text)


def test_what_is_ours_is_none() -> None:
    text = "import os\nclass A:\n    def _f(self): return self._f\ndef g(a): return a._f() or os._exit(1) or a.__dict__"
    assert uses(text) == []


@pytest.mark.parametrize("path", OTHERS, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_nothing_else_uses_private_api(path: Path) -> None:
    assert uses(path.read_text()) == []


@pytest.mark.parametrize("path", ALLOWED, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_looked_up_late(path: Path) -> None:
    """Importing it looks at nothing that another version may lack."""
    at_import = [
        node
        for statement in ast.parse(path.read_text()).body
        if not isinstance(statement, ast.FunctionDef | ast.ClassDef)
        for node in ast.walk(statement)
    ]
    assert not [node for node in at_import if isinstance(node, ast.Attribute) and node.attr == "ops"]
    modules = [node.module for node in at_import if isinstance(node, ast.ImportFrom)]
    assert not [module for module in modules if any(private(part) for part in str(module).split("."))]
