"""Every algorithm on a quantised base: what is trained, what is not, and that it comes back from disk."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from alignlab.benchmarks.evaluate import evaluate
from alignlab.benchmarks.stories import StoriesBenchmark
from alignlab.config import compose, resolve
from alignlab.core import ConfigError, Group, Interrupted
from alignlab.models import (
    LoRA,
    ModelSettings,
    PackedModel,
    QuantizationSettings,
    add_value_head,
    load_model,
)
from alignlab.rollout.produce import produce
from alignlab.training import run as training_run
from alignlab.training.callbacks.progress import ProgressDisplay
from tests import components, tiny
from tests.training import runs

components.need("bitsandbytes")
pytestmark = pytest.mark.component

NF4 = ["quantization=nf4", "adapter=lora", "adapter.r=4"]
ADAM = ["optimizer=adamw", "optimizer.lr=0.01"]
RUNS = {name: (name, []) for name in runs.ALGORITHMS} | {"ppo_own_critic": ("ppo", ["algorithm.critic=own"])}
"""Name → algorithm and what else is said."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("qlora")
    runs.prepare(made, **tiny.QUANTIZABLE)
    return made


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[PackedModel]:
    """The models that runs of this test save, as they are in memory."""
    found: list[PackedModel] = []
    save = training_run.save_model

    def keep(model: PackedModel, *arguments: Any, **options: Any) -> Any:
        found.append(model)
        return save(model, *arguments, **options)

    monkeypatch.setattr(training_run, "save_model", keep)
    return found


def base_weights(model: PackedModel) -> dict[str, Tensor]:
    """Everything under the adapter and the heads, with the scales of quantised weights, as it is held."""
    state = model.base.state_dict()
    own = ("lora_", "score.", "classifier.")
    return {k.replace(".base_layer", ""): v for k, v in state.items() if not any(name in k for name in own)}


def says(model: PackedModel, groups: Sequence[Group]) -> Tensor:
    """All that it reads off the groups, flat."""
    reads = {"policy": ["logp"], "score": ["score"], "step": ["step"]}[model.kind]
    reads += ["value"] if model.value_head is not None else []
    found = model.outputs(groups, reads)
    return torch.cat([v.flatten() for name in reads for v in found[name]])


@pytest.mark.parametrize("name", RUNS)
def test_the_adapter_learns_the_base_stays_and_both_come_back(
    folder: Path, name: str, trained: list[PackedModel]
) -> None:
    algorithm, more = RUNS[name]
    runs.train(folder, algorithm, name, *NF4, *ADAM, *more, "training.steps=2")
    assert all(math.isfinite(m["loss"]) for m in runs.metrics(folder, name))
    model = trained[0]
    quantized = [m for m in model.base.modules() if type(m).__name__ == "Linear4bit" and hasattr(m, "compute_dtype")]
    assert len(quantized) == 14  # seven in each of the two layers, no head among them
    head = next(model.head.parameters())
    assert head.dtype == torch.float32

    settings = ModelSettings(path=str(folder / "base"))
    nf4, lora = QuantizationSettings(kind="nf4"), LoRA(r=4)
    fresh = load_model(settings, lora, model.kind, labels=len(head), quantization=nf4)
    before, after = base_weights(fresh), base_weights(model)
    assert any(v.dtype == torch.uint8 for v in before.values())
    assert runs.identical(before, after)

    saved = runs.weights(folder, name)
    assert saved, "the adapter"
    assert all(v.is_floating_point() for v in saved.values())
    assert all(v.abs().max() > 0 for n, v in saved.items() if "lora_B" in n), "it starts from zero"
    if model.kind != "policy":
        kept = next(v for n, v in saved.items() if n.endswith((".score.weight", ".classifier.weight")))
        assert not torch.equal(kept, next(fresh.head.parameters())), "the head is trained"

    groups = tiny.some_groups()
    from_disk = ModelSettings(path=str(folder / name / "model"))
    again = load_model(from_disk, lora, model.kind, labels=len(head), quantization=nf4)
    if model.value_head is not None:
        add_value_head(again, model.critic, seed=5)
    assert again.notes == []
    assert torch.equal(says(model, groups), says(again, groups))
    assert not torch.allclose(says(model, groups)[:20], says(fresh, groups)[:20], atol=1e-3), "the guard"


@pytest.mark.parametrize("quantization", ["nf4", "int8"])
def test_a_run_on_a_quantised_base_is_merged_into_a_plain_model(
    folder: Path, quantization: str, trained: list[PackedModel], capsys: pytest.CaptureFixture
) -> None:
    """PPO with a critic of its own: its adapter is folded into the dequantised base too."""
    words = [f"quantization={quantization}", "adapter=lora", *ADAM, "algorithm.critic=own", "training.steps=2"]
    runs.train(folder, "ppo", f"merged-{quantization}", *words, "training.save_model=merged")
    assert f"note: merged into the dequantised {quantization} base: log-probs differ by" in capsys.readouterr().err
    merged = load_model(ModelSettings(path=str(folder / f"merged-{quantization}" / "model")))
    add_value_head(merged, "own", seed=5)
    assert not hasattr(merged.config, "quantization_config")
    assert {p.dtype for p in merged.parameters()} == {torch.float32}
    groups = tiny.some_groups()
    # Products with the base are float32 here, with the very same weights: what is left is the order of sums.
    torch.testing.assert_close(says(merged, groups), says(trained[0], groups), atol=1e-4, rtol=0)


@pytest.mark.parametrize("quantization", ["nf4", "int8"])
def test_resumed_run_is_bit_identical(folder: Path, quantization: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With paged 8-bit AdamW, whose state is in 8 bits for the larger tensors, and with dropout."""
    more = [f"quantization={quantization}", "adapter=lora", "adapter.dropout=0.2", "optimizer=paged_adamw_8bit"]
    more += ["optimizer.lr=0.01", "optimizer.min_8bit_size=512", "training.batch_size=2"]
    whole, parts = (f"{quantization}-{part}" for part in ("whole", "parts"))
    runs.train(folder, "dpo", whole, *more)
    with monkeypatch.context() as patch:
        patch.setattr(ProgressDisplay, "update", lambda self, step, m: runs.StopAfter(3)(step, m))
        with pytest.raises(Interrupted, match=r"SIGTERM; checkpoint of step 3"):
            runs.train(folder, "dpo", parts, *more)
    runs.train(folder, "dpo", parts, *more)
    assert runs.identical(runs.weights(folder, whole), runs.weights(folder, parts))
    mine, theirs = runs.metrics(folder, whole), runs.metrics(folder, parts)
    assert [(m["step"], m["loss"]) for m in mine] == [(m["step"], m["loss"]) for m in theirs]


def test_a_quantised_base_cannot_be_trained_itself(folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"quantization=nf4: .* give adapter=lora"):
        runs.train(folder, "sft", "refused", "quantization=nf4")
    assert not (folder / "refused").exists()


def test_gradient_checkpointing_changes_nothing(folder: Path) -> None:
    for out, words in {"kept": [], "recomputed": ["model.gradient_checkpointing=true"]}.items():
        runs.train(folder, "dpo", out, *NF4, *words)
    assert runs.difference(runs.weights(folder, "kept"), runs.weights(folder, "recomputed")) < 1e-6


def test_sampling_and_measuring_use_the_base_that_is_asked_for(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """And say so where the adapter was trained on another."""
    runs.train(folder, "sft", "sampled", *NF4, "training.steps=1")
    words = [f"model={folder}/sampled/model", f"data.path={folder}/prompts.jsonl", "rollout.max_new_tokens=4"]
    notes = {}
    for held in ("nf4", "none"):
        capsys.readouterr()
        produce(resolve(compose("sample", [*words, f"quantization={held}"])), folder / f"samples-{held}")
        notes[held] = capsys.readouterr().err
    assert "note: " not in notes["nf4"]
    assert "was trained on an nf4 base, and is used on one in full precision" in notes["none"]

    held_in: dict[str, str] = {}

    def keep(self: object, subject: Any) -> dict[str, float]:
        for name, policy in (("policy", subject.policy), ("base", subject.base())):
            held_in[name] = str(getattr(policy.model.base.config, "quantization_config", "whole"))
        with subject.reference() as policy:
            held_in["reference"] = str(getattr(policy.model.base.config, "quantization_config", "whole"))
        return {}

    monkeypatch.setattr(StoriesBenchmark, "evaluate", keep)
    words = [f"run={folder}/sampled", f"base={folder}/base", "benchmark=stories", "quantization=nf4"]
    evaluate(resolve(compose("evaluate", words)))
    assert held_in["base"] == "whole", "the judge of fluency is no part of what is measured"
    assert "nf4" in held_in["policy"] and "nf4" in held_in["reference"]
