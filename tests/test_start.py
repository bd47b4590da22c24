"""What commands do without: a module that is not imported costs no time."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from alignlab.cli import commands
from tests.training import runs

FIRST_STEP = """
import sys
from alignlab.training import step
step.run_batch = lambda *_, **__: sys.exit(print("imported", *sys.modules))
"""
"""What is there when the first step begins."""


def imported(*words: str, before: str = "") -> set[str]:
    """The modules of a process that runs a command, packages and all."""
    code = f"import sys{before}\nfrom alignlab.cli import main\nassert main({list(words)!r}) == 0"
    code += '\nprint("imported", *sys.modules)'
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=300, cwd=runs.REPOSITORY, check=False
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith("imported ")]
    assert lines, done.stderr
    return set(lines[-1].split()[1:])


def test_help_needs_no_library_at_all() -> None:
    assert not {"torch", "numpy", "pydantic", "hydra", "omegaconf", "alignlab.build"} & imported("--help")


@pytest.fixture(scope="module")
def nothing_computed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, set[str]]:
    """The modules of commands that compute nothing, by name."""
    folder = tmp_path_factory.mktemp("submitted")
    (folder / "nodes.json").write_text(json.dumps({"base": "key"}))
    (folder / "submitted.json").write_text(json.dumps({"graph": {"base": [], "report": ["base"]}, "entries": {}}))
    every = "; ".join(f"main([{name!r}, '--help'])" for name in commands())
    return {
        "status": imported("status", str(folder)),
        "each command's help": imported("--help", before=f"\nfrom alignlab.cli import main\n{every}"),
    }


@pytest.mark.parametrize("command", ["status", "each command's help"])
def test_what_computes_nothing_needs_no_torch(nothing_computed: dict[str, set[str]], command: str) -> None:
    found = nothing_computed[command]
    assert "alignlab.core" in found
    assert not {"torch", "transformers", "accelerate", "peft", "hydra", "scipy", "wandb", "matplotlib"} & found


def test_a_run_imports_nothing_before_its_first_step_that_it_does_not_use(tmp_path: Path) -> None:
    runs.prepare(tmp_path)
    data = ["algorithm=dpo", "data=preferences", f"data.path={tmp_path}/preferences.jsonl"]
    found = imported("train", f"model={tmp_path}/base", *data, f"out={tmp_path}/out", before=FIRST_STEP)
    assert {"torch", "transformers", "alignlab.training.trainer"} <= found
    for name in ("deepspeed", "bitsandbytes", "peft", "wandb", "datasets", "optuna", "submitit", "matplotlib"):
        assert name not in found


def test_a_whole_run_imports_no_deepspeed(tmp_path: Path) -> None:
    """Saving a model asks whether it is one of DeepSpeed's engines, for which its import would take seconds."""
    runs.prepare(tmp_path)
    words = runs.words_for(tmp_path, "sft", "out", "training.steps=1")
    assert "deepspeed" not in imported("train", *words)
