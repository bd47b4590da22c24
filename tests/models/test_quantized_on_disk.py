"""What is trained on a quantised base, saved: as an adapter that other tools load, and merged into a plain model."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from alignlab.models import ModelSettings, load_model, save_model
from tests import components, tiny
from tests.models.quantized import KINDS, base, flat, held, load
from tests.models.test_save import RELOAD, learn

components.need("bitsandbytes")
pytestmark = pytest.mark.component


@pytest.mark.parametrize("kind", ["policy", "score", "step"])
@pytest.mark.parametrize(("name", "quantization"), [("llama", "nf4"), ("llama", "int8"), ("gpt2", "nf4")])
def test_merging_is_into_the_dequantised_base(
    saved: Callable[..., Path], tmp_path: Path, name: str, quantization: str, kind: str
) -> None:
    """Square matrices of GPT-2 are stored the other way round: they would load either way."""
    model = load(base(saved, name), quantization, kind, labels=3)
    learn(model, tiny.some_groups())
    before = flat(model)
    (note,) = save_model(model, tmp_path / "merged", merge=True)
    assert torch.equal(flat(model), before), "the model in training stays as it is"
    assert f"the dequantised {quantization} base" in note
    merged = load_model(ModelSettings(path=str(tmp_path / "merged")), None, kind, labels=3)  # type: ignore[arg-type]
    assert {p.dtype for p in merged.parameters()} == {torch.float32}
    assert "quantization_config" not in json.loads((tmp_path / "merged" / "config.json").read_text())
    torch.testing.assert_close(flat(merged), before, atol=2e-5, rtol=1e-5)


def test_the_report_of_a_merge_is_the_difference_there_is(saved: Callable[..., Path], tmp_path: Path) -> None:
    """Where products with the quantised base are in bfloat16, the merged model differs, by what the report says."""
    model, groups = load(base(saved, std=0.1), held("nf4", compute_dtype="bfloat16")), tiny.some_groups()
    learn(model, groups)
    (note,) = save_model(model, tmp_path / "merged", merge=True, texts=groups)
    merged = load_model(ModelSettings(path=str(tmp_path / "merged")))
    difference = (flat(merged) - flat(model)).abs()
    report = json.loads((tmp_path / "merged" / "merge.json").read_text())
    assert report["mean_difference"] == pytest.approx(float(difference.mean()), rel=1e-3)
    assert report["max_difference"] == pytest.approx(float(difference.max()), rel=1e-3)
    assert (report["quantization"], report["compared"], report["texts"]) == ("nf4", "log-probs", 9)
    assert report["numbers"] == len(difference)
    assert report["mean_difference"] > 1e-4, "the guard"
    assert f"{report['max_difference']:.2g} at most" in note


def test_an_adapter_says_what_it_was_trained_on(saved: Callable[..., Path], tmp_path: Path) -> None:
    for trained in ("nf4", "none"):
        save_model(load(base(saved), trained), tmp_path / trained)
    assert not (tmp_path / "none" / "quantization.json").exists()
    assert load(tmp_path / "nf4", "nf4", trainable=False).notes == []
    for trained, used, words in (
        ("nf4", "none", "trained on an nf4 base, and is used on one in full precision: quantization=nf4"),
        ("nf4", "int8", "trained on an nf4 base, and is used on one in int8: quantization=nf4"),
        ("none", "int8", "trained on a base in full precision, and is used on one in int8: quantization=none"),
    ):
        (note,) = load(tmp_path / trained, used, trainable=False).notes
        assert words in note


def test_quantization_json_is_what_the_library_takes(saved: Callable[..., Path], tmp_path: Path) -> None:
    import transformers

    settings = held("nf4", double_quant=False, compute_dtype="bfloat16")
    model = load(base(saved), settings)
    save_model(model, tmp_path / "model")
    found = transformers.BitsAndBytesConfig.from_dict(json.loads((tmp_path / "model/quantization.json").read_text()))
    assert (found.load_in_4bit, found.bnb_4bit_quant_type, found.bnb_4bit_use_double_quant) == (True, "nf4", False)
    assert found.bnb_4bit_compute_dtype == torch.bfloat16
    assert found.to_dict() == model.base.config.quantization_config.to_dict()


KIND_OF = {"causal": "policy", "score": "score", "step": "step"}


def test_plain_transformers_peft_and_bitsandbytes_say_the_same(saved: Callable[..., Path], tmp_path: Path) -> None:
    groups = tiny.some_groups()
    responses = [r for g in groups for r in g.responses]
    sequences = [g.prompt_ids + r.token_ids for g in groups for r in g.responses]
    starts = [len(g.prompt_ids) for g in groups for _ in g.responses]
    requests, ours, untrained = {}, {}, {}
    for loader, kind in KIND_OF.items():
        for quantization in KINDS:
            name, folder = f"{loader} {quantization}", tmp_path / f"{loader}-{quantization}"
            model = load(base(saved), quantization, kind, labels=3)
            untrained[name] = flat(model)
            learn(model, groups)
            save_model(model, folder)
            ours[name] = flat(model)
            requests[name] = {
                **{"folder": str(folder), "base": str(base(saved)), "loader": f"{loader} on quantised base"},
                **{"sequences": sequences, "starts": starts, "labels": 1 if kind == "score" else 3},
            }
    (tmp_path / "requests.json").write_text(json.dumps(requests))
    command = [sys.executable, "-W", "ignore", str(RELOAD), str(tmp_path / "requests.json"), str(tmp_path / "out.json")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=300)
    assert done.returncode == 0, done.stderr
    for name, answer in json.loads((tmp_path / "out.json").read_text()).items():
        if name.startswith("causal"):
            split = torch.tensor(answer["values"]).split([len(r.token_ids) for r in responses])
            ways = [torch.cat([v[torch.tensor(r.predicted)] for v, r in zip(split, responses, strict=True)])]
        elif name.startswith("score"):
            ways = [torch.tensor(way) for way in answer["values"]]  # alone, padded right, padded left
        else:
            read = zip(answer["values"], starts, responses, strict=True)
            ways = [torch.cat([torch.tensor(v)[[s + i for i in r.predicted]].flatten() for v, s, r in read])]
        for way in ways:
            torch.testing.assert_close(way, ours[name], atol=2e-5, rtol=1e-5)
        assert float((ours[name] - untrained[name]).abs().max()) > 0.05 and math.isfinite(float(ours[name].sum()))
