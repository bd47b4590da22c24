"""An adapter that is trained further: what the settings still say of it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

from alignlab.models import LoRA, ModelSettings, load_model, save_model
from tests import tiny
from tests.models.test_save import LORA


def test_dropout_is_this_run_s_the_rest_is_the_saved_adapter_s(saved: Callable[..., Path], tmp_path: Path) -> None:
    save_model(load_model(ModelSettings(path=str(saved())), LORA), tmp_path / "model")
    settings = ModelSettings(path=str(tmp_path / "model"))
    asked = LoRA(r=8, alpha=8, dropout=0.3, targets=["q_proj"])
    model = load_model(settings, asked)
    (note,) = model.notes
    assert "adapter.r=4 (not 8)" in note and "alpha" not in note and "adapter.targets=" in note
    dropouts = [m for n, m in model.network.named_modules() if n.endswith("lora_dropout.default")]
    assert len(dropouts) == 14 and {getattr(m, "p", 0) for m in dropouts} == {0.3}
    assert (
        float((model.train()(rows := model.lay_out(tiny.some_groups()))["logp_T"] - model(rows)["logp_T"]).abs().max())
        == 0
    )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.fill_(0.1)
    assert not torch.equal(model(rows)["logp_T"], model(rows)["logp_T"]), "different draws"
    off = load_model(settings, LORA)
    assert off.notes == [] and not any(isinstance(m, torch.nn.Dropout) and m.p for m in off.network.modules())
