"""A new algorithm is one file of the user's, anywhere on the path, and one config. No file of ours is touched."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from alignlab.cli import main
from alignlab.comparison.graph import local
from alignlab.comparison.graph.process import NodeProcess
from alignlab.core import Interrupted
from alignlab.training.callbacks.progress import ProgressDisplay
from tests.training import forks, runs

ALGORITHM = '''
"""Identity Preference Optimization (Azar et al. 2023, arXiv:2310.12036)."""

from alignlab.core import Algorithm, segment_sum


class IPO(Algorithm):
    unit = "pair"
    needs = ("ref_logp",)

    def __init__(self, tau: float = 0.1):
        self.tau = tau

    def loss(self, outputs, batch):
        pairs = batch.pairs
        ratio_N = segment_sum(outputs.logp_T - batch["ref_logp_T"], batch.response_T, batch.N)
        margin_P = ratio_N[pairs.winner_P] - ratio_N[pairs.loser_P]
        return (margin_P - 1 / (2 * self.tau)) ** 2, {"margin": margin_P}
'''

CONFIG = """
_target_: identity_preferences.IPO
tau: 0.5                       # strength of the constraint, > 0
"""

EXPERIMENT = """
# @package _global_
name: mine
model:
  dtype: float32
rollout:
  max_new_tokens: 3
benchmark:
  demonstrations: 32
  prompt_copies: 4
  world: {words: 5, max_tokens: 3, prompts: 4}
  base: {layers: 1, width: 32, steps: 20, batch_size: 64}
comparison:
  seeds: [0]
  budget: {steps: 4}
  common: [training.progress=off, training.batch_size=8, optimizer.lr=1e-2]
  sft: null
  pairs: {rounds: 1, temperature: 0.2}
  reward_model: null
  algorithms:
    identity: [algorithm=identity, algorithm.tau=0.3, data=groups, "data.path={pairs}"]
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The user's folder: records, a module beside them, and a folder of configs."""
    made = tmp_path_factory.mktemp("user")
    runs.prepare(made)
    for name, text in {
        "modules/identity_preferences.py": ALGORITHM,
        "configs/algorithm/identity.yaml": CONFIG,
        "configs/experiment/mine.yaml": EXPERIMENT.lstrip(),
    }.items():
        (made / name).parent.mkdir(parents=True, exist_ok=True)
        (made / name).write_text(text)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(made / "modules")
        patch.setitem(runs.ALGORITHMS, "identity", ["algorithm=identity", "data=preferences"])
        yield made


def words(folder: Path, out: str, *more: str) -> list[str]:
    options = ["--config-dir", str(folder / "configs")]
    return ["train", *options, *runs.words_for(folder, "identity", out, "training.progress=off", *more)]


def train(folder: Path, out: str, *more: str) -> dict[str, torch.Tensor]:
    assert main(words(folder, out, *more)) == 0
    return runs.weights(folder, out)


@pytest.fixture(scope="module")
def straight(folder: Path) -> dict[str, torch.Tensor]:
    return train(folder, "straight")


ROUNDING = 1e-5


def test_it_trains(folder: Path, straight: dict[str, torch.Tensor]) -> None:
    """Its loss, of the policy against itself, is (0 − 1/(2τ))² = 1 for τ = 1/2; and it falls."""
    lines = runs.metrics(folder, "straight")
    assert lines[0]["loss"] == pytest.approx(1.0, abs=1e-5)
    assert lines[0]["margin"] == pytest.approx(0.0, abs=1e-5)
    train(folder, "whole-batches", "training.batch_size=12")
    losses = [line["loss"] for line in runs.metrics(folder, "whole-batches")]
    assert losses[-1] < losses[0]


def test_its_settings_are_settings(folder: Path) -> None:
    train(folder, "tau", "algorithm.tau=0.25", "training.steps=1")
    assert runs.metrics(folder, "tau")[0]["loss"] == pytest.approx(4.0, abs=1e-4)


def test_it_is_packed_and_split_like_any_other(folder: Path, straight: dict[str, torch.Tensor]) -> None:
    for out, setting in {"plain": "model.layout=plain", "split": "training.max_tokens_per_microbatch=20"}.items():
        assert runs.difference(straight, train(folder, out, setting)) < ROUNDING


def test_it_runs_in_two_processes(folder: Path, straight: dict[str, torch.Tensor]) -> None:
    pids = forks.group([*words(folder, "two"), "distributed=ddp"], folder / "two.log")
    assert [forks.wait(pid) for pid in pids] == [0, 0], (folder / "two.log.0").read_text()
    assert json.loads((folder / "two/result.json").read_text())["processes"] == 2
    assert runs.difference(straight, runs.weights(folder, "two")) < ROUNDING


def test_it_resumes_with_an_adapter(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    more = ["adapter=lora", "adapter.dropout=0.2", "optimizer=adamw", "training.batch_size=2"]
    whole = train(folder, "adapted", *more)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ProgressDisplay, "update", lambda self, step, m: runs.StopAfter(2)(step, m))
        assert main(words(folder, "resumed", *more)) == 143
    assert str(Interrupted("SIGTERM", "checkpoint of step 2 saved")) in capsys.readouterr().err
    assert runs.identical(whole, train(folder, "resumed", *more))


def test_it_has_a_row_on_the_leaderboard(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """The processes in which it trains and is measured have it from the path of the command and from --config-dir."""
    apart: list[str] = []

    def begin(node: Path, *arguments: Any) -> Any:
        """A fork, which knows it from this process, but for what is the algorithm's own."""
        if "identity" not in str(node):
            return forks.Process(node, *arguments)
        apart.append(node.name)
        return NodeProcess(node, *arguments)

    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(["modules", str(runs.REPOSITORY)]))
    monkeypatch.setenv("ALIGNLAB_CACHE", str(folder / "cache"))
    monkeypatch.chdir(folder)
    monkeypatch.setattr(local, "NodeProcess", begin)
    out = folder / "compared"
    assert main(["compare", "--config-dir", "configs", "experiment=mine", f"out={out}"]) == 0
    assert apart
    (row,) = json.loads((out / "leaderboard.json").read_text())["rows"]
    assert row["algorithm"] == "identity"
    assert row["kl"] > 0  # it has learned something
    assert row["trained_tokens"] > 0
    assert "identity" in capfd.readouterr().out


def test_a_name_of_ours_is_refused(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Hydra would take ours without a word."""
    (tmp_path / "algorithm").mkdir()
    (tmp_path / "algorithm/dpo.yaml").write_text(CONFIG)
    for sweep in ([], ["-m"]):
        assert main(["train", "--config-dir", str(tmp_path), *sweep, "algorithm=dpo", "model=m"]) == 2
        assert "alignlab has a file algorithm/dpo.yaml of its own" in capsys.readouterr().err
