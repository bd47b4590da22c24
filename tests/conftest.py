"""One thread, no network, no chatter; published values; real models and data where they are; small models on disk."""

import gc
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

for name, value in {
    "OMP_NUM_THREADS": "1",  # also of the interpreters that tests start: threads that wait for each other burn a core
    "HF_HUB_OFFLINE": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "TRANSFORMERS_VERBOSITY": "error",
    "TOKENIZERS_PARALLELISM": "false",
    "WANDB_MODE": "disabled",
}.items():
    os.environ.setdefault(name, value)

import pytest  # noqa: E402
import torch  # noqa: E402

torch.set_num_threads(1)

SHARED = Path(__file__).parents[2] / "shared"
PUBLISHED = Path(__file__).parent / "algorithms" / "published.json"

LONGEST = [
    "training/distributed/test_modes.py",
    "training/test_loop.py",
    "launch/test_start.py",
    "training/test_faults.py",
    "sweeps/test_search.py",
    "sweeps/test_grid.py",
    "comparison/test_compare.py",
    "training/distributed/test_processes.py",
    "training/callbacks/test_wandb.py",
    "training/test_non_finite_faults.py",
]
"""The files that take longest. They come first, so that at the end no process waits for another's long file."""

PROCESSES = (
    "comparison/graph/test_process.py",
    "comparison/test_compare.py",
    "launch/",
    "scoring/test_judge_runs.py",
    "sweeps/",
    "training/callbacks/test_wandb.py",
    "training/callbacks/test_wandb_failing.py",
    "training/distributed/",
    "training/test_faults.py",
    "training/test_memory_faults.py",
    "training/test_non_finite_faults.py",
    "training/test_vllm_runs.py",
)
"""Files and folders whose tests run several processes or kill them: `make test-processes`. They take long."""


@pytest.hookimpl(tryfirst=True)  # before -m looks at the marks
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Marks `processes` and `real_data` (tests that use the fixture `shared`); the longest files come first."""
    place = {Path(__file__).parent / name: i for i, name in enumerate(LONGEST)}
    items.sort(key=lambda item: place.get(item.path, len(place)))
    for item in items:
        if item.path.relative_to(Path(__file__).parent).as_posix().startswith(PROCESSES):
            item.add_marker("processes")
        parameters = item.callspec.params if hasattr(item, "callspec") else {}
        if "shared" in getattr(item, "fixturenames", ()) and "shared" not in parameters:
            item.add_marker("real_data")


def pytest_collection_finish() -> None:
    """What is imported by now stays: no later collection of garbage looks through it, in forks neither."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def shared() -> Path:
    """A folder of real models and real data beside the repository. Tests that use it skip where it is absent."""
    if not SHARED.is_dir():
        pytest.skip("needs the real models and data of ../shared, which is not here")
    return SHARED


@pytest.fixture(scope="session")
def stories(shared: Path) -> Path:
    """A real pretrained Llama of 656,000 parameters."""
    return shared / "models" / "TinyStories-656K"


@pytest.fixture(scope="session")
def published() -> dict[str, dict[str, Any]]:
    """Published values of losses, by name: `source` (a test of another project), `inputs`, `expected`, `atol`."""
    return {f["name"]: f for f in json.loads(PUBLISHED.read_text())}


@pytest.fixture(scope="session")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """The folder of a small model with random weights: `saved("gpt2")`; made once for each set of arguments."""
    from tests import tiny

    folders: dict[str, Path] = {}

    def folder(name: str = "llama", kind: str = "policy", **changes: Any) -> Path:
        key = repr((name, kind, sorted(changes.items())))
        if key not in folders:
            folders[key] = tiny.save(tmp_path_factory.mktemp("model"), name, kind, **changes)
        return folders[key]

    return folder
