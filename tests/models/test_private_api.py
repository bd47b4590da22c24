"""What models do where private API of a library is not what it was."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from alignlab.core import ConfigError
from alignlab.core.private_api import REACHES, problem
from alignlab.models import LoRA, ModelSettings, PackedModel, load_model, save_model
from tests import tiny
from tests.models.quantized import load as load_quantized

LORA = LoRA(r=4, alpha=8)


def test_importing_the_models_looks_nothing_up() -> None:
    """No operator that only some builds of torch have, and no library that takes a second."""
    script = """
import sys, torch
namespace = type(torch.ops.aten)
found, real = [], namespace.__getattr__
namespace.__getattr__ = lambda self, name: found.append(name) or real(self, name)
for name in [name for name in vars(torch.ops.aten) if "_for_cpu" in name]:
    delattr(torch.ops.aten, name)  # found when torch was imported, perhaps
import alignlab.models, alignlab.models.attention, alignlab.models.private_api
assert not [name for name in found if "cpu" in name or name.startswith("_")], found
assert not {'peft', 'bitsandbytes', 'transformers'} & set(sys.modules)
torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
assert found[-1].endswith("_for_cpu"), "else this test sees nothing"
"""
    subprocess.run([sys.executable, "-c", script], check=True)


@pytest.fixture
def broken(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A reach whose library is of a version that lacks what is used."""

    def fails() -> None:
        raise AttributeError("no such thing\nin this version")

    monkeypatch.setitem(REACHES, request.param, replace(REACHES[request.param], probe=fails))
    problem.cache_clear()
    yield request.param
    problem.cache_clear()


def logp(model: PackedModel) -> torch.Tensor:
    return torch.cat(model.outputs(tiny.some_groups())["logp"])


@pytest.mark.parametrize("broken", ["attention on CPUs", "attention of transformers"], indirect=True)
def test_attention_goes_through_a_mask(broken: str, tmp_path: Path) -> None:
    model = load_model(ModelSettings(path=str(tiny.save(tmp_path))))
    assert model.layout == "packed"
    (note,) = model.notes
    assert note == (
        f"{REACHES[broken].into} of {REACHES[broken].library} {REACHES[broken].version} "
        f"(known: {REACHES[broken].known[0]}) cannot be used (no such thing): "
        "attention goes through a mask of all pairs"
    )
    with torch.no_grad():
        expected = tiny.plain_log_probs(model.network, tiny.some_groups())
    torch.testing.assert_close(logp(model), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("broken", ["LoRA layers"], indirect=True)
def test_lora_layers_are_peft_s_own(broken: str, tmp_path: Path) -> None:
    from alignlab.models.lora import FusedLinear

    model = load_model(ModelSettings(path=str(tiny.save(tmp_path))), LORA)
    (note,) = model.notes
    assert note.endswith("LoRA layers multiply in three products")
    assert not any(isinstance(m, FusedLinear) for m in model.modules())
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.1
        expected = tiny.plain_log_probs(model.network, tiny.some_groups())
    torch.testing.assert_close(logp(model), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("broken", ["quantised layers", "dequantising"], indirect=True)
def test_quantised_bases_are_used_or_refused_with_a_reason(broken: str, tmp_path: Path) -> None:
    model = load_quantized(tiny.save(tmp_path / "base", **tiny.QUANTIZABLE), "nf4", adapter=LORA)
    said = [note for note in model.notes if "no such thing" in note]
    if broken == "quantised layers":
        (note,) = said
        assert note.endswith("may compute log-probs in evaluation that are not those of training")
    else:
        assert said == []
        with pytest.raises(ConfigError, match=r"^training\.save_model=merged: .*no such thing.*save the adapter"):
            save_model(model, tmp_path / "merged", merge=True)
        save_model(model, tmp_path / "adapter")
