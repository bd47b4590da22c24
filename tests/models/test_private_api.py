"""What reaches into libraries: it works with those installed, is looked up late, is told where it fails, and is nowhere
else."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from alignlab.core import ConfigError
from alignlab.models import LoRA, ModelSettings, PackedModel, load_model, private_api, save_model
from alignlab.models.private_api import REACHES
from tests import tiny
from tests.models.quantized import load as load_quantized

FOLDER = Path(private_api.__file__).parent
LORA = LoRA(r=4, alpha=8)


@pytest.mark.parametrize("name", REACHES)
def test_a_reach_works_with_the_libraries_installed(name: str) -> None:
    """After an upgrade: look at what the library changed, run the tests, add the version."""
    assert private_api.problem(name) is None
    assert REACHES[name].is_known, REACHES[name].version


def test_versions_are_compared_part_by_part() -> None:
    reach = replace(REACHES["LoRA layers"], known=("0.2",))
    assert not reach.is_known, "0.21 is no 0.2"
    assert replace(reach, library="no-such-library").version is None


def test_importing_the_models_looks_nothing_up() -> None:
    """No operator that only some builds of torch have, and no library that takes a second."""
    at_import = [
        node
        for statement in ast.parse((FOLDER / "private_api.py").read_text()).body
        if not isinstance(statement, ast.FunctionDef | ast.ClassDef)
        for node in ast.walk(statement)
    ]
    assert not [node for node in at_import if isinstance(node, ast.Attribute) and node.attr == "ops"]
    script = "import sys, alignlab.models; assert not {'peft', 'bitsandbytes', 'transformers'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", script], check=True)


def test_trying_them_moves_no_random_number() -> None:
    state = torch.get_rng_state()
    private_api.problem.cache_clear()
    assert [private_api.problem(name) for name in REACHES] == [None] * len(REACHES)
    assert torch.equal(torch.get_rng_state(), state)


def reaches_of(path: Path) -> list[str]:
    """Private names of others that a file uses, and classes that it swaps."""
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Attribute):
            swaps = node.attr == "__class__" and isinstance(node.ctx, ast.Store)
            owner = node.value
            mine = isinstance(owner, ast.Name) and owner.id in ("self", "model", "cls")
            private = node.attr.startswith("_") and not node.attr.startswith("__") and not mine
            operators = node.attr == "ops" and isinstance(owner, ast.Name) and owner.id == "torch"
            if swaps or private or operators:
                found.append(f"{path.name}:{node.lineno}: {node.attr}")
        elif isinstance(node, ast.ImportFrom):
            found += [f"{path.name}:{node.lineno}: {a.name}" for a in node.names if a.name.startswith("_")]
    return found


def test_nothing_else_in_the_models_reaches_into_libraries() -> None:
    others = [p for p in sorted(FOLDER.glob("*.py")) if p.name != "private_api.py"]
    assert [line for path in others for line in reaches_of(path)] == []
    assert reaches_of(FOLDER / "private_api.py"), "the test would see them"


# Without one


@pytest.fixture
def broken(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A reach whose library is of a version that lacks what is used."""

    def fails() -> None:
        raise AttributeError("no such thing\nin this version")

    monkeypatch.setitem(REACHES, request.param, replace(REACHES[request.param], probe=fails))
    private_api.problem.cache_clear()
    yield request.param
    private_api.problem.cache_clear()


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
