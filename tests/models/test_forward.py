"""The one forward pass equals transformers' own, one sequence at a time, for many architectures."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from alignlab.core import Group, Response
from alignlab.models import PackedModel, log_probs, packed_model
from alignlab.models.attention import use_plans
from tests import tiny

PLAIN = [n for n in tiny.ARCHITECTURES if n not in tiny.PACKABLE]
SCORES = ["llama", "qwen2", "qwen3", "mistral", "gemma", "gemma2", "gemma3", "gpt2", "gpt_neox", "phi", "opt"]
STEPS = ["llama", "qwen2", "qwen3", "mistral", "gemma", "gemma2", "gpt2", "gpt_neox", "phi"]


VARLEN = [n for n in tiny.PACKABLE if n not in ("gemma2", "mistral", "gemma3")]
"""Those whose attention needs no mask: no soft caps, no windows shorter than the sequences here."""


@pytest.fixture
def varlen_always(monkeypatch: pytest.MonkeyPatch) -> None:
    """Groups as small as these go through a mask otherwise, which is faster for them."""
    monkeypatch.setattr(packed_model, "worthwhile", lambda groups, device: True)


def lay_out_as(model: PackedModel, layout: str) -> None:
    model.layout = layout  # type: ignore[assignment]
    if layout == "varlen":
        assert use_plans(model.base)
    assert model.lay_out(tiny.some_groups()).layout == layout


def weights(count: int) -> Tensor:
    """Some weight for each token, so that no gradient cancels."""
    return torch.linspace(0.5, 1.5, count)


def check_gradients(found: dict[str, Tensor], expected: dict[str, Tensor], relative: float = 1e-5) -> None:
    """Equal to `relative` of each parameter's norm; of a hundredth of the largest norm where the true gradient is zero
    (a bias of keys shifts all scores alike)."""
    assert found.keys() == expected.keys()
    largest = max(float(g.norm()) for g in expected.values())
    assert largest > 0.1, "there must be something to compare"
    for name, gradient in expected.items():
        allowed = relative * max(float(gradient.norm()), 1e-2 * largest)
        assert float((found[name] - gradient).norm()) <= allowed, name


def check(model: PackedModel, temperature: float = 1.0) -> None:
    groups = tiny.some_groups()
    rows = model.lay_out(groups)
    logp_T = model(rows, ("logp",), temperature)["logp_T"]
    expected_T = tiny.plain_log_probs(model.network, groups, temperature)
    torch.testing.assert_close(logp_T, expected_T, atol=1e-5, rtol=0)
    found = tiny.gradients(model.network, (logp_T * weights(len(logp_T))).sum())
    expected = tiny.gradients(model.network, (expected_T * weights(len(logp_T))).sum())
    check_gradients(found, expected)


@pytest.mark.parametrize("name", tiny.PACKABLE)
def test_packed_log_probs_and_gradients(name: str) -> None:
    check(tiny.model(name))


@pytest.mark.parametrize("name", VARLEN)
def test_flat_log_probs_and_gradients(name: str, varlen_always: None) -> None:
    model = tiny.model(name)
    lay_out_as(model, "varlen")
    check(model)


@pytest.mark.parametrize("name", ["mistral", "gemma3"])
def test_flat_log_probs_and_gradients_within_windows(name: str, varlen_always: None) -> None:
    model = tiny.model(name, sliding_window=4096)
    lay_out_as(model, "varlen")
    check(model)
    longer = [Group(list(range(4, 4 + 4000)), [Response([5] * 200), Response([6])])]
    assert model._layout_for(longer) == "packed", "beyond the window"


def test_rows_of_small_groups_go_through_a_mask() -> None:
    """A call to the attention kernel for each piece of a few tokens would cost more than the pairs it saves."""
    model = tiny.model()
    model.layout = "varlen"
    assert model.lay_out([Group([5, 6], [Response([7, 8])] * 4)] * 8).layout == "packed"
    assert model.lay_out([Group([5] * 200, [Response([7] * 50)] * 2)] * 2).layout == "varlen"


def test_recomputed_activations_go_by_the_plan_too(varlen_always: None) -> None:
    model = tiny.model("llama").train()
    model.base.gradient_checkpointing_enable({"use_reentrant": False})
    model.base.enable_input_require_grads()
    lay_out_as(model, "varlen")
    check(model)


@pytest.mark.parametrize("name", ["llama", "mistral", "gemma2", "gemma3", "gpt2", "gpt_neox"])
def test_packed_log_probs_and_gradients_in_eager_attention(name: str) -> None:
    check(tiny.model(name, attention="eager"))


@pytest.mark.parametrize("name", [*PLAIN, "llama", "mistral", "opt"])
def test_plain_log_probs_and_gradients(name: str) -> None:
    model = tiny.model(name)
    model.layout = "plain"
    check(model)


@pytest.mark.parametrize("name", ["llama", "gemma2", "granite"])
def test_temperature(name: str) -> None:
    """Log-probs of softmax(logits / temperature), after the architecture's own scaling and capping."""
    check(tiny.model(name), temperature=0.6)


@pytest.mark.parametrize("name", ["gemma2", "cohere", "granite", "gpt2"])
def test_whole_logits(name: str) -> None:
    model = tiny.model(name)
    model.whole_logits = True
    check(model, temperature=0.8)


@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_entropy_is_that_of_each_token_s_distribution(whole: bool, temperature: float) -> None:
    model, groups = tiny.model("gemma2"), tiny.some_groups()
    model.whole_logits = whole
    outputs = model(model.lay_out(groups), ("logp", "entropy"), temperature)
    expected = []
    with torch.no_grad():
        for group in groups:
            for response in group.responses:
                logits = tiny.plain_logits(model.network, group.prompt_ids + response.token_ids) / temperature
                for i in response.predicted:
                    p = logits[len(group.prompt_ids) - 1 + i].double().softmax(-1).tolist()
                    expected.append(-sum(x * math.log(x) for x in p))
    assert outputs["entropy_T"].tolist() == pytest.approx(expected, abs=1e-5)
    assert not outputs["entropy_T"].requires_grad
    assert 0.2 < max(expected) < math.log(tiny.SIZE)


def test_entropy_and_log_prob_are_the_published_ones(published: dict[str, dict[str, Any]]) -> None:
    """Stanford CS336's entropies of torch.randn(2, 10, 100) at seed 42."""
    torch.manual_seed(42)
    logits = torch.randn(2, 10, 100)
    target = torch.arange(20)
    logp, entropy = packed_model._from_logits(logits.flatten(0, 1), target, "value")
    fixture = published["entropy_cs336"]
    torch.testing.assert_close(entropy.view(2, 10), torch.tensor(fixture["expected"]), atol=fixture["atol"], rtol=0)
    torch.testing.assert_close(logp, logits.flatten(0, 1).log_softmax(-1)[target, target])


@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_chunks_change_neither_values_nor_gradients(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, groups = tiny.model(name), tiny.some_groups()
    rows = model.lay_out(groups)
    seen: list[int] = []
    model.head.register_forward_hook(lambda _, inputs, __: seen.append(len(inputs[0])))

    def run() -> tuple[dict[str, Tensor], dict[str, Tensor], list[int]]:
        seen.clear()
        outputs = model(rows, ("logp", "entropy"), 0.8)
        rows_of_logits = list(seen)
        return outputs, tiny.gradients(model.network, outputs["logp_T"].sum()), rows_of_logits

    whole, whole_gradients, at_once = run()
    count = sum(r.loss_tokens for g in groups for r in g.responses)
    assert at_once == [count], "logits are for loss-bearing tokens alone"
    monkeypatch.setattr(log_probs, "CHUNK_ELEMENTS", 3 * tiny.SIZE + 1)
    parts, parts_gradients, in_turn = run()
    assert in_turn == [3] * (count // 3) + [count % 3] * (count % 3 > 0)
    assert sorted(seen) == sorted(in_turn * 2), "recomputed in the backward pass"
    for key in ("logp_T", "entropy_T"):
        torch.testing.assert_close(parts[key], whole[key], atol=1e-5, rtol=0)
    check_gradients(parts_gradients, whole_gradients)


def test_a_chunk_holds_one_token_at_least(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(log_probs, "CHUNK_ELEMENTS", 1)
    check(tiny.model())


def test_no_loss_bearing_tokens_leave_a_graph_to_go_back_through() -> None:
    model = tiny.model()
    rows = model.lay_out([Group([5, 6], [Response([7, 8], [False, False])])])
    outputs = model(rows, ("logp", "entropy"))
    assert outputs["logp_T"].shape == outputs["entropy_T"].shape == (0,)
    outputs["logp_T"].sum().backward()
    assert all(float(p.grad.abs().sum()) == 0 for p in model.parameters() if p.grad is not None)


@pytest.mark.parametrize(
    ("name", "layout"), [(n, k) for n in SCORES for k in ("varlen", "packed", "plain") if k != "varlen" or n in VARLEN]
)
def test_scores_are_the_classifier_s(name: str, layout: str, varlen_always: None) -> None:
    model, groups = tiny.model(name, "score"), tiny.some_groups()
    lay_out_as(model, layout)
    groups[1].responses[0].token_ids[-2:] = [tiny.PAD, tiny.PAD]
    score_N = model(model.lay_out(groups), ("score",))["score_N"]
    sequences = [g.prompt_ids + r.token_ids for g in groups for r in g.responses]
    expected_N = torch.cat([model.network(input_ids=torch.tensor([s]), use_cache=False).logits[0] for s in sequences])
    torch.testing.assert_close(score_N, expected_N, atol=1e-5, rtol=0)
    assert float(expected_N.detach().std()) > 0.1
    found = tiny.gradients(model.network, (score_N * weights(len(score_N))).sum())
    expected = tiny.gradients(model.network, (expected_N * weights(len(score_N))).sum())
    check_gradients(found, expected)


@pytest.mark.parametrize("name", STEPS)
def test_step_logits_are_the_classifier_s(name: str) -> None:
    model, groups = tiny.model(name, "step"), tiny.some_groups()
    step_TL = model(model.lay_out(groups), ("step",))["step_TL"]
    assert step_TL.shape == (sum(r.loss_tokens for g in groups for r in g.responses), 3)
    expected = []
    for group in groups:
        for response in group.responses:
            logits = tiny.plain_logits(model.network, group.prompt_ids + response.token_ids)
            expected.append(logits[[len(group.prompt_ids) + i for i in response.predicted]])
    torch.testing.assert_close(step_TL, torch.cat(expected), atol=1e-5, rtol=0)


@pytest.mark.parametrize("layout", ["varlen", "packed", "plain"])
@pytest.mark.parametrize("budget", [1, 40, 10_000])
def test_outputs_come_in_order_whatever_the_micro_batches(layout: str, budget: int, varlen_always: None) -> None:
    model, groups = tiny.model(), tiny.some_groups()
    lay_out_as(model, layout)
    groups.insert(1, Group([4, 5]))  # no responses
    outputs = model.outputs(groups, ("logp", "entropy"), budget)
    responses = [r for g in groups for r in g.responses]
    assert outputs.keys() == {"logp", "entropy"}
    assert (
        [len(v) for v in outputs["logp"]] == [len(v) for v in outputs["entropy"]] == [r.loss_tokens for r in responses]
    )
    with torch.no_grad():
        expected = tiny.plain_log_probs(model.network, groups)
    torch.testing.assert_close(torch.cat(outputs["logp"]), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("layout", ["varlen", "packed", "plain"])
def test_outputs_of_heads(layout: str, varlen_always: None) -> None:
    groups = tiny.some_groups()
    groups.append(Group([4, 5]))
    scorer, stepper = tiny.model("llama", "score"), tiny.model("llama", "step")
    lay_out_as(scorer, layout)
    lay_out_as(stepper, layout)
    scores = scorer.outputs(groups, ("score",), 30)["score"]
    assert {s.shape for s in scores} == {()}
    with torch.no_grad():
        expected = scorer(scorer.lay_out(groups), ("score",))["score_N"]
    torch.testing.assert_close(torch.stack(scores), expected, atol=1e-5, rtol=0)
    steps = stepper.outputs(groups, ("step",), 30)["step"]
    assert [tuple(s.shape) for s in steps] == [(r.loss_tokens, 3) for g in groups for r in g.responses]


@pytest.mark.parametrize("kind", ["policy", "score"])
def test_outputs_of_nothing(kind: str) -> None:
    model = tiny.model("llama", kind)
    reads = ("logp",) if kind == "policy" else ("score",)
    for layout in ("packed", "plain"):
        model.layout = layout  # type: ignore[assignment]
        assert not any(model.outputs([], reads).values())
        assert not any(model.outputs([Group([4, 5])], reads).values())


def test_outputs_switch_dropout_off_and_put_the_mode_back() -> None:
    model, groups = tiny.model("gpt2", resid_pdrop=0.5), tiny.some_groups()
    expected = torch.cat(model.outputs(groups)["logp"])
    model.train()
    with torch.no_grad():
        assert not torch.allclose(model(model.lay_out(groups))["logp_T"], expected)
    assert torch.equal(torch.cat(model.outputs(groups)["logp"]), expected)
    assert model.training
    model.eval()
    model.outputs(groups)
    assert not model.training
