"""A model out of a run: finished or not, from any engine's checkpoint, merged or not."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch

from alignlab.cli import main
from alignlab.core import Interrupted
from alignlab.models import ModelSettings, load_model
from alignlab.training.callbacks.progress import ProgressDisplay
from tests import tiny
from tests.training import many, runs

ADAM = ["optimizer=adamw", "optimizer.lr=1e-2", "training.checkpoint_every=2", "training.keep_last=9"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("export")
    runs.prepare(made, **tiny.QUANTIZABLE)
    return made


def log_probs(path: Path) -> torch.Tensor:
    model = load_model(ModelSettings(path=str(path)), trainable=False)
    groups = tiny.groups([(5, [4, 6]), (8, [3])])
    return torch.cat(model.outputs(groups)["logp"])


@pytest.mark.parametrize("merge", ["true", "false"])
def test_a_finished_run(folder: Path, merge: str) -> None:
    """Merged it is a plain model that says what the adapter on its base says."""
    if not (folder / "dpo/result.json").exists():
        runs.train(folder, "dpo", "dpo", "adapter=lora", *ADAM)
    out = folder / f"merged-{merge}"
    assert main(["export", f"run={folder}/dpo", f"out={out}", f"merge={merge}"]) == 0
    assert (out / "model.safetensors").exists() == (merge == "true")
    assert (out / "adapter_model.safetensors").exists() == (merge == "false")
    torch.testing.assert_close(log_probs(out), log_probs(folder / "dpo/model"), rtol=1e-4, atol=1e-5)
    assert (log_probs(out) - log_probs(folder / "base")).abs().max() > 1e-2, "the guard: training changed something"


@pytest.mark.component
def test_a_checkpoint_of_a_divided_run_stopped_on_the_way(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What ZeRO-3 and FSDP had after four steps is what one process had then."""
    with monkeypatch.context() as patch:
        patch.setattr(ProgressDisplay, "update", lambda self, step, m: runs.StopAfter(4)(step, m))
        with pytest.raises(Interrupted):
            runs.train(folder, "sft", "sft-single", "training.checkpoint_every=2")
    assert main(["export", f"run={folder}/sft-single", f"out={folder}/sft-single-exported"]) == 0
    expected = runs.weights_of(folder / "sft-single-exported")
    jobs = [
        {
            "algorithm": "sft",
            "out": f"sft-{m}",
            "words": [f"distributed={m}", "training.checkpoint_every=2", "training.keep_last=9"],
        }
        for m in ("fsdp", "zero3")
    ]
    many.together(folder, jobs)
    for mode in ("fsdp", "zero3"):
        out = folder / f"sft-{mode}-exported"
        assert main(["export", f"run={folder}/sft-{mode}", f"out={out}", "checkpoint=step-4"]) == 0
        assert runs.difference(expected, runs.weights_of(out)) < 1e-5
        assert runs.difference(runs.weights(folder, f"sft-{mode}"), runs.weights_of(out)) > 1e-4, "two steps later"


def test_a_critic_comes_along(folder: Path) -> None:
    runs.train(folder, "ppo", "ppo", "adapter=lora", "algorithm.critic=own", *ADAM)
    out = folder / "ppo-exported"
    assert main(["export", f"run={folder}/ppo", f"out={out}", "checkpoint=last", "merge=false"]) == 0
    for name in ("value_head.safetensors", "critic/adapter_model.safetensors", "adapter_model.safetensors"):
        assert (out / name).read_bytes() == (folder / "ppo/model" / name).read_bytes()


def test_what_cannot_be_exported_is_said(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if not (folder / "dpo/result.json").exists():
        runs.train(folder, "dpo", "dpo", "adapter=lora", *ADAM)
    steps = "step-00000002, step-00000004, step-00000006"
    for words, message in (
        (["run=nowhere"], "run=nowhere: not the folder of a training run: it has no config.yaml"),
        (
            [f"run={folder}/dpo", "checkpoint=step-5"],
            f"checkpoint=step-5: there is no step-00000005; there are {steps}",
        ),
        ([f"run={folder}/dpo", "checkpoint=best"], "no checkpoint to export"),
        ([f"run={folder}/dpo", f"out={folder}/base"], "there is something already: choose another folder"),
    ):
        out = [] if any(w.startswith("out=") for w in words) else [f"out={folder}/new"]
        assert main(["export", *words, *out]) == 2
        assert message in capsys.readouterr().err
    assert not (folder / "new").exists()
    damaged = folder / "dpo/checkpoints/step-00000006"
    shard = next(damaged.glob("trained-*"))
    os.truncate(shard, shard.stat().st_size - 1)
    assert main(["export", f"run={folder}/dpo", f"out={folder}/new", "checkpoint=6"]) == 2
    assert "bytes instead of" in capsys.readouterr().err
    assert json.loads((folder / "dpo/result.json").read_text())["step"] == 6
