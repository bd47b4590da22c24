"""Traps that show only in whole runs; the list of all of them is in test_traps.py."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from alignlab.algorithms.ppo import PPO
from alignlab.algorithms.sft import SFT
from alignlab.core import AlignlabError, Group
from alignlab.models import ModelSettings, load_model
from alignlab.training.collect import Collected, Collector
from alignlab.training.order import shares
from tests import tiny
from tests.training import forks, runs

Saved = Callable[..., Path]
LR = ["optimizer=adamw", "optimizer.lr=0.02"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("traps")
    runs.prepare(made)
    return made


@pytest.fixture
def collected(monkeypatch: pytest.MonkeyPatch) -> list[Collected]:
    """What the iterations of the runs in a test are trained on."""
    found: list[Collected] = []
    collect = Collector.collect

    def spy(self: Collector, groups: list[Group], seed: int, **more: Any) -> Collected:
        found.append(collect(self, groups, seed, **more))
        return found[-1]

    monkeypatch.setattr(Collector, "collect", spy)
    return found


def column(groups: list[Group], name: str) -> list[float]:
    """A column of all responses in one list."""
    found = [r.columns[name] for g in groups for r in g.responses]
    return [float(v) for value in found for v in np.ravel(value)]


# ------------------------------------------------------------------ several processes


@pytest.mark.parametrize("algorithm", ["ppo", "reinforce_pp"])
def test_whitening_per_process(folder: Path, algorithm: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two processes have the advantages of one, of mean 0 and variance 1 over both; a share of them by itself does
    not."""
    collect = Collector.collect

    def spy(self: Collector, groups: list[Group], seed: int, **more: Any) -> Collected:
        found, world, rank = collect(self, groups, seed, **more), self.processes.world, self.processes.rank
        mine = [found.groups[i] for i in shares(found.groups, world)[rank]]
        told = {"all": column(found.groups, "advantage"), "mine": column(mine, "advantage")}
        (tmp_path / f"{world}-{rank}.json").write_text(json.dumps(told))
        return found

    monkeypatch.setattr(Collector, "collect", spy)
    more = ["training.steps=1", "++source.rollout_batch_size=10", "training.batch_size=10"]
    runs.train(folder, algorithm, f"{algorithm}-one", *more)
    forks.train(folder, algorithm, f"{algorithm}-two", *more)
    one, left, right = (json.loads((tmp_path / f"{n}.json").read_text()) for n in ("1-0", "2-0", "2-1"))
    assert left["all"] == right["all"] == pytest.approx(one["all"], abs=1e-4)
    assert statistics.fmean(one["all"]) == pytest.approx(0, abs=1e-4)
    assert statistics.pstdev(one["all"]) == pytest.approx(1, abs=1e-3)
    assert len(left["mine"]) + len(right["mine"]) == len(one["all"])
    assert abs(statistics.fmean(left["mine"]) - statistics.fmean(right["mine"])) > 0.02


# ------------------------------------------------------------------ step 0

AT_THE_REFERENCE = {
    "dpo": {"margin": 0.0, "accuracy": 0.0, "loss": math.log(2)},
    "ipo": {"margin": 0.0, "loss": 1 / (4 * 0.1**2)},
    "kto": {"z_ref": 0.0, "loss": 0.5},
    "ppo": {"kl": 0.0, "ratio": 1.0, "approx_kl": 0.0, "clip_fraction": 0.0},
}
"""What is known of the first step, whatever the model: the policy is the reference and its own past."""

PRECISIONS = {
    "float32": ["model.dtype=float32"],
    "bfloat16": ["model.dtype=bfloat16"],
    "mixed": ["training.mixed_precision=bf16"],
}
STEPS = [("float32", "ipo"), ("float32", "kto"), *((p, a) for p in ("bfloat16", "mixed") for a in ("dpo", "ppo"))]


@pytest.mark.parametrize("adapter", ["none", "lora"])
@pytest.mark.parametrize(("precision", "algorithm"), STEPS)
def test_step_0(folder: Path, precision: str, adapter: str, algorithm: str) -> None:
    """To the last bit: the reference computes in the policy's precision."""
    out = f"{algorithm}-{adapter}-{precision}"
    more = ["algorithm.label_smoothing=0"] if algorithm == "dpo" else []
    size = ["training.batch_size=10", "training.steps=1"]
    runs.train(folder, algorithm, out, *PRECISIONS[precision], f"adapter={adapter}", *size, *more)
    (line,) = runs.metrics(folder, out)
    for name, value in AT_THE_REFERENCE[algorithm].items():
        assert line[name] == (pytest.approx(value) if name == "loss" else value), name
    assert 0 < line["grad_norm"] < math.inf


# ------------------------------------------------------------------ log-probs of one kind everywhere


@pytest.mark.parametrize("kind", ["full", "adapter"])
def test_dropout_in_log_probs(folder: Path, saved: Saved, collected: list[Collected], kind: str) -> None:
    """With a model that is trained with dropout and a learning rate of 0: what it was sampled with, its old log-probs
    and the reference's are those of the network without, in every iteration."""
    dropout = {"resid_pdrop": 0.5, "embd_pdrop": 0.5, "attn_pdrop": 0.5}
    start = ["model.path=" + str(saved("gpt2", std=0.15, **dropout)), "model.dropout=true"]
    if kind == "adapter":
        runs.train(folder, "sft", "sft", *LR, "adapter=lora", "adapter.dropout=0.5", "training.steps=3")
        start = [f"model.path={folder}/sft/model", "adapter=lora", "adapter.dropout=0.5"]
        collected.clear()
    still = ["optimizer.lr=0", "training.steps=3", "source.ppo_epochs=1", "source.rollout_batch_size=5"]
    runs.train(folder, "ppo", f"dropout-{kind}", *start, *still)
    network = load_model(ModelSettings(path=start[0].partition("=")[2]), trainable=False).network.eval()
    assert len(collected) == 3
    for found in collected:
        with torch.no_grad():
            expected = tiny.plain_log_probs(network, found.groups).tolist()
        for name in ("behaviour_logp", "old_logp", "ref_logp"):
            assert column(found.groups, name) == pytest.approx(expected, abs=1e-4), name
    assert runs.metrics(folder, f"dropout-{kind}")[0]["approx_kl"] > 1e-3, "the guard: in training there is dropout"


@pytest.mark.parametrize("adapter", ["none", "lora"])
def test_temperature_and_old_log_probs(folder: Path, collected: list[Collected], adapter: str) -> None:
    """Two iterations of two passes over two minibatches, sampled at temperature 1/2. What was sampled with is what the
    ratio is to, at the first minibatch of each; the reference stays the base."""
    out = f"cold-{adapter}"
    more = ["source.rollout_batch_size=12", "training.batch_size=6", "training.steps=8", f"adapter={adapter}"]
    runs.train(folder, "ppo", out, *LR, *more, "rollout.temperature=0.5")
    lines = runs.metrics(folder, out)
    network = load_model(ModelSettings(path=str(folder / "base")), trainable=False).network
    assert len(collected) == 2
    for found in collected:
        behaviour = column(found.groups, "behaviour_logp")
        assert column(found.groups, "old_logp") == pytest.approx(behaviour, abs=1e-4)
        with torch.no_grad():
            base, warm = (tiny.plain_log_probs(network, found.groups, t).tolist() for t in (0.5, 1.0))
        assert column(found.groups, "ref_logp") == pytest.approx(base, abs=1e-4)
        assert base != pytest.approx(warm, abs=0.1)
    assert behaviour != pytest.approx(base, abs=0.05), "the policy has moved, the reference has not"
    fresh = [line["ratio"] == pytest.approx(1, abs=1e-4) and line["approx_kl"] < 1e-6 for line in lines]
    assert fresh == [True, False, False, False] * 2
    assert lines[0]["kl"] == 0 and abs(lines[4]["kl"]) > 0.01
    lengths = [len(r.token_ids) for g in collected[0].groups for r in g.responses]
    assert lines[0]["response_length"] + lines[1]["response_length"] == pytest.approx(2 * statistics.fmean(lengths))


# ------------------------------------------------------------------ nothing to learn


def test_nothing_to_learn(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A record whose tokens all bear no loss is left out, and that is said; a step without such a token, which an
    algorithm may still make of the others, is one without a loss, not one with a loss of 0."""
    records = []
    for i, mask in enumerate([[True, True], [False, False], [True, True]]):
        response = {"token_ids": [7 + i, tiny.EOS], "loss_mask": mask}
        records.append(json.dumps({"prompt_ids": [5, 6 + i], "responses": [response]}) + "\n")
    (tmp_path / "groups.jsonl").write_text("".join(records))
    asked: list[int] = []

    def masks_the_second(self: SFT, groups: list[Group]) -> list[Group]:
        asked.append(len(groups))
        none = [replace(r, loss_mask=[False] * len(r.token_ids)) for g in groups for r in g.responses]
        return [g.with_responses([r]) for g, r in zip(groups, none, strict=True)] if len(asked) == 2 else groups

    monkeypatch.setattr(SFT, "prepare", masks_the_second)
    more = ["data=groups", f"data.path={tmp_path}/groups.jsonl", "training.batch_size=1", "training.steps=3"]
    runs.train(folder, "sft", "masked", *more)
    assert "dropped, since nothing that bears loss was left: 1 records" in capsys.readouterr().out
    lines = runs.metrics(folder, "masked")
    said = [("loss" in line, "nll" in line, line.get("skipped"), line["grad_norm"] > 0) for line in lines]
    learned = (True, True, None, True)
    assert said == [learned, (False, False, 1.0, False), learned]
    assert [line["trained_tokens"] for line in lines] == [2, 2, 4]


def constant(prompt: str, response: str, extra: dict[str, Any]) -> float:
    return 1.0


def test_pairs_without_a_winner(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Equal rewards make no pairs: nothing is learned, no loss is reported, and no model is written as if there had."""
    monkeypatch.setitem(runs.ALGORITHMS, "ties", ["algorithm=dpo", *runs.ONLINE])
    more = [
        "scoring.function.path=tests.traps.test_traps_in_runs.constant",
        "training.steps=2",
        "training.max_grad_norm=null",
    ]
    with pytest.raises(AlignlabError, match="nothing was trained in 2 steps: there was nothing to learn from"):
        runs.train(folder, "ties", "ties", *more)
    assert [(line["skipped"], "loss" in line) for line in runs.metrics(folder, "ties")] == [(1.0, False)] * 2
    assert not (folder / "ties/model").exists()
    assert not PPO(target_kl=0.1).enough({}), "a step without tokens has no KL either"
