"""Float32 weights, bfloat16 products: what runs on GPUs hold and compute in, seen on a CPU."""

from __future__ import annotations

import json
import logging
import shutil
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from alignlab.algorithms.sft import SFT
from alignlab.core import ConfigError
from alignlab.models import (
    LoRA,
    ModelSettings,
    PackedModel,
    QuantizationSettings,
    Reference,
    as_loaded,
    load,
    load_model,
    private_api,
)
from alignlab.models.quantization import loading_options
from alignlab.training import precision as module
from alignlab.training.optimizer import check_mode
from alignlab.training.precision import Precision, in_words, resolve, set_float32_products
from alignlab.training.settings import TrainingSettings
from alignlab.training.trainer import Trainer
from tests import components, tiny
from tests.training import precision, runs

pytestmark = pytest.mark.component

CUDA, CPU = torch.device("cuda"), torch.device("cpu")
BF16, FP16, FP32, FP64 = torch.bfloat16, torch.float16, torch.float32, torch.float64


RUNS = [
    (algorithm, kind)
    for i, algorithm in enumerate(runs.ALGORITHMS)
    for j, kind in enumerate(precision.KINDS)
    if algorithm in runs.ONE_OF_EACH or i % 3 == j
]
"""Algorithms whose heads, reference and source another one has take turns; experiments/precision has all."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("precision")
    runs.prepare(made, **tiny.QUANTIZABLE)
    return made


def policy(folder: Path, dtype: str = "bfloat16", **options: Any) -> PackedModel:
    return load_model(ModelSettings(path=str(folder / "base"), dtype=dtype), **options)  # type: ignore[arg-type]


# ---------------------------------------------------------------------- runs


@pytest.mark.parametrize(("algorithm", "kind"), RUNS)
def test_each_algorithm_trains_float32_weights_with_bfloat16_products(folder: Path, algorithm: str, kind: str) -> None:
    out = f"{algorithm}-{kind}"
    runs.train(folder, algorithm, out, *precision.KINDS[kind], *precision.WORDS)
    precision.check(folder, algorithm, kind, out)


def test_bfloat16_weights_would_be_noticed(folder: Path) -> None:
    """The guard of the test above: without masters most weights do not change at this learning rate."""
    found = runs.train(folder, "sft", "pure", "adapter=none", *precision.WORDS, "training.mixed_precision=pure")
    assert found["precision"]["weights"] == "bfloat16"
    assert precision.share_changed(folder, "pure") < 0.1
    with pytest.raises(AssertionError):
        precision.check(folder, "sft", "full", "pure")


@pytest.mark.parametrize("algorithm", ["sft", "dpo", "reward_model", "process_reward_model"])
def test_the_loss_falls(folder: Path, algorithm: str) -> None:
    words = ["model.dtype=bfloat16", "optimizer=adamw", "optimizer.lr=3e-3", "training.batch_size=12"]
    runs.train(folder, algorithm, f"{algorithm}-falls", "adapter=none", *words, "training.steps=6")
    losses = [m["loss"] for m in runs.metrics(folder, f"{algorithm}-falls")]
    assert losses[-1] < 0.8 * losses[0]


KAHAN = ["optimizer=adamw_kahan", "optimizer.lr=1e-4"]
RESUMED = {
    "adamw": ("sft", ["adapter=none", "optimizer=adamw", "optimizer.lr=1e-4"]),
    "kahan": ("sft", ["adapter=none", *KAHAN, "training.mixed_precision=pure"]),
    "kahan-and-a-float32-head": ("ppo", ["adapter=none", *KAHAN, "training.mixed_precision=pure"]),
    "kahan-of-float32": ("dpo", ["adapter=lora", *KAHAN]),
}
"""Kahan's optimiser counts steps for a group of weights rather than for each, and has no remainders of float32 ones."""


@pytest.mark.parametrize("name", RESUMED)
def test_resumed_is_bit_identical(folder: Path, name: str) -> None:
    """Checkpoints keep the masters; the saved model, in bfloat16, would not do."""
    algorithm, own = RESUMED[name]
    if "kahan" in name:
        components.need("optimi")
    words = [*own, "model.dtype=bfloat16", "training.checkpoint_every=2", "training.steps=4", "training.keep_last=9"]
    whole, half = f"whole-{name}", f"half-{name}"
    runs.train(folder, algorithm, whole, *words)
    (folder / half / "checkpoints").mkdir(parents=True)
    shutil.copy(folder / whole / "config.yaml", folder / half)
    shutil.copytree(folder / whole / "checkpoints/step-00000002", folder / half / "checkpoints/step-00000002")
    runs.train(folder, algorithm, half, *words)
    one, two = (precision.checkpoint(folder, out, 4) for out in (whole, half))
    assert all(torch.equal(one[n][k], two[n][k]) for n in one for k in one[n])


# ---------------------------------------------------------------------- what a run asserts of itself


def trainer(folder: Path, **settings: Any) -> Trainer:
    return Trainer(policy(folder), SFT(), lr=1e-3, settings=TrainingSettings(**settings))


def test_products_in_another_precision_are_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As where an engine switches autocast off."""
    monkeypatch.setattr(PackedModel, "precision", lambda _, cache=True: nullcontext())
    with pytest.raises(ConfigError, match="products were to be bfloat16, but are float32 with single"):
        trainer(folder)


def test_weights_in_another_precision_are_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "use_masters", lambda _: None)
    with pytest.raises(ConfigError, match="weights were to be float32, but are bfloat16 with single"):
        trainer(folder)


def test_states_in_another_precision_are_refused(folder: Path) -> None:
    made = trainer(folder)
    group = tiny.groups([(4, [3])])

    class Coarse(torch.optim.AdamW):
        def step(self, closure: Any = None) -> Any:
            found = super().step(closure)
            for state in self.state.values():
                state["exp_avg"] = state["exp_avg"].bfloat16()
            return found

    made.engine.optimizer.optimizer.__class__ = Coarse
    with pytest.raises(ConfigError, match="states were to be float32, but are bfloat16"):
        made.step(group)


def test_pure_bfloat16_is_warned_of(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        trainer(folder)
    assert not caplog.messages
    with caplog.at_level(logging.WARNING):
        made = trainer(folder, mixed_precision="pure")
    assert ["training.mixed_precision=auto" in m for m in caplog.messages] == [True]
    assert made.computes == {"weights": "bfloat16", "products": "bfloat16"}


def test_products_in_other_precisions_beside_the_wanted_one_are_refused(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where an engine switches autocast off in some layers."""
    made = trainer(folder)
    layer = made.model.decoder.layers[0].mlp
    inner = layer.forward

    def exact(x: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", enabled=False):
            return inner(x.float())

    monkeypatch.setattr(layer, "forward", exact)
    with pytest.raises(ConfigError, match="products were to be bfloat16, but are bfloat16 and float32 with single"):
        module.observe(made.engine, ("logp",))


def test_float16_products_need_a_scaler(folder: Path) -> None:
    """Float32 weights of a full model are multiplied in float32; a frozen base under an adapter is float16."""
    full = Trainer(policy(folder, "float16"), SFT(), lr=1e-3)
    assert full.computes["products"] == "float32"
    with pytest.raises(ConfigError, match=r"model\.dtype=float16: products would be float16, and losses are not"):
        Trainer(policy(folder, "float16", adapter=LoRA(r=2)), SFT(), lr=1e-3)


def test_auto_scales_losses_where_products_are_float16(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation)
    for there, expected in ((True, "fp16"), (False, "auto")):
        monkeypatch.setattr(torch.cuda, "is_available", lambda there=there: there)
        assert module.scaling("auto", FP16) == expected
    assert module.scaling("no", FP16) == "no"


@pytest.mark.parametrize("adapter", [None, LoRA(r=2)])
def test_frozen_weights_beside_exact_products(folder: Path, tmp_path: Path, adapter: LoRA | None) -> None:
    """Without autocast a frozen layer in bfloat16 would meet float32 activations."""
    settings = ModelSettings(path=str(folder / "base"), dtype="bfloat16", freeze_layers=0 if adapter else 1)
    made = Trainer(load_model(settings, adapter), SFT(), lr=1e-3, settings=TrainingSettings(mixed_precision="no"))
    frozen = made.model.decoder.layers[0].mlp.up_proj.weight if adapter is None else None
    assert made.step(tiny.groups([(4, [3, 2])]))["grad_norm"] > 0
    if frozen is not None:
        assert frozen.dtype == FP32 and made.computes["products"] == "float32"
        made.save(tmp_path / "model")
        assert {t.dtype for t in runs.weights_of(tmp_path / "model").values()} == {BF16}


@pytest.mark.parametrize("softly", [False, True])
def test_a_reference_beside_frozen_layers_is_the_policy(folder: Path, softly: bool) -> None:
    model = load_model(ModelSettings(path=str(folder / "base"), dtype="bfloat16", freeze_layers=1))
    reference = Reference(model, fresh_adapter=False, moves=True)
    Precision(BF16, True, True).apply(model, reference, moves_softly=softly)
    groups = tiny.some_groups()
    with reference.model() as frozen:
        theirs = frozen.outputs(groups)["logp"]
    assert all(torch.equal(a, b) for a, b in zip(model.outputs(groups)["logp"], theirs, strict=True))


def test_a_reference_in_half_precision_does_not_move_slowly(folder: Path) -> None:
    model = policy(folder)
    reference = Reference(model, fresh_adapter=False, moves=True)
    with pytest.raises(ConfigError, match=r"source\.ref_update_tau: a reference in half precision"):
        Precision(None, False, True).apply(model, reference, moves_softly=True)


def test_heads_are_multiplied_exactly(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not in TF32, whatever other float32 products are in."""
    model, levels = policy(folder, kind="score"), []
    model.head.register_forward_hook(lambda *_: levels.append(torch.get_float32_matmul_precision()))
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        model.outputs(tiny.some_groups(), ("score",))
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision(before)
    assert set(levels) == {"highest"}


# ---------------------------------------------------------------------- settings and devices


@pytest.mark.parametrize(
    ("setting", "device", "hardware", "weights", "expected"),
    [
        ("auto", CUDA, True, FP32, BF16),
        ("auto", CUDA, True, BF16, BF16),
        ("auto", CUDA, True, FP64, None),
        ("auto", CUDA, False, FP16, FP16),
        ("auto", CUDA, True, FP16, BF16),
        ("auto", CUDA, False, BF16, None),
        ("auto", CPU, True, FP16, None),
        ("auto", CPU, False, BF16, BF16),
        ("auto", CPU, True, FP32, None),
        ("no", CUDA, True, BF16, None),
        ("bf16", CPU, False, FP32, BF16),
        ("fp16", CUDA, False, FP32, FP16),
    ],
)
def test_auto_follows_the_device(
    monkeypatch: pytest.MonkeyPatch,
    setting: str,
    device: torch.device,
    hardware: bool,
    weights: torch.dtype,
    expected: torch.dtype | None,
) -> None:
    monkeypatch.setattr(
        torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation or hardware
    )
    assert resolve(setting, device, weights) == expected


def test_what_a_device_does_not_have_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation)
    with pytest.raises(ConfigError, match=r"training\.mixed_precision=bf16: this GPU does not have bfloat16"):
        resolve("bf16", CUDA, FP32)
    with pytest.raises(ConfigError, match=r"training\.mixed_precision=fp16: needs a GPU"):
        resolve("fp16", CPU, FP32)


@pytest.mark.parametrize("mode", ["zero2", "zero3_offload"])
def test_deepspeed_has_masters_of_its_own(mode: str) -> None:
    plain = torch.optim.AdamW([torch.zeros(1)])
    check_mode("ddp", "pure", plain)
    check_mode(mode, "auto", plain)
    with pytest.raises(ConfigError, match=r"training\.mixed_precision=pure: DeepSpeed keeps float32 weights"):
        check_mode(mode, "pure", plain)
    plain.defaults["kahan_sum"] = True
    with pytest.raises(ConfigError, match=r"optimizer\.kahan_sum: .* use optimizer=adamw"):
        check_mode(mode, "auto", plain)


@pytest.mark.parametrize("mode", ["fsdp", "zero1"])
def test_float16_is_for_whole_models(mode: str) -> None:
    plain = torch.optim.AdamW([torch.zeros(1)])
    check_mode("ddp", "fp16", plain)
    with pytest.raises(ConfigError, match=f"training.mixed_precision=fp16: not with distributed={mode}: use bf16"):
        check_mode(mode, "fp16", plain)


def test_float32_products_are_said_on_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    levels: list[str] = []
    monkeypatch.setattr(torch, "set_float32_matmul_precision", levels.append)
    set_float32_products(TrainingSettings(), CPU)
    set_float32_products(TrainingSettings(float32_matmul="highest"), CUDA)
    assert levels == ["highest"]
    monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: "high")
    found = {"weights": "float32", "products": "bfloat16", "heads": "float32", "reduced": "float32"}
    plain = "weights float32, products bfloat16, heads float32, gradients reduced in float32"
    assert in_words(found, CPU) == plain
    assert in_words(found, CUDA) == f"{plain}, float32 products in TF32 (training.float32_matmul=high)"
    assert in_words({"weights": "float32", "products": "bfloat16"}, CUDA) == "weights float32, products bfloat16"


# ---------------------------------------------------------------------- models


def test_what_was_loaded_in_bfloat16_is_saved_in_it(folder: Path, tmp_path: Path) -> None:
    """And training goes on with all bits of the weights."""
    made = trainer(folder)
    made.step(tiny.groups([(4, [3, 2])]))
    before = {n: p.detach().clone() for n, p in made.model.named_parameters()}
    assert any(not torch.equal(t, t.bfloat16().float()) for t in before.values())
    made.save(tmp_path / "model")
    saved = runs.weights_of(tmp_path / "model")
    assert {t.dtype for t in saved.values()} == {BF16}
    assert json.loads((tmp_path / "model/config.json").read_text())["dtype"] == "bfloat16"
    assert all(torch.equal(before[f"network.{n}"].bfloat16(), t) for n, t in saved.items())
    assert runs.identical(before, {n: p.detach() for n, p in made.model.named_parameters()})


def test_tied_weights_are_saved_once(tmp_path: Path) -> None:
    tiny.save(tmp_path / "base", tie_word_embeddings=True)
    made = trainer(tmp_path)
    made.save(tmp_path / "model")
    assert "lm_head.weight" not in runs.weights_of(tmp_path / "model")
    with as_loaded(made.model):
        assert made.model.head.weight is made.model.base.get_input_embeddings().weight


@pytest.mark.parametrize("tied", [False, True])
def test_a_reference_holds_matrices_in_what_they_are_multiplied_in(tmp_path: Path, tied: bool) -> None:
    """And says to the bit what the policy says. Embeddings and norms are as the policy's; so is a matrix that is an
    embedding too."""
    tiny.save(tmp_path / "base", tie_word_embeddings=tied)
    model = policy(tmp_path, "float32")
    reference = Reference(model, fresh_adapter=False)
    Precision(BF16, True, True).apply(model, reference, moves_softly=False)
    held = {n: p.dtype for n, p in reference.held_in.network.named_parameters()}
    matrices = {n for n in held if "proj" in n or (n.startswith("lm_head") and not tied)}
    assert {n for n, d in held.items() if d == BF16} == matrices
    groups = tiny.some_groups()
    with reference.model() as frozen:
        theirs = frozen.outputs(groups)["logp"]
    assert all(torch.equal(a, b) for a, b in zip(model.outputs(groups)["logp"], theirs, strict=True))


def test_a_reference_that_follows_slowly_keeps_all_bits(folder: Path) -> None:
    """A thousandth of a step would be lost in bfloat16."""
    model = policy(folder)
    reference = Reference(model, fresh_adapter=False, moves=True)
    Precision(BF16, True, True).apply(model, reference, moves_softly=True)
    before = model.head.weight.detach().clone()
    with torch.no_grad():
        model.head.weight.add_(0.001)
    reference.refresh(0.1)
    moved = reference.held_in.head.weight - before
    assert torch.allclose(moved, torch.full_like(moved, 1e-4), rtol=0.01)


def test_heads_are_not_rounded(folder: Path) -> None:
    """Under autocast a value would have 8 bits."""
    model = policy(folder, kind="score")
    Precision(BF16, True, True).apply(model, None, False)
    scores = torch.cat([s[None] for s in model.outputs(tiny.some_groups(), ("score",))["score"]])
    assert not torch.equal(scores, scores.bfloat16().float())


@torch.no_grad()
def test_small_adapters_are_not_rounded_away(folder: Path) -> None:
    """W + s·B·A in bfloat16 would be W, where W is 1 or -1 and the rest 1/1024."""
    from alignlab.models.lora import FusedLinear

    model = policy(folder, adapter=LoRA(r=1, alpha=1.0)).to(BF16)
    layer = next(m for m in model.modules() if isinstance(m, FusedLinear))
    layer.base_layer.weight.fill_(1.0)[:, ::2] = -1.0
    layer.lora_A["default"].weight.fill_(1.0)
    layer.lora_B["default"].weight.fill_(1 / 1024)
    found = layer(torch.ones(1, layer.in_features, dtype=BF16))
    assert torch.equal(found, torch.full_like(found, layer.in_features / 1024))


def test_quantised_bases_on_gpus(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All that is not quantised is in bfloat16, and so are products; nothing of ours stands in for bitsandbytes."""
    components.need("bitsandbytes")
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: True)
    monkeypatch.setattr(private_api, "same_in_training_and_evaluation", lambda _: pytest.fail("a CPU's remedy"))
    config, settings = policy(folder).config, ModelSettings(path=str(folder / "base"))
    nf4 = QuantizationSettings(kind="nf4")

    def found(device: str, dtype: str = "auto") -> tuple[Any, Any]:
        asked = settings.model_copy(update={"dtype": dtype})
        options = loading_options(asked, nf4, config, "policy", device)
        return options.get("dtype"), options["quantization_config"].bnb_4bit_compute_dtype

    assert found("cuda") == (BF16, BF16)
    assert found("cpu") == (FP32, FP32)
    assert found("cpu", "bfloat16")[1] == BF16  # as on a GPU
    quantised = SimpleNamespace(device=CUDA, config=SimpleNamespace(quantization_config={"load_in_8bit": True}))
    assert load._same_in_every_mode(quantised) == []
