"""Truncated importance weights: by hand, as a gradient, and as what makes an expectation right."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from alignlab.algorithms.grpo import GRPO
from alignlab.algorithms.importance import importance, weighted
from alignlab.algorithms.ppo import PPO
from alignlab.algorithms.reinforce_pp import ReinforcePP
from alignlab.algorithms.rloo import RLOO
from alignlab.core import Algorithm, Batch, Group, Outputs, Response

LENGTHS = (3, 1, 2)
ADVANTAGES = [1.5, -0.7, 0.4]
WEIGHTS = [[2.0, 0.5, 1.0], [0.25], [1.5, 3.0]]
OLD = [[-1.0, -2.0, -0.5], [-0.3], [-1.2, -0.8]]
ALGORITHMS = {
    "ppo": PPO(value_weight=0.0),
    "grpo": GRPO(kl_coef=0.0, aggregation="token"),
    "grpo_sum": GRPO(kl_coef=0.0, aggregation="sum"),
    "rloo": RLOO(),
    "reinforce_pp": ReinforcePP(baseline=True, kl_coef=0.0),
}


def batch(weights: list[list[float]] | None) -> Batch:
    responses = []
    for k, length in enumerate(LENGTHS):
        known = {"advantage": ADVANTAGES[k]}
        columns: dict = {"old_logp": OLD[k], "ref_logp": OLD[k], "old_value": [0.0] * length, **known}
        columns["value_target"] = [0.0] * length
        responses.append(Response([2] * length, columns=columns))
        if weights is not None:
            responses[-1].columns["importance"] = weights[k]
    return Batch([Group([1], responses)])


def with_advantages(algorithm: Algorithm, found: Batch) -> Batch:
    """PPO and REINFORCE++ have advantages by token."""
    if isinstance(algorithm, PPO | ReinforcePP):
        for response in found.responses:
            response.columns["advantage"] = [response.columns["advantage"]] * len(response.token_ids)  # type: ignore
    return found


def total(algorithm: Algorithm, logp_T: Tensor, weights: list[list[float]] | None) -> Tensor:
    outputs = Outputs(logp_T=logp_T, entropy_T=torch.zeros(6).double(), value_T=torch.zeros(6).double())
    return algorithm.loss(outputs, with_advantages(algorithm, batch(weights)))[0].sum()


def logp() -> Tensor:
    return torch.tensor([p for row in OLD for p in row]).double().requires_grad_()


def test_weights_by_hand() -> None:
    old, behaviour = torch.tensor([-1.0, -1.0, -3.0, -0.5]), torch.tensor([-1.0, -1.5, -0.5, -4.0])
    found = importance(old, behaviour, 2.0)
    assert found.tolist() == pytest.approx([1.0, math.exp(0.5), math.exp(-2.5), 2.0])
    assert importance(old, behaviour, 0.5).max() == 0.5


@pytest.mark.parametrize("name", ALGORITHMS)
def test_the_first_gradient_is_the_policy_gradient_by_weight(name: str) -> None:
    """At π = π_old the ratio is 1: -w·A for each token, over the tokens of its response where that is a mean."""
    algorithm, x = ALGORITHMS[name], logp()
    (gradient,) = torch.autograd.grad(total(algorithm, x, WEIGHTS), x)
    by_length = name == "reinforce_pp"
    expected = [
        -w * a / (len(row) if by_length else 1) for row, a in zip(WEIGHTS, ADVANTAGES, strict=True) for w in row
    ]
    assert gradient.tolist() == pytest.approx(expected)


@pytest.mark.parametrize("name", ALGORITHMS)
def test_gradients_are_those_of_finite_differences(name: str) -> None:
    algorithm = ALGORITHMS[name]
    x = (logp() + 0.05 * torch.randn(6, generator=torch.Generator().manual_seed(0)).double()).detach().requires_grad_()
    assert torch.autograd.gradcheck(lambda y: total(algorithm, y, WEIGHTS), (x,))


@pytest.mark.parametrize("name", ALGORITHMS)
def test_weights_of_one_and_none_at_all_are_the_same(name: str) -> None:
    ones = [[1.0] * n for n in LENGTHS]
    algorithm, x = ALGORITHMS[name], (logp() + 0.1).detach().requires_grad_()
    with_ones, without = total(algorithm, x, ones), total(algorithm, x, None)
    assert float(with_ones) == float(without)
    assert torch.equal(*(torch.autograd.grad(t, x, retain_graph=True)[0] for t in (with_ones, without)))


def test_weights_bear_no_gradient() -> None:
    assert not batch(WEIGHTS)["importance_T"].requires_grad
    x = torch.ones(6).requires_grad_()
    weighted(x, batch(WEIGHTS)).sum().backward()
    assert x.grad is not None and x.grad.tolist() == [w for row in WEIGHTS for w in row]


def test_the_gradient_in_expectation_is_the_on_policy_one() -> None:
    """Tokens drawn from π_b, each possible one by its probability, without a cap: E_b[w·A·∇log π] = E_π[A·∇log π]."""
    generator = torch.Generator().manual_seed(3)
    logits, other, advantage = (torch.randn(5, generator=generator).double() for _ in range(3))
    logits.requires_grad_()
    behaviour = other.log_softmax(0)

    def gradient(probability: Tensor, weights: Tensor) -> Tensor:
        loss = (probability * weights * advantage * logits.log_softmax(0)).sum()
        return torch.autograd.grad(loss, logits)[0]

    policy = logits.log_softmax(0).detach()
    on_policy = gradient(policy.exp(), torch.ones(5).double())
    corrected = gradient(behaviour.exp(), importance(policy, behaviour, math.inf))
    assert torch.allclose(corrected, on_policy)
    assert not torch.allclose(gradient(behaviour.exp(), torch.ones(5).double()), on_policy)
