"""What shapes alone tell: parameters, what a pass keeps, what sampling holds; by hand, as published, and for real."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from alignlab.algorithms.dpo import DPO
from alignlab.algorithms.ppo import PPO
from alignlab.algorithms.reward_model import RewardModel
from alignlab.algorithms.sft import SFT
from alignlab.core import Algorithm
from alignlab.models import FullFineTuning, LoRA, ModelSettings, QuantizationSettings
from alignlab.models.attention import use_plans
from alignlab.planning.shapes import BUILT_IN, Shapes, read_config
from alignlab.planning.trace import Needs, Sampling, Workload, extrapolate, trace
from alignlab.rollout import RolloutSettings
from tests import tiny

WIDTH, INNER, VOCABULARY, RANK = 32, 48, tiny.SIZE, 4
LAYER = WIDTH * (WIDTH + WIDTH // 2 + WIDTH // 2 + WIDTH) + 3 * WIDTH * INNER + 2 * WIDTH
"""q, k and v for two of four heads, o; gate, up and down; two norms."""


def shapes(
    algorithm: Algorithm | None = None, kind: str = "none", few_bits: str = "none", name: str = "llama", **changes: Any
) -> Shapes:
    config = tiny.network(name).config
    model = ModelSettings(path=".", **{k: v for k, v in changes.items() if k in ModelSettings.model_fields})
    rest = {k: v for k, v in changes.items() if k not in ModelSettings.model_fields}
    adapter = LoRA(r=RANK) if kind == "lora" else FullFineTuning()
    quantization = QuantizationSettings(kind=few_bits)  # type: ignore[arg-type]
    return Shapes(config, model, adapter, quantization, algorithm or SFT(), torch.float32, **rest)


WORK = Workload(2, 9, 5, 1)


def needs(*arguments: Any, **changes: Any) -> Needs:
    return trace(shapes(*arguments, **changes), WORK)


@pytest.mark.parametrize(("name", "billions"), [("7b", 6.7), ("13b", 13.0), ("33b", 32.5), ("65b", 65.2)])
def test_llama_s_parameters(name: str, billions: float) -> None:
    """Touvron et al. 2023 (arXiv:2302.13971), table 2: the sizes follow from dimensions, heads and layers."""
    settings = ModelSettings(path=f"llama-{name}")
    config, _ = read_config(settings)
    plain = (settings, FullFineTuning(), QuantizationSettings(), SFT(), torch.bfloat16)
    few = [trace(Shapes(config, *plain, layers=n), WORK) for n in (2, 4)]
    found = extrapolate(*few, (2, 4), config.num_hidden_layers)
    assert found.parameters / 1e9 == pytest.approx(billions, abs=0.1)
    assert found.weights == 2 * found.parameters + found.frozen_weights
    assert f"llama-{name}" in BUILT_IN


def test_parameters_by_hand() -> None:
    found = needs(layers=3)
    assert found.parameters == found.trained == 3 * LAYER + 2 * VOCABULARY * WIDTH + WIDTH
    assert found.layer == 4 * LAYER
    assert found.outside == 4 * (2 * VOCABULARY * WIDTH + WIDTH)
    assert found.trained_weights == 4 * found.trained
    assert found.head_gradients == found.table_gradient == 4 * VOCABULARY * WIDTH


def test_an_adapter_by_hand() -> None:
    """r·(inputs + outputs) for each of the seven matrices of a layer."""
    sides = [WIDTH * 2, WIDTH + WIDTH // 2, WIDTH + WIDTH // 2, WIDTH * 2, WIDTH + INNER, WIDTH + INNER, INNER + WIDTH]
    found = needs(kind="lora", layers=2)
    assert found.trained == 2 * RANK * sum(sides)
    assert found.parameters == 2 * LAYER + 2 * VOCABULARY * WIDTH + WIDTH


@pytest.mark.parametrize(("kind", "each"), [("nf4", 0.5 + (1 + 4 / 256) / 64), ("int8", None)])
def test_a_quantised_base_by_hand(kind: str, each: float | None) -> None:
    """The layers' matrices alone are in few bits; embeddings, norms and the head stay as they are."""
    found = needs(kind="lora", few_bits=kind, layers=2)
    matrices = 2 * (LAYER - 2 * WIDTH)
    outputs = 2 * (WIDTH + WIDTH // 2 + WIDTH // 2 + WIDTH + 2 * INNER + WIDTH)
    assert found.quantised == pytest.approx(matrices * each if each else matrices + 4 * outputs)
    kept = 4 * (2 * 2 * WIDTH + WIDTH + 2 * VOCABULARY * WIDTH)
    assert found.frozen_weights - sum(b.nbytes for b in shapes().model.buffers()) == kept


def test_reference_and_critic() -> None:
    """Full fine-tuning keeps a copy; a new adapter needs none; a critic of its own is a decoder, or an adapter."""
    assert needs(DPO(), reference=True).reference == 4 * needs().parameters
    assert needs(DPO(), "lora", reference=True).reference == 0
    alone, head = needs(kind="lora").trained, WIDTH + 1
    assert needs(PPO(), "lora").trained == alone + head
    assert needs(PPO(critic="own"), "lora").trained == 2 * alone + head
    decoder = needs().parameters - VOCABULARY * WIDTH
    assert needs(PPO(critic="own")).trained == needs().trained + decoder + head


def test_checkpointing_keeps_a_layer_s_input_alone() -> None:
    """tokens × width × 4 bytes for each layer, nothing else that grows with the layers."""
    saved = [needs(layers=n, gradient_checkpointing=True).saved for n in (2, 4)]
    assert (saved[1] - saved[0]) / 2 == WORK.rows * WORK.length * WIDTH * 4
    free = [needs(layers=n).saved for n in (2, 4)]
    assert free[1] - free[0] > 5 * (saved[1] - saved[0])


@pytest.mark.parametrize(
    "build",
    [
        lambda **k: shapes(**k),
        lambda **k: shapes(kind="lora", **k),
        lambda **k: shapes(kind="lora", few_bits="nf4", **k),
        lambda **k: shapes(RewardModel(lm_weight=0.1), **k),
        lambda **k: shapes(PPO(critic="own"), "lora", **k),
        lambda **k: shapes(gradient_checkpointing=True, **k),
    ],
    ids=["full", "lora", "qlora", "reward_model", "ppo", "checkpointing"],
)
def test_all_is_linear_in_the_layers(build: Any) -> None:
    """So a model of 80 layers needs no more time than one of 4."""
    work, sampling = Workload(2, 9, 5, 2), Sampling(2, 2, RolloutSettings(max_new_tokens=5))

    def measured(layers: int) -> Needs:
        made = build(layers=layers)
        return trace(made, work, sampling if made.model.kind == "policy" else None)

    found = vars(extrapolate(measured(2), measured(4), (2, 4), 9))
    for name, value in vars(measured(9)).items():
        assert found[name] == pytest.approx(value, rel=0.05), name


def test_a_forward_pass_keeps_what_autograd_says() -> None:
    """Against the tensors that a real pass hands to autograd, each storage once, weights left out."""
    work = Workload(3, 9, 5, 2)
    model = tiny.model("llama").train()
    assert use_plans(model.base)
    model.layout = "varlen"
    held: dict[int, int] = {}
    kept: list[torch.Tensor] = []
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            held[storage.data_ptr()] = storage.nbytes()
            kept.append(tensor)
        return tensor

    rows = model.lay_out(work.groups())
    with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
        model(rows, ("logp",))
    found = trace(shapes(), work)
    assert found.saved == pytest.approx(sum(held.values()), rel=0.02)
    assert found.activations > found.saved


def test_the_cache_by_hand() -> None:
    """Keys and values of two heads of 8 numbers in two layers, for each token of each row."""
    found = trace(shapes(), Workload(1, 9, 5, 1), Sampling(3, 2, RolloutSettings(max_new_tokens=6)))
    tokens = 3 * 2 * (9 + 6 - 1)
    assert found.cache == pytest.approx(2 * 2 * 2 * 8 * 4 * tokens, rel=0.1)
    assert found.step > found.cache


@pytest.mark.parametrize("name", sorted(tiny.ARCHITECTURES))
def test_any_architecture(name: str) -> None:
    found = trace(shapes(name=name), Workload(2, 9, 5, 2))
    assert 0 < found.saved <= found.activations


def test_longer_rows_and_more_of_them_need_more() -> None:
    for other in (Workload(3, 9, 5, 1), Workload(2, 12, 5, 1), Workload(2, 9, 8, 1), Workload(2, 9, 5, 2)):
        assert trace(shapes(), other).activations > needs().activations
