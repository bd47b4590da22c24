"""What is saved says the same to plain transformers and peft, in a process that knows nothing of this project."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from alignlab.core import AdapterKind, Group
from alignlab.core.storage import StorageError
from alignlab.models import LoRA, ModelSettings, PackedModel, load_model, save_model
from tests import tiny

RELOAD = Path(__file__).with_name("plain_reload.py")
LORA = LoRA(r=4, alpha=8)
READS = {"policy": "logp", "score": "score", "step": "step"}


def learn(model: PackedModel, groups: list[Group], steps: int = 2) -> None:
    """A few real steps, large enough to be seen."""
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.02)
    for _ in range(steps):
        value = next(iter(model(model.lay_out(groups), (READS[model.kind],)).values()))
        (value * torch.linspace(-1, 1, len(value)).view(-1, *[1] * (value.dim() - 1))).sum().backward()
        optimizer.step()
        optimizer.zero_grad()


def says(model: PackedModel, groups: list[Group]) -> list[Tensor]:
    return model.outputs(groups, (READS[model.kind],))[READS[model.kind]]


@dataclass
class Case:
    kind: str
    base: str
    """Architecture of the base; "stories" is a real model."""
    adapter: AdapterKind | None = None
    merge: bool = False
    loaders: tuple[str, ...] = ()


CASES = {
    "full policy": Case("policy", "llama", None, loaders=("causal",)),
    "full policy, tied head": Case("policy", "gpt2", None, loaders=("causal",)),
    "adapter policy": Case("policy", "qwen2", LORA, loaders=("causal on base", "causal, auto")),
    "adapter policy, merged": Case("policy", "mistral", LORA, merge=True, loaders=("causal",)),
    "full reward model": Case("score", "gemma", None, loaders=("score",)),
    "adapter reward model": Case("score", "llama", LORA, loaders=("score on base", "score, auto")),
    "adapter reward model, merged": Case("score", "qwen2", LORA, merge=True, loaders=("score",)),
    "full step model": Case("step", "llama", None, loaders=("step",)),
    "adapter step model": Case("step", "qwen2", LORA, loaders=("step on base",)),
    "real adapter policy": Case("policy", "stories", LORA, loaders=("causal on base", "causal, auto")),
    "real policy, merged": Case("policy", "stories", LORA, merge=True, loaders=("causal",)),
    "real reward model": Case("score", "stories", None, loaders=("score",)),
    "real adapter reward model": Case("score", "stories", LORA, loaders=("score on base",)),
}


@pytest.fixture(scope="module")
def reloaded(saved: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Any, Any, Any]]:
    """For each case that can be run here: (what ours said, what it said before training, plain answers by loader)."""
    here = tmp_path_factory.mktemp("reload")
    real = Path(__file__).parents[3] / "shared" / "models" / "TinyStories-656K"
    groups = tiny.some_groups()
    requests: dict[str, dict[str, Any]] = {}
    ours: dict[str, tuple[list[Tensor], list[Tensor]]] = {}
    for number, (name, case) in enumerate(CASES.items()):
        if case.base == "stories" and not real.is_dir():
            continue
        base = real if case.base == "stories" else saved(case.base)
        model = load_model(
            ModelSettings(path=str(base), dtype="float32"),
            case.adapter,
            case.kind,
            labels=3,  # type: ignore[arg-type]
        )
        before = says(model, groups)
        learn(model, groups)
        folder = here / str(number)
        save_model(model, folder, merge=case.merge)
        ours[name] = says(model, groups), before
        sequences = [g.prompt_ids + r.token_ids for g in groups for r in g.responses]
        starts = [len(g.prompt_ids) for g in groups for _ in g.responses]
        for loader in case.loaders:
            requests[f"{name}: {loader}"] = {
                "folder": str(folder), "base": str(base), "loader": loader, "sequences": sequences, "starts": starts
            }  # fmt: skip
    (here / "requests.json").write_text(json.dumps(requests))
    command = [sys.executable, "-W", "ignore", str(RELOAD), str(here / "requests.json"), str(here / "answers.json")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=here, timeout=300)
    assert done.returncode == 0, done.stderr
    answers = json.loads((here / "answers.json").read_text())
    return {
        name: (*ours[name], {loader: answers[f"{name}: {loader}"] for loader in CASES[name].loaders}) for name in ours
    }


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[pytest.mark.real_data] * (c.base == "stories")) for n, c in CASES.items()]
)
def test_plain_transformers_and_peft_say_the_same(name: str, reloaded: dict[str, tuple[Any, Any, Any]]) -> None:
    if name not in reloaded:
        pytest.skip("needs the real model of ../shared, which is not here")
    after, before, answers = reloaded[name]
    groups = tiny.some_groups()
    responses = [r for g in groups for r in g.responses]
    assert (torch.cat([v.flatten() for v in after]) - torch.cat([v.flatten() for v in before])).abs().max() > 0.05
    for loader, answer in answers.items():
        if loader.startswith("causal"):
            plain = torch.tensor(answer["values"]).split([len(r.token_ids) for r in responses])
            found = [v[torch.tensor(r.predicted)] for v, r in zip(plain, responses, strict=True)]
            torch.testing.assert_close(torch.cat(found), torch.cat(after), atol=1e-5, rtol=0)
        elif loader.startswith("score"):
            for way in answer["values"]:  # alone, padded right, padded left
                torch.testing.assert_close(torch.tensor(way), torch.stack(after), atol=1e-5, rtol=0)
        else:
            starts = [len(g.prompt_ids) for g in groups for _ in g.responses]
            plain = [
                torch.tensor(v)[[s + i for i in r.predicted]]
                for v, s, r in zip(answer["values"], starts, responses, strict=True)
            ]
            torch.testing.assert_close(torch.cat(plain), torch.cat(after), atol=1e-5, rtol=0)


def test_merging_leaves_the_model_in_training_as_it_is(saved: Callable[..., Path], tmp_path: Path) -> None:
    model, groups = load_model(ModelSettings(path=str(saved())), LORA), tiny.some_groups()
    learn(model, groups)
    before = torch.cat(says(model, groups))
    names = {n: p.requires_grad for n, p in model.named_parameters()}
    save_model(model, tmp_path / "merged", merge=True)
    assert torch.equal(torch.cat(says(model, groups)), before)
    assert {n: p.requires_grad for n, p in model.named_parameters()} == names
    assert not (tmp_path / "merged" / "adapter_config.json").exists()
    merged = load_model(ModelSettings(path=str(tmp_path / "merged")))
    torch.testing.assert_close(torch.cat(says(merged, groups)), before, atol=1e-5, rtol=0)


@torch.no_grad()
def test_what_a_half_precision_base_takes_from_an_adapter_is_measured_and_said(tmp_path: Path) -> None:
    """Less than 1/512 of a weight is lost in bfloat16."""
    tiny.save(tmp_path / "base")
    settings = ModelSettings(path=str(tmp_path / "base"), dtype="bfloat16", layout="plain")
    model, groups = load_model(settings, LORA), tiny.some_groups()
    base = torch.cat(says(model, groups))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.fill_(1e-3)
    (note,) = save_model(model, tmp_path / "merged", merge=True, texts=groups)
    report = json.loads((tmp_path / "merged/merge.json").read_text())
    assert (report["quantization"], report["dtype"], report["numbers"]) == ("none", "bfloat16", len(base))
    assert (
        "merged into the bfloat16 base: log-probs differ by" in note and "rounds away most of a small adapter" in note
    )
    merged = load_model(settings.model_copy(update={"path": str(tmp_path / "merged")}))
    difference = (torch.cat(says(model, groups)) - torch.cat(says(merged, groups))).abs()
    assert report["max_difference"] == pytest.approx(float(difference.max()), rel=1e-3) and difference.max() > 0
    assert save_model(load_model(settings, LORA), tmp_path / "adapter") == []


@pytest.mark.skipif(torch.cuda.is_available(), reason="GPUs keep bfloat16")
def test_a_wider_model_than_it_was_is_said(tmp_path: Path) -> None:
    tiny.network().to(torch.bfloat16).save_pretrained(tmp_path / "base")
    tiny.tokenizer().save_pretrained(tmp_path / "base")
    for dtype, said in (("auto", 1), ("bfloat16", 0), ("float32", 0)):
        model = load_model(ModelSettings(path=str(tmp_path / "base"), dtype=dtype, layout="packed"))  # type: ignore[arg-type]
        notes = save_model(model, tmp_path / dtype)
        assert ["saved in float32" in n and "model.dtype=bfloat16 keeps it" in n for n in notes] == [True] * said


def test_an_adapter_is_small_and_knows_its_base(saved: Callable[..., Path], tmp_path: Path) -> None:
    save_model(load_model(ModelSettings(path=str(saved())), LORA), tmp_path / "model")
    names = {p.name for p in (tmp_path / "model").iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors", "tokenizer.json"} <= names
    assert "model.safetensors" not in names
    config = json.loads((tmp_path / "model" / "adapter_config.json").read_text())
    assert Path(config["base_model_name_or_path"]) == saved()


def test_a_failure_leaves_what_was_saved_before(
    saved: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load_model(ModelSettings(path=str(saved())))
    folder = tmp_path / "model"
    save_model(model, folder)
    before = (folder / "model.safetensors").read_bytes()

    def fails(*_: object, **__: object) -> None:
        raise OSError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr(type(model.tokenizer), "save_pretrained", fails)
        with pytest.raises(StorageError, match="model could not be saved: disk full"):
            save_model(model, folder)
    assert (folder / "model.safetensors").read_bytes() == before
    learn(model, tiny.some_groups())
    save_model(model, folder)
    assert (folder / "model.safetensors").read_bytes() != before
    assert [p.name for p in tmp_path.iterdir()] == ["model"], "nothing half-written is left"
