"""A new kind of adapter is one file of the user's, anywhere on the path, and one config. No file of ours is touched."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from alignlab.cli import main
from alignlab.core import AdapterKind, ConfigError
from alignlab.models import LoRA, ModelSettings, PackedModel, Reference, load_model, save_model
from tests import tiny
from tests.training import runs

ADAPTER = '''
"""BitFit: the biases alone are trained (Ben Zaken et al. 2022, arXiv:2106.10199)."""


class BitFit:
    trains_base = True  # the model's own weights: it is saved whole, and the reference is a copy of it

    def __init__(self, norms: bool = False):
        self.endings = ("bias", "norm.weight") if norms else ("bias",)

    def apply(self, network, kind):
        for name, parameter in network.named_parameters():
            is_head = kind != "policy" and name.startswith(("score.", "classifier."))
            parameter.requires_grad_(is_head or name.endswith(self.endings))
        return network
'''

CONFIG = """
_target_: biases_alone.BitFit
norms: false                   # train the weights of norms too
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The user's folder: a model with biases, records, a module beside them, and a folder of configs."""
    made = tmp_path_factory.mktemp("user")
    runs.prepare(made, attention_bias=True, mlp_bias=True)
    for name, text in {"modules/biases_alone.py": ADAPTER, "configs/adapter/bitfit.yaml": CONFIG}.items():
        (made / name).parent.mkdir(parents=True, exist_ok=True)
        (made / name).write_text(text)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(made / "modules")
        yield made


def train(folder: Path, algorithm: str, out: str, *more: str) -> dict[str, torch.Tensor]:
    options = ["--config-dir", str(folder / "configs"), "adapter=bitfit", "training.progress=off"]
    assert main(["train", *options, *runs.words_for(folder, algorithm, out, *more)]) == 0
    return runs.weights(folder, out)


def moved(before: dict[str, torch.Tensor], after: dict[str, torch.Tensor]) -> set[str]:
    return {n for n in before if not torch.equal(before[n], after[n])}


@pytest.fixture(scope="module")
def sft(folder: Path) -> dict[str, torch.Tensor]:
    return train(folder, "sft", "sft", "training.batch_size=12")


def test_sft_moves_what_the_kind_trains_and_nothing_else(folder: Path, sft: dict[str, torch.Tensor]) -> None:
    before = runs.weights_of(folder / "base")
    biases = {n for n in before if n.endswith("bias")}
    assert len(biases) == 2 * 7, "of seven linear maps in each of two layers"
    # A key's bias adds the same to all scores of a query, so that softmax takes it out: no gradient beyond rounding.
    assert biases - {f"model.layers.{i}.self_attn.k_proj.bias" for i in range(2)} <= moved(before, sft) <= biases
    losses = [line["loss"] for line in runs.metrics(folder, "sft")]
    assert losses[-1] < losses[0]


def test_its_settings_are_settings(folder: Path) -> None:
    after = train(folder, "sft", "norms", "adapter.norms=true", "training.steps=1")
    assert "model.norm.weight" in moved(runs.weights_of(folder / "base"), after)


def test_dpo_starts_at_its_reference(folder: Path, sft: dict[str, torch.Tensor]) -> None:
    """From a model that the kind has trained. The loss is −log σ(0), with smoothed labels as without."""
    after = train(folder, "dpo", "dpo", f"model={folder}/sft/model")
    first = runs.metrics(folder, "dpo")[0]
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-7)
    assert moved(sft, after) and moved(sft, after) <= {n for n in sft if n.endswith("bias")}


def test_plain_transformers_loads_what_was_saved(folder: Path, sft: dict[str, torch.Tensor]) -> None:
    from transformers import AutoModelForCausalLM

    path = folder / "sft/model"
    ours = load_model(ModelSettings(path=str(path)), trainable=False).outputs(tiny.some_groups())["logp"]
    with torch.no_grad():
        theirs = tiny.plain_log_probs(AutoModelForCausalLM.from_pretrained(path), tiny.some_groups())
    torch.testing.assert_close(torch.cat(ours), theirs, atol=1e-5, rtol=0)


def test_a_name_that_is_not_there_and_a_key_that_has_another_name(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for word, said in {
        "adapter._target_=biases_alone.Bitfit": "biases_alone has no 'Bitfit'; did you mean 'BitFit'?",
        "adapter._target_=builtins.dict": "not a AdapterKind: it has no apply, trains_base",
        "adapter.norms=perhaps": "adapter.norms=",
    }.items():
        options = ["--config-dir", str(folder / "configs"), "adapter=bitfit"]
        assert main(["train", *options, *runs.words_for(folder, "sft", "wrong", word)]) == 2
        assert said in capsys.readouterr().err


def test_the_base_under_it_cannot_be_quantised(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--config-dir", str(folder / "configs"), "adapter=bitfit", "quantization=nf4"]
    assert main(["train", *options, *runs.words_for(folder, "sft", "quantised")]) == 2
    assert "weights in so few bits cannot be trained" in capsys.readouterr().err


# A method of PEFT's


class Scaled:
    """IA³ (Liu et al. 2022, arXiv:2205.05638) by PEFT's own class."""

    trains_base = False

    def apply(self, network: Any, kind: str) -> Any:
        from peft import IA3Config, get_peft_model

        return get_peft_model(network, IA3Config(task_type="CAUSAL_LM"))


class Random(LoRA):
    """LoRA whose update is not zero at first."""

    def apply(self, network: Any, kind: str) -> Any:
        network = super().apply(network, kind)  # type: ignore[arg-type]
        with torch.no_grad():
            for name, parameter in network.named_parameters():
                if "lora_B" in name:
                    parameter.normal_(0.0, 0.3, generator=torch.Generator().manual_seed(len(name)))
        return network


def logp(model: PackedModel) -> torch.Tensor:
    return torch.cat(model.outputs(tiny.some_groups())["logp"])


@pytest.mark.parametrize(
    ("kind", "fresh"),
    [(Scaled(), True), (LoRA(r=4), True), (Random(r=4), False)],
    ids=["IA3", "LoRA", "not zero at first"],
)
@pytest.mark.parametrize("moves", [False, True])
def test_the_reference_of_a_peft_method_is_the_policy_at_the_start(
    folder: Path, kind: AdapterKind, fresh: bool, moves: bool
) -> None:
    """Whether it changes something from the start on is tried, not believed."""
    model = load_model(ModelSettings(path=str(folder / "base")), kind)
    assert model.fresh_adapter == fresh
    start = logp(model)
    reference = Reference(model, model.fresh_adapter, moves)
    assert reference.shares_weights
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.2
    with reference.model() as frozen:
        torch.testing.assert_close(logp(frozen), start, atol=1e-5, rtol=0)
    trained = logp(model)
    assert not torch.allclose(trained, start, atol=0.05)
    if moves:
        reference.refresh()
        with reference.model() as frozen:
            torch.testing.assert_close(logp(frozen), trained, atol=1e-5, rtol=0)


def test_a_peft_method_is_saved_as_its_adapter_and_goes_on(folder: Path, tmp_path: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = load_model(ModelSettings(path=str(folder / "base")), Scaled())
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.2
    save_model(model, tmp_path / "model")
    assert not (tmp_path / "model/model.safetensors").exists()
    plain = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder / "base"), tmp_path / "model")
    with torch.no_grad():
        theirs = tiny.plain_log_probs(plain, tiny.some_groups())
    torch.testing.assert_close(logp(model), theirs, atol=1e-5, rtol=0)
    again = load_model(ModelSettings(path=str(tmp_path / "model")), Scaled())
    torch.testing.assert_close(logp(again), logp(model), atol=1e-6, rtol=0)
    assert not again.fresh_adapter
    assert any("goes on as it was saved: the settings of `adapter` are not applied" in note for note in again.notes)


# What could not be trained, saved or loaded again is refused


class Broken:
    """Does what it is told."""

    def __init__(self, how: str, trains_base: bool = True) -> None:
        self.how, self.trains_base = how, trains_base

    def apply(self, network: Any, kind: str) -> Any:
        if self.how == "nothing":
            return network.requires_grad_(False)
        if self.how == "new weights":
            network.extra = torch.nn.Linear(2, 2)
        if self.how == "prompts":
            from peft import PromptTuningConfig, get_peft_model

            return get_peft_model(network, PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4))
        if self.how == "biases too":
            from peft import LoraConfig, get_peft_model

            return get_peft_model(network, LoraConfig(task_type="CAUSAL_LM", r=2, bias="all"))
        return None if self.how == "nothing returned" else network


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        (Broken("nothing"), "leaves nothing to train"),
        (Broken("new weights"), r"adds extra\.bias, extra\.weight to the model"),
        (Broken("prompts", trains_base=False), "puts tokens before the prompt"),
        (Broken("fine", trains_base=False), "returns no PEFT model"),
        (Broken("nothing returned"), "apply must return the network, not NoneType"),
    ],
    ids=lambda value: getattr(value, "how", ""),
)
def test_a_kind_that_cannot_work_is_refused(folder: Path, kind: AdapterKind, said: str) -> None:
    with pytest.raises(ConfigError, match=rf"^adapter: Broken.*{said}"):
        load_model(ModelSettings(path=str(folder / "base")), kind)


def test_there_is_no_reference_where_the_base_is_trained_beside_an_adapter(folder: Path) -> None:
    model = load_model(ModelSettings(path=str(folder / "base")), Broken("biases too", trains_base=False))
    with pytest.raises(ConfigError, match=r"^adapter: .*bias is trained beside the adapter"):
        Reference(model, model.fresh_adapter)
