"""A folder with a tiny model and data, and mistakes made in it."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from alignlab.cli import main
from tests.training import runs


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("commands")
    runs.prepare(made)
    (made / "bad.jsonl").write_text('{"prompt": "a", "completion": "b"}\n{"prompt": "a", "completionn": "b"}\n')
    (made / "modules").mkdir()
    (made / "modules/my_own.py").write_text(
        "from alignlab.core import Algorithm\n\n\n"
        "class Own(Algorithm):\n"
        "    unit = 'token'\n\n"
        "    def __init__(self, gamma: float = 1.0):\n"
        "        self.gamma = gamma\n\n"
        "    def loss(self, outputs, batch):\n"
        "        return -self.gamma * outputs.logp_T, {}\n\n\n"
        "class Needy(Own):\n"
        "    needs = ('advantage',)\n\n"
        "    def loss(self, outputs, batch):\n"
        "        return -outputs.logp_T * batch['advantage_N'][batch.response_T], {}\n\n\n"
        "class Mistyped(Own):\n"
        "    needs = ('ref_lgp',)\n\n\n"
        "class Stranger:\n"
        "    pass\n"
    )
    return made


@pytest.fixture
def mistake(folder: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Runs a command that must fail with status 2 and say one line; the line without "alignlab: "."""
    monkeypatch.syspath_prepend(folder / "modules")
    monkeypatch.chdir(folder)
    shutil.rmtree(folder / "mistaken", ignore_errors=True)

    def run(*words: str) -> str:
        capfd.readouterr()
        assert main(list(words)) == 2
        said = capfd.readouterr().err
        assert said.startswith("alignlab: ") and said.count("\n") == 1, said
        return said.removeprefix("alignlab: ").strip()

    return run
