"""One thread, no network, no chatter; the folder beside the repository; small models on disk."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

for name, value in {
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


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real models, data and published values beside the repository."""
    if not SHARED.is_dir():
        pytest.skip("needs ../shared, which is not here")
    return SHARED


@pytest.fixture(scope="session")
def stories(shared: Path) -> Path:
    """A real pretrained Llama of 656,000 parameters."""
    return shared / "models" / "TinyStories-656K"


@pytest.fixture(scope="session")
def published(shared: Path) -> dict[str, dict[str, Any]]:
    """Published values of losses, by name: `inputs`, `expected`, `atol`."""
    return {f["name"]: f for f in json.loads((shared / "data" / "fixtures" / "fixtures.json").read_text())}


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
