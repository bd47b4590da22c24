"""Value heads and language heads: where they stand, what they are trained with, and that they come back."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from alignlab.core import AdapterKind, AlignlabError, ConfigError
from alignlab.models import FullFineTuning, LoRA, ModelSettings, PackedModel, add_value_head, load_model, save_model
from tests import tiny

LORA = LoRA(r=4, alpha=8)
NONE = FullFineTuning()
READS = ("logp", "value")


@pytest.fixture
def base(saved: Callable[..., Path]) -> ModelSettings:
    return ModelSettings(path=str(saved()))


def forward(model: PackedModel) -> dict[str, Tensor]:
    return model(model.lay_out(tiny.some_groups()), READS)


def plain_values(net: torch.nn.Module, head: torch.nn.Linear) -> Tensor:
    """The head on transformers' own hidden states, one response at a time, where each token is about to come."""
    found = []
    for group in tiny.some_groups():
        for response in group.responses:
            ids = torch.tensor([group.prompt_ids + response.token_ids])
            hidden = net.model(input_ids=ids, use_cache=False).last_hidden_state[0]  # type: ignore[operator]
            places = [len(group.prompt_ids) - 1 + i for i in response.predicted]
            found.append(head(hidden[places]).squeeze(-1))
    return torch.cat(found)


def test_weights_have_the_right_spread() -> None:
    """1/√(D+1), a sixteenth here; not 1/(D+1), a 257th."""
    model = tiny.model(hidden_size=256)
    add_value_head(model, seed=3)
    assert model.value_head is not None
    assert float(model.value_head.weight.std()) == pytest.approx(257**-0.5, rel=0.15)
    assert float(model.value_head.bias) == 0
    again = tiny.model(hidden_size=256)
    add_value_head(again, seed=3)
    assert torch.equal(model.value_head.weight, again.value_head.weight)  # type: ignore[union-attr]


@pytest.mark.parametrize("layout", ["packed", "plain"])
@pytest.mark.parametrize("critic", ["shared", "own"])
def test_values_are_those_of_the_state_that_predicts_the_token(layout: str, critic: str) -> None:
    model = tiny.model()
    add_value_head(model, critic)  # type: ignore[arg-type]
    model.layout = layout  # type: ignore[assignment]
    assert model.value_head is not None
    expected = plain_values(model.network, model.value_head)
    torch.testing.assert_close(forward(model)["value_T"], expected, atol=1e-5, rtol=1e-5)


def test_a_model_whose_own_forward_makes_the_logits_has_values_too() -> None:
    model = tiny.model()
    add_value_head(model)
    expected = forward(model)
    model.whole_logits = True
    for name, value in forward(model).items():
        torch.testing.assert_close(value, expected[name], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("adapter", [LORA, NONE], ids=["lora", "full"])
def test_a_critic_of_its_own_shares_no_weight_that_is_trained(base: ModelSettings, adapter: AdapterKind) -> None:
    model = load_model(base, adapter)
    add_value_head(model, "own")
    for parameter in model.parameters():  # LoRA's second factors are zero at first: no gradient would reach the first
        if parameter.requires_grad:
            parameter.data += 0.01 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
    before = {n: p.requires_grad for n, p in model.named_parameters()}
    out = forward(model)
    assert {n: p.requires_grad for n, p in model.named_parameters()} == before
    of_values = set(tiny.gradients(model, out["value_T"].sum()))
    of_policy = set(tiny.gradients(model, forward(model)["logp_T"].sum()))
    assert of_values and of_policy and not of_values & of_policy
    assert of_values | of_policy == {n for n, wanted in before.items() if wanted}


def test_a_shared_trunk_is_trained_by_both(base: ModelSettings) -> None:
    model = load_model(base, LORA)
    add_value_head(model, "shared")
    out = forward(model)
    both = set(tiny.gradients(model, out["value_T"].sum())) & set(tiny.gradients(model, forward(model)["logp_T"].sum()))
    assert any("lora_" in name for name in both)


@pytest.mark.parametrize("critic", ["shared", "own"])
@pytest.mark.parametrize("adapter", [LORA, NONE], ids=["lora", "full"])
def test_saved_and_found_again(base: ModelSettings, adapter: AdapterKind, critic: str, tmp_path: Path) -> None:
    model = load_model(base, adapter)
    add_value_head(model, critic)  # type: ignore[arg-type]
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(2))
    save_model(model, tmp_path / "model")
    again = load_model(ModelSettings(path=str(tmp_path / "model")), adapter)
    add_value_head(again, critic, seed=9)  # type: ignore[arg-type]
    expected = forward(model)
    for name, value in forward(again).items():
        torch.testing.assert_close(value, expected[name], atol=1e-5, rtol=1e-5)
    policy = load_model(ModelSettings(path=str(tmp_path / "model")), trainable=False)
    torch.testing.assert_close(
        policy(policy.lay_out(tiny.some_groups()))["logp_T"], expected["logp_T"], atol=1e-5, rtol=1e-5
    )


def test_what_cannot_be_is_said(base: ModelSettings) -> None:
    with pytest.raises(AlignlabError, match="no value head"):
        forward(tiny.model())
    with pytest.raises(ConfigError, match="stands on a language model"):
        add_value_head(tiny.model(kind="score"))
    with pytest.raises(ConfigError, match=r"algorithm\.critic=shared"):
        add_value_head(load_model(base.model_copy(update={"gradient_checkpointing": True}), LORA), "own")
    with pytest.raises(AlignlabError, match="language head"):
        tiny.model(kind="score")(tiny.model().lay_out(tiny.some_groups()), ("logp",))


@pytest.mark.parametrize("adapter", [LORA, NONE], ids=["lora", "full"])
def test_a_score_model_keeps_its_base_s_language_head(base: ModelSettings, adapter: AdapterKind) -> None:
    """Before training it says of tokens what the base says; its head is not trained, the trunk below it is."""
    policy = load_model(base, trainable=False)
    expected = policy(policy.lay_out(tiny.some_groups()))["logp_T"]
    model = load_model(base, adapter, "score", language_head=True)
    out = model(model.lay_out(tiny.some_groups()), ("logp", "score"))
    torch.testing.assert_close(out["logp_T"], expected, atol=1e-5, rtol=1e-5)
    assert len(out["score_N"]) == sum(len(g.responses) for g in tiny.some_groups())
    names = set(tiny.gradients(model, out["logp_T"].sum()))
    assert names and not any("language_head" in name or "score" in name for name in names)


def test_entropy_has_a_gradient_where_it_is_asked_for() -> None:
    """Against transformers' own logits, value and gradient."""
    model = tiny.model()
    rows = model.lay_out(tiny.some_groups())
    assert not model(rows, ("logp", "entropy"))["entropy_T"].requires_grad
    entropy = model(rows, ("logp", "entropy", "entropy_grad"))["entropy_T"]
    expected = []
    for group in tiny.some_groups():
        for response in group.responses:
            logits = tiny.plain_logits(model.network, group.prompt_ids + response.token_ids)
            places = [len(group.prompt_ids) - 1 + i for i in response.predicted]
            expected.append(torch.distributions.Categorical(logits=logits[places]).entropy())
    torch.testing.assert_close(entropy, torch.cat(expected), atol=1e-5, rtol=1e-5)
    mine, theirs = tiny.gradients(model, entropy.mean()), tiny.gradients(model, torch.cat(expected).mean())
    for name, gradient in theirs.items():
        torch.testing.assert_close(mine[name], gradient, atol=1e-5, rtol=1e-4)


def test_a_critic_of_another_make_is_refused(base: ModelSettings, tmp_path: Path) -> None:
    """One that was an adapter is not read as a decoder, nor the other way round."""
    for trained, other, said in ((LORA, NONE, "adapter=lora"), (NONE, LORA, "adapter=none")):
        model = load_model(base, trained)
        add_value_head(model, "own")
        save_model(model, tmp_path / said)
        again = load_model(ModelSettings(path=str(tmp_path / said)), other)
        with pytest.raises(ConfigError, match=f"train it further with {said}"):
            add_value_head(again, "own")
