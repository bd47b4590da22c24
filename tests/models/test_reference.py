"""The reference is the policy as it was when training started, whatever is trained, however long."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from alignlab.models import FullFineTuning, LoRA, ModelSettings, PackedModel, Reference, load_model, save_model
from tests import tiny

LORA = LoRA(r=4, alpha=8)


def logp(model: PackedModel) -> Tensor:
    return torch.cat(model.outputs(tiny.some_groups())["logp"])


def train(model: PackedModel, steps: int = 3) -> None:
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(trained, lr=0.02)
    for _ in range(steps):
        model(model.lay_out(tiny.some_groups()))["logp_T"].mean().backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.fixture
def base(saved: Callable[..., Path]) -> ModelSettings:
    return ModelSettings(path=str(saved()))


@pytest.fixture
def trained_adapter(base: ModelSettings, tmp_path: Path) -> ModelSettings:
    model = load_model(base, LORA)
    train(model)
    save_model(model, tmp_path / "sft")
    return ModelSettings(path=str(tmp_path / "sft"))


def test_with_a_new_adapter_it_is_the_base_at_no_cost(base: ModelSettings) -> None:
    model = load_model(base, LORA)
    reference = Reference(model, fresh_adapter=True)
    assert reference.shares_weights
    expected = logp(load_model(base, trainable=False))
    trained = {n: p.requires_grad for n, p in model.named_parameters()}
    for _ in range(2):
        train(model)
        policy = logp(model)
        with reference.model() as reference_model:
            assert reference_model is model
            assert torch.equal(logp(reference_model), expected)
        assert torch.equal(logp(model), policy), "the adapter is on again"
        assert not torch.allclose(policy, expected, atol=0.05)
        assert {n: p.requires_grad for n, p in model.named_parameters()} == trained


def test_the_adapter_is_on_again_after_an_error(base: ModelSettings) -> None:
    model = load_model(base, LORA)
    train(model)
    policy = logp(model)
    with pytest.raises(RuntimeError, match="out of memory"), Reference(model, True).model():
        raise RuntimeError("out of memory")
    assert torch.equal(logp(model), policy)


def test_of_trained_weights_it_is_a_frozen_copy(base: ModelSettings) -> None:
    model = load_model(base)
    reference = Reference(model, fresh_adapter=False)
    assert not reference.shares_weights
    expected = logp(model)
    train(model)
    with reference.model() as reference_model:
        assert reference_model is not model
        assert torch.equal(logp(reference_model), expected)
        assert not any(p.requires_grad for p in reference_model.parameters())
        assert not reference_model.training
    assert not torch.allclose(logp(model), expected, atol=0.05)
    assert all(p.requires_grad for p in model.parameters()), "the policy itself stays trainable"


def test_of_an_adapter_trained_further_it_is_the_adapter_as_it_was(trained_adapter: ModelSettings) -> None:
    """Switching the adapter off would give the base, which no one asked to stay near."""
    model = load_model(trained_adapter, LORA)
    expected = logp(model)
    size = sum(p.numel() for p in model.parameters())
    trained = {n: p.numel() for n, p in model.named_parameters() if p.requires_grad}
    reference = Reference(model, fresh_adapter=False)
    assert reference.shares_weights
    assert sum(p.numel() for p in model.parameters()) == size + sum(trained.values()), "one more adapter, no more base"
    assert {n for n, p in model.named_parameters() if p.requires_grad} == set(trained), "it is not trained"
    for _ in range(2):
        train(model)
        policy = logp(model)
        with reference.model() as reference_model:
            assert torch.equal(logp(reference_model), expected)
        assert torch.equal(logp(model), policy)
        assert not torch.allclose(policy, expected, atol=0.05)
        assert {n for n, p in model.named_parameters() if p.requires_grad} == set(trained)
    with model.network.disable_adapter():
        assert not torch.allclose(logp(model), expected, atol=0.05)


@pytest.mark.parametrize("merge", [False, True])
def test_it_is_not_saved_with_the_policy(trained_adapter: ModelSettings, tmp_path: Path, merge: bool) -> None:
    model = load_model(trained_adapter, LORA)
    Reference(model, fresh_adapter=False)
    train(model)
    save_model(model, tmp_path / "model", merge=merge)
    found = load_model(ModelSettings(path=str(tmp_path / "model")), trainable=False)
    torch.testing.assert_close(logp(found), logp(model), atol=1e-5, rtol=0)
    assert not any("reference" in str(p) for p in (tmp_path / "model").rglob("*"))


def test_the_adapter_trained_further_is_back_after_an_error(trained_adapter: ModelSettings) -> None:
    model = load_model(trained_adapter, LORA)
    reference = Reference(model, fresh_adapter=False)
    train(model)
    policy = logp(model)
    with pytest.raises(RuntimeError, match="out of memory"), reference.model():
        raise RuntimeError("out of memory")
    assert torch.equal(logp(model), policy)


def test_of_a_merged_adapter_it_is_the_merged_model(trained_adapter: ModelSettings) -> None:
    start = logp(load_model(trained_adapter, trainable=False))
    model = load_model(trained_adapter)
    reference = Reference(model, fresh_adapter=False)
    train(model)
    with reference.model() as reference_model:
        torch.testing.assert_close(logp(reference_model), start, atol=1e-5, rtol=0)


def test_an_adapter_on_top_of_a_real_model(stories: Path) -> None:
    settings = ModelSettings(path=str(stories))
    model = load_model(settings, LORA)
    expected = logp(load_model(settings, trainable=False))
    untrained = logp(model)
    reference = Reference(model, fresh_adapter=True)
    train(model, 1)
    with reference.model() as reference_model:
        assert torch.equal(logp(reference_model), untrained), "a policy that has learned nothing is at KL 0 exactly"
        torch.testing.assert_close(logp(reference_model), expected, atol=1e-5, rtol=0)


def of(reference: Reference) -> Tensor:
    with reference.model() as model:
        return logp(model)


@pytest.fixture(params=["new adapter", "trained adapter", "full"])
def kinds(request: pytest.FixtureRequest, base: ModelSettings) -> Callable[[], tuple[PackedModel, Reference]]:
    settings, adapter, fresh = base, LORA, request.param == "new adapter"
    if request.param == "trained adapter":
        settings = request.getfixturevalue("trained_adapter")
    if request.param == "full":
        adapter = FullFineTuning()

    def make() -> tuple[PackedModel, Reference]:
        model = load_model(settings, adapter)
        return model, Reference(model, fresh)

    return make


def test_refreshed_it_is_the_policy_of_that_moment(kinds: Callable[[], tuple[PackedModel, Reference]]) -> None:
    model, reference = kinds()
    first = of(reference)
    assert not reference.state()
    train(model)
    gradients = {n: p.requires_grad for n, p in model.named_parameters()}
    policy = logp(model)
    reference.refresh()
    assert torch.allclose(of(reference), policy, atol=1e-6)
    assert not torch.allclose(policy, first, atol=0.05)
    after = {n: p.requires_grad for n, p in model.named_parameters()}
    assert {n: after[n] for n in gradients} == gradients
    assert not any(wanted for n, wanted in after.items() if n not in gradients)
    train(model)
    assert torch.allclose(of(reference), policy, atol=1e-6), "it stays where it was put"
    assert not torch.allclose(logp(model), policy, atol=0.05)


def test_it_survives_a_resume(kinds: Callable[[], tuple[PackedModel, Reference]]) -> None:
    model, reference = kinds()
    train(model)
    reference.refresh()
    expected, state = of(reference), reference.state()
    _, again = kinds()
    again.load_state({})
    assert not torch.allclose(of(again), expected, atol=0.05)
    again.load_state(state)
    assert torch.equal(of(again), expected)


def test_part_of_the_way_is_a_mixture_of_weights(kinds: Callable[[], tuple[PackedModel, Reference]]) -> None:
    """Twice three quarters of the way: a sixteenth of the start is left."""
    model, reference = kinds()
    before = {n: p.clone() for n, p in reference._weights().items()}
    train(model)
    for _ in range(2):
        reference.refresh(0.75)
    policy = dict(model.network.named_parameters())
    assert reference._weights()
    for name, value in reference._weights().items():
        start = before.get(name)
        if start is None:  # the base as an adapter: the same first factor, a second one of zero
            start = torch.zeros_like(value) if ".lora_B." in name else None
        if start is not None:
            torch.testing.assert_close(value, start / 16 + policy[name] * 15 / 16, atol=1e-6, rtol=1e-5)
