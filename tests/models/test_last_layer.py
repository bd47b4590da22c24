"""The last layer's MLP where it is read: nothing comes out differently, and less is computed."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from alignlab.models import LoRA, ModelSettings, PackedModel, add_value_head, load_model, packed_model
from alignlab.models.attention import use_plans
from alignlab.models.last_layer import NarrowLayer, narrow_last_layer
from alignlab.models.probe import probe
from tests import tiny

TAKES = ["llama", "qwen2", "qwen3", "mistral", "gemma", "granite"]
WINDOWS: dict[str, dict[str, Any]] = {"mistral": {"sliding_window": 4096}}


@pytest.fixture(autouse=True)
def varlen_always(monkeypatch: pytest.MonkeyPatch) -> None:
    """Groups as small as these go through a mask otherwise, which is faster for them."""
    monkeypatch.setattr(packed_model, "worthwhile", lambda groups, device: True)


def made(name: str = "llama", kind: str = "policy", **changes: Any) -> PackedModel:
    model = tiny.model(name, kind, **WINDOWS.get(name, {}), **changes)
    model.layout = "varlen"
    assert use_plans(model.base)
    assert narrow_last_layer(model.decoder)
    model.features = replace(model.features, narrow_last=True)
    return model


def last(model: PackedModel) -> Any:
    return model.decoder.layers[-1]


def rows_of_the_mlp(model: PackedModel) -> list[int]:
    """Will hold how many positions the last layer's MLP gets, pass by pass."""
    found: list[int] = []
    last(model).mlp.register_forward_pre_hook(lambda _, given: found.append(given[0].shape[1]))
    return found


def check(model: PackedModel, reads: tuple[str, ...]) -> None:
    """Values and gradients as from the same pass over all positions."""
    groups = tiny.some_groups()
    seen = rows_of_the_mlp(model)
    rows = model.lay_out(groups)
    found: list[tuple[dict[str, Tensor], dict[str, Tensor]]] = []
    for on in (True, False):
        model.features = replace(model.features, narrow_last=on)
        out = model(rows, reads)
        total = sum((v * torch.linspace(0.5, 1.5, v.numel()).view_as(v)).sum() for v in out.values())
        assert isinstance(total, Tensor)
        found.append((out, tiny.gradients(model, total)))
    (narrow, narrow_gradients), (whole, gradients) = found
    assert narrow.keys() == whole.keys() != set()
    for key, value in whole.items():
        torch.testing.assert_close(narrow[key], value, atol=1e-5, rtol=0)
    assert narrow_gradients.keys() == gradients.keys() != set()
    largest = max(float(g.norm()) for g in gradients.values())
    for key, gradient in gradients.items():
        assert float((narrow_gradients[key] - gradient).norm()) <= 1e-5 * max(float(gradient.norm()), largest), key
    assert seen[0] < seen[-1] == rows.tokens


@pytest.mark.parametrize("name", TAKES)
def test_log_probs_are_the_network_s_own(name: str) -> None:
    model, groups = made(name), tiny.some_groups()
    seen = rows_of_the_mlp(model)
    found_T = model(model.lay_out(groups))["logp_T"]
    # Each prompt's last token and all response tokens that precede one that bears loss: by hand from SHAPES.
    # (1 + 3 + 4 + 0) + (1 + 4) + (1 + 1 + 11 + 5) + (1 + 0 + 2)
    assert seen == [34]
    expected_T = tiny.plain_log_probs(model.network, groups)
    torch.testing.assert_close(found_T, expected_T, atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", TAKES)
def test_gradients(name: str) -> None:
    check(made(name), ("logp", "entropy_grad", "entropy"))


@pytest.mark.parametrize(("kind", "reads"), [("score", "score"), ("step", "step")])
def test_heads(kind: str, reads: str) -> None:
    check(made("llama", kind), (reads,))


@pytest.mark.parametrize("reads", [("value",), ("logp", "value")])
def test_a_critic_on_the_same_trunk(reads: tuple[str, ...]) -> None:
    model = made()
    add_value_head(model, "shared")
    check(model, reads)


def test_a_critic_of_its_own() -> None:
    model = made()
    add_value_head(model, "own")
    assert isinstance(model.critic_decoder.layers[-1], NarrowLayer)
    assert model.critic_decoder.layers[-1] is not last(model)
    check(model, ("logp", "value"))


def test_where_most_positions_are_read_all_are_computed() -> None:
    model = made()
    seen = rows_of_the_mlp(model)
    rows = model.lay_out(tiny.groups([(1, [30, 30])]))
    model(rows)
    assert seen == [rows.tokens]


def test_a_layer_that_takes_no_such_plan_is_found_out() -> None:
    """Positions would be mixed up silently otherwise."""
    model = tiny.model("llama")
    model.layout = "varlen"
    assert use_plans(model.base)
    model.features = replace(model.features, narrow_last=True)
    with pytest.raises(RuntimeError, match=r"narrow_last: the last layer of LlamaModel computes all positions"):
        model(model.lay_out(tiny.some_groups()))


def test_no_loss_bearing_tokens() -> None:
    model, groups = made(), tiny.groups([(4, [2])])
    groups[0].responses[0].loss_mask = [False, False]
    found = model(model.lay_out(groups))["logp_T"]
    assert found.shape == (0,)
    assert found.requires_grad


def test_with_recomputed_activations() -> None:
    model = made().train()
    model.base.gradient_checkpointing_enable({"use_reentrant": False})
    model.base.enable_input_require_grads()
    check(model, ("logp",))


def test_with_an_adapter(tmp_path: Any) -> None:
    path = tiny.save(tmp_path / "model")
    model = load_model(ModelSettings(path=str(path)), LoRA(r=4), device="cpu")
    assert model.layout == "varlen"
    assert model.features.narrow_last
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.normal_(0.0, 0.1)
    check(model, ("logp",))


def test_nothing_stays_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not in the layer, whether its attention went well or not; and without a plan it is transformers' own."""
    model, groups = made(), tiny.some_groups()
    hooks = last(model).self_attn.o_proj._forward_pre_hooks
    model(model.lay_out(groups))
    assert not hooks

    def fails(*arguments: Any, **options: Any) -> None:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(last(model).self_attn, "forward", fails)
    with pytest.raises(RuntimeError, match="out of memory"):
        model(model.lay_out(groups))
    monkeypatch.undo()
    assert not hooks
    plain = tiny.network()
    ids = torch.tensor([[5, 6, 7]])
    torch.testing.assert_close(model.network(input_ids=ids).logits, plain(input_ids=ids).logits, atol=1e-5, rtol=0)


def test_it_stays_what_it_was() -> None:
    from transformers.models.llama.modeling_llama import LlamaDecoderLayer

    model = made()
    layer = last(model)
    assert isinstance(layer, LlamaDecoderLayer)
    assert type(layer).__name__ == "LlamaDecoderLayer"
    assert not isinstance(model.decoder.layers[0], NarrowLayer)
    assert narrow_last_layer(model.decoder), "asked again"
    assert type(last(model)) is type(layer)
    assert isinstance(copy.deepcopy(layer), NarrowLayer)
    assert model.network.state_dict().keys() == tiny.network().state_dict().keys()


@pytest.mark.parametrize("name", ["gpt2", "gpt_neox", "phi", "opt", "cohere", "gemma2"])
def test_layers_of_another_make_are_left_alone(name: str) -> None:
    model = tiny.model(name)
    assert not narrow_last_layer(model.decoder)
    probe(model)
    assert not model.features.narrow_last


@pytest.mark.parametrize(("multiplier", "exact"), [(1.0, True), (0.5, False)])
@pytest.mark.parametrize("std", [0.3, 0.02])
def test_the_probe_tells_layers_apart_that_look_alike(multiplier: float, std: float, exact: bool) -> None:
    """Granite's parts have the same names; it multiplies what it adds to the residual stream."""
    model = tiny.model("granite", residual_multiplier=multiplier, std=std)
    probe(model)
    assert model.layout == "varlen"
    assert model.features.narrow_last == exact


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_in_other_precisions(dtype: torch.dtype) -> None:
    for multiplier, exact in ((1.0, True), (0.5, False)):
        model = tiny.model("granite", residual_multiplier=multiplier).to(dtype)
        probe(model)
        assert model.features.narrow_last == exact
