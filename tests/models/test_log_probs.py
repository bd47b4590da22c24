"""Log-probs in chunks equal their definition, values and gradients, whatever comes between head and softmax."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from alignlab.models import log_probs as module
from alignlab.models.log_probs import Scaling, chunks, log_probs

SCALINGS = [Scaling(), Scaling(temperature=0.6), Scaling(0.25, None, 1.3), Scaling(1.0, 3.0, 0.7), Scaling(0.5, 2.0)]
T, D, V = 11, 6, 23


def definition(hidden: Tensor, target: Tensor, head: nn.Linear, scaling: Scaling) -> tuple[Tensor, Tensor]:
    z = head(hidden) * scaling.factor
    if scaling.cap is not None:
        z = scaling.cap * torch.tanh(z / scaling.cap)
    log_p = (z / scaling.temperature).log_softmax(-1)
    return log_p[torch.arange(len(target)), target], -(log_p.exp() * log_p).sum(-1)


def problem(bias: bool, trained: bool) -> tuple[Tensor, Tensor, nn.Linear]:
    torch.manual_seed(0)
    head = nn.Linear(D, V, bias=bias, dtype=torch.float64).requires_grad_(trained)
    with torch.no_grad():
        head.weight.mul_(8)
    return torch.randn(T, D, dtype=torch.float64, requires_grad=True), torch.randint(0, V, (T,)), head


@pytest.mark.parametrize("chunk", [1, 3 * V + 1, 1 << 20])
@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("scaling", SCALINGS)
def test_the_definition(
    scaling: Scaling, bias: bool, trained: bool, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "CHUNK_ELEMENTS", chunk)
    hidden, target, head = problem(bias, trained)
    weight_T = torch.linspace(-1, 2, T, dtype=torch.float64)
    expected = definition(hidden, target, head, scaling)
    found = log_probs(hidden, target, head, scaling, entropy="value")
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, atol=1e-12, rtol=0)
    assert not found[1].requires_grad
    wanted = [hidden, *head.parameters()] if trained else [hidden]
    of_expected = torch.autograd.grad((expected[0] * weight_T).sum(), wanted)
    of_found = torch.autograd.grad((found[0] * weight_T).sum(), wanted)
    for one, other in zip(of_found, of_expected, strict=True):
        torch.testing.assert_close(one, other, atol=1e-11, rtol=0)


@pytest.mark.parametrize("chunk", [3 * V, 1 << 20])
@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("scaling", SCALINGS)
def test_entropies_with_a_gradient(
    scaling: Scaling, trained: bool, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "CHUNK_ELEMENTS", chunk)
    hidden, target, head = problem(True, trained)
    weight_T, other_T = torch.linspace(-1, 2, T, dtype=torch.float64), torch.linspace(3, -2, T, dtype=torch.float64)
    wanted = [hidden, *head.parameters()] if trained else [hidden]

    def gradients(outputs: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
        return torch.autograd.grad((outputs[0] * weight_T + outputs[1] * other_T).sum(), wanted)

    expected = gradients(definition(hidden, target, head, scaling))
    found = gradients(log_probs(hidden, target, head, scaling, "gradient"))
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, atol=1e-11, rtol=0)


def test_a_trained_head_over_fixed_hidden_states() -> None:
    hidden, target, head = problem(bias=True, trained=True)
    hidden = hidden.detach()
    expected = torch.autograd.grad(definition(hidden, target, head, Scaling())[0].sum(), list(head.parameters()))
    found = torch.autograd.grad(log_probs(hidden, target, head, Scaling(), "no")[0].sum(), list(head.parameters()))
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("trained", [False, True])
def test_finite_differences(trained: bool) -> None:
    hidden, target, head = problem(bias=True, trained=trained)
    assert torch.autograd.gradcheck(lambda h: log_probs(h, target, head, Scaling(0.5, 2.0, 0.9), "no")[0], [hidden])


def test_improbable_tokens_keep_their_log_probs() -> None:
    """exp(-300) is zero in float32; its logarithm must not be taken."""
    head = nn.Linear(1, 2, bias=False).requires_grad_(False)
    with torch.no_grad():
        head.weight.copy_(torch.tensor([[0.0], [300.0]]))
    hidden = torch.ones(1, 1, requires_grad=True)
    logp, _ = log_probs(hidden, torch.tensor([0]), head, Scaling(), "no")
    assert float(logp) == -300.0
    assert float(torch.autograd.grad(logp.sum(), hidden)[0]) == -300.0


@pytest.mark.parametrize(("trained", "products"), [(False, 2), (True, 1)])
def test_products_with_the_vocabulary(trained: bool, products: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a fixed head the backward pass has none at all; nothing is computed without gradients."""
    calls: list[int] = []
    right = module.linear
    monkeypatch.setattr(module, "linear", lambda *a: calls.append(1) or right(*a))
    hidden, target, head = problem(bias=False, trained=trained)
    logp, _ = log_probs(hidden, target, head, Scaling(), "no")
    assert len(calls) == products
    logp.sum().backward()
    assert len(calls) == (products if not trained else 3)
    calls.clear()
    with torch.no_grad():
        log_probs(hidden, target, head, Scaling(), "no")
    assert len(calls) == 1


def test_under_autocast() -> None:
    torch.manual_seed(0)
    head = nn.Linear(32, 50, bias=False)
    hidden, target = torch.randn(9, 32, requires_grad=True), torch.arange(9)
    expected, _ = definition(hidden, target, head, Scaling())
    of_expected = torch.autograd.grad(expected.sum(), [hidden, head.weight])
    for trained in (False, True):
        head.requires_grad_(trained)
        with torch.autocast("cpu", torch.bfloat16):
            found, _ = log_probs(hidden, target, head, Scaling(), "no")
        assert found.dtype == torch.float32
        assert 0 < float((found - expected).abs().max()) < 0.05, "in bfloat16, as the module itself would"
        of_found = torch.autograd.grad(found.sum(), [hidden, head.weight] if trained else [hidden])
        for one, other in zip(of_found, of_expected, strict=False):
            torch.testing.assert_close(one, other, atol=0.03, rtol=0.05)


def test_entropies_are_not_rounded_under_autocast() -> None:
    """Logits are bfloat16 there; what follows from them is not."""
    torch.manual_seed(0)
    head = nn.Linear(32, 50, bias=False).requires_grad_(False)
    hidden, target = torch.randn(9, 32), torch.arange(9)
    with torch.autocast("cpu", torch.bfloat16):
        logits = head(hidden)
        _, found = log_probs(hidden, target, head, Scaling(), "value")
    assert logits.dtype == torch.bfloat16
    expected = torch.distributions.Categorical(logits=logits.double()).entropy()
    torch.testing.assert_close(found.double(), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize(("vocabulary", "expected"), [(32_000, 131), (1_000, 4_194), (256_000, 16), (600_000, 6)])
def test_a_chunk_holds_as_many_logits_whatever_the_vocabulary(vocabulary: int, expected: int) -> None:
    """2²² numbers at most."""
    assert [p.stop - p.start for p in chunks(torch.zeros(2 * expected + 1), vocabulary)] == [expected, expected, 1]
