"""Exact metrics against hand arithmetic, enumeration, sampling and an independent optimiser."""

import itertools
import math

import numpy as np
import pytest
import torch

from alignlab.benchmarks.exact import ExactWorld, metrics, process_log_probs
from alignlab.core import ConfigError

BETAS = (0.02, 0.05, 0.2, 1.0)


def logs(*rows: list[float]) -> torch.Tensor:
    return torch.tensor(rows, dtype=torch.float64).log()


def rewards(*rows: list[float]) -> torch.Tensor:
    return torch.tensor(rows, dtype=torch.float64)


def random_case(seed: int, prompts: int = 3, outcomes: int = 40):
    """A reference, rewards with many ties, and a policy."""
    generator = torch.Generator().manual_seed(seed)
    shape = (prompts, outcomes)
    reference, policy = (2 * torch.randn(2, *shape, generator=generator, dtype=torch.float64)).log_softmax(-1)
    return reference, torch.randint(0, 9, shape, generator=generator).double() / 8, policy


def test_expectation_entropy_and_kl_by_hand():
    policy, reference = logs([0.25, 0.75], [1.0, 0.0]), logs([0.5, 0.5], [0.2, 0.8])
    assert metrics.expectation(policy, rewards([0, 1], [4, 100])) == pytest.approx((0.75 + 4) / 2)
    assert metrics.entropy(policy) == pytest.approx(-(0.25 * math.log(0.25) + 0.75 * math.log(0.75)) / 2)
    assert metrics.entropy(logs([0.25] * 4)) == pytest.approx(math.log(4))
    first = 0.25 * math.log(0.5) + 0.75 * math.log(1.5)
    assert metrics.kl_divergence(policy, reference) == pytest.approx((first + math.log(5)) / 2)
    assert metrics.kl_divergence(reference, reference) == 0


def test_objective_and_score_by_hand():
    reference, policy, reward = logs([0.5, 0.5]), logs([0.25, 0.75]), rewards([0, 1])
    kl = 0.25 * math.log(0.5) + 0.75 * math.log(1.5)
    assert metrics.objective(policy, reference, reward, 2.0) == pytest.approx(0.75 - 2 * kl)
    best = 2 * math.log((1 + math.exp(0.5)) / 2)
    assert metrics.optimal_objective(reference, reward, 2.0) == pytest.approx(best)
    score = (0.75 - 2 * kl - 0.5) / (best - 0.5)
    assert metrics.objective_score(policy, reference, reward, 2.0) == pytest.approx(score)
    assert math.isnan(metrics.objective_score(policy, reference, rewards([1, 1]), 2.0))
    with pytest.raises(ConfigError, match="beta"):
        metrics.optimum(reference, reward, 0.0)


def test_optimum_by_hand():
    optimum = metrics.optimum(logs([0.2, 0.3, 0.5]), rewards([1, 0, 1]), 0.5)
    weights = [0.2 * math.exp(2), 0.3, 0.5 * math.exp(2)]
    torch.testing.assert_close(optimum.exp()[0], rewards(weights)[0] / sum(weights))


@pytest.mark.parametrize("beta", BETAS)
def test_optimum_reaches_j_star_and_nothing_beats_it(beta):
    reference, reward, policy = random_case(0)
    optimum = metrics.optimum(reference, reward, beta)
    best = metrics.optimal_objective(reference, reward, beta)
    assert metrics.objective(optimum, reference, reward, beta) == pytest.approx(best, abs=1e-12)
    assert metrics.objective_score(optimum, reference, reward, beta) == pytest.approx(1, abs=1e-9)
    assert metrics.objective_score(reference, reference, reward, beta) == pytest.approx(0, abs=1e-9)
    generator = torch.Generator().manual_seed(1)
    for size in (0.01, 0.1, 1.0):
        noise = torch.randn(reference.shape, generator=generator, dtype=torch.float64)
        assert metrics.objective((optimum + size * noise).log_softmax(-1), reference, reward, beta) < best
    assert metrics.objective(policy, reference, reward, beta) < best


def test_frontier_of_two_outcomes_by_hand():
    """With rewards 0 and 1 and an even reference, reward q costs KL(q‖½), and all of it costs log 2."""
    reference, reward = logs([0.5, 0.5]), rewards([0, 1])
    for q in (0.500001, 0.6, 0.8, 0.99, 0.999999):
        kl = q * math.log(2 * q) + (1 - q) * math.log(2 * (1 - q))
        assert metrics.frontier(reference, reward, kl) == pytest.approx(q, abs=1e-6 if q < 0.51 else 1e-9)
    assert metrics.frontier(reference, reward, 0.0) == 0.5
    assert metrics.frontier(reference, reward, math.log(2)) == 1
    assert metrics.frontier(reference, reward, 5.0) == 1
    with pytest.raises(ConfigError, match="kl"):
        metrics.frontier(reference, reward, -0.1)


def test_frontier_against_an_independent_optimiser():
    """Maximise the mean reward of two prompts under a bound on the mean KL, by SLSQP over the probabilities."""
    from scipy.optimize import minimize

    q = np.array([[0.2, 0.3, 0.5], [0.6, 0.3, 0.1]])
    r = np.array([[1.0, 0.4, 0.0], [0.0, 0.5, 0.6]])
    for kl in (0.05, 0.3, 0.8):
        found = minimize(
            lambda p: -(p.reshape(2, 3) * r).sum() / 2,
            q.ravel(),
            bounds=[(1e-9, 1)] * 6,
            constraints=[
                {"type": "eq", "fun": lambda p: p.reshape(2, 3).sum(-1) - 1},
                {"type": "ineq", "fun": lambda p, kl=kl: kl - (p * np.log(p / q.ravel())).sum() / 2},
            ],
            options={"ftol": 1e-12, "maxiter": 500},
        )
        assert metrics.frontier(torch.tensor(q).log(), torch.tensor(r), kl) == pytest.approx(-found.fun, abs=1e-6)


@pytest.mark.parametrize("beta", BETAS)
def test_optima_lie_on_the_frontier(beta):
    reference, reward, _ = random_case(2)
    optimum = metrics.optimum(reference, reward, beta)
    assert metrics.frontier_efficiency(optimum, reference, reward) == pytest.approx(1, abs=1e-9)


def test_no_policy_is_beyond_the_frontier():
    for seed in range(20):
        reference, reward, policy = random_case(seed)
        assert metrics.frontier_efficiency(policy, reference, reward) < 1
        near = (metrics.optimum(reference, reward, 0.1) + 0.01 * policy).log_softmax(-1)
        assert 0.9 < metrics.frontier_efficiency(near, reference, reward) <= 1 + 1e-12


def test_greedy_is_where_the_frontier_ends():
    reference, reward, _ = random_case(3)
    greedy = metrics.greedy(reference, reward)
    assert metrics.expectation(greedy, reward) == pytest.approx(reward.amax(-1).mean().item())
    assert metrics.frontier_efficiency(greedy, reference, reward) == pytest.approx(1)
    limit = metrics.optimum(reference, reward, 1e-4)
    torch.testing.assert_close(greedy.exp(), limit.exp(), atol=1e-12, rtol=0)
    # Anything as certain, but not of the best, is below.
    worst = metrics.greedy(reference, -reward)
    assert metrics.frontier_efficiency(worst, reference, reward) < 0


def test_frontier_efficiency_by_hand_and_where_it_is_undefined():
    """Four equal outcomes, two of them good: the same tilt, and so the same KL, spent well, in vain and backwards."""
    reference, reward = logs([0.25] * 4), rewards([0, 0, 1, 1])
    for policy, expected in (([0.1, 0.1, 0.4, 0.4], 1), ([0.4, 0.1, 0.4, 0.1], 0), ([0.4, 0.4, 0.1, 0.1], -1)):
        assert metrics.frontier_efficiency(logs(policy), reference, reward) == pytest.approx(expected, abs=1e-9)
    assert math.isnan(metrics.frontier_efficiency(reference, reference, reward))
    rounding = (reference + 1e-6 * rewards([1, -1, 1, -1])).log_softmax(-1)
    assert math.isnan(metrics.frontier_efficiency(rounding, reference, reward))
    assert math.isnan(metrics.frontier_efficiency(logs([0.1, 0.1, 0.4, 0.4]), reference, rewards([1, 1, 1, 1])))


@pytest.mark.parametrize("n", [1, 2, 3, 4])
def test_best_of_n_against_all_tuples_with_ties(n):
    p, r = [0.1, 0.2, 0.3, 0.15, 0.25], [0.0, 1.0, 1.0, 2.0, 2.0]
    expected = [0.0] * 5
    for drawn in itertools.product(range(5), repeat=n):
        tied = [i for i in drawn if r[i] == max(r[j] for j in drawn)]
        for i in tied:
            expected[i] += math.prod(p[j] for j in drawn) / len(tied)
    torch.testing.assert_close(metrics.best_of_n(logs(p), rewards(r), n).exp(), rewards(expected))


def test_best_of_n_against_sampling():
    from scipy.stats import chisquare

    reference, reward, _ = random_case(4, prompts=1, outcomes=12)
    rng = np.random.default_rng(0)
    draws = rng.choice(12, size=(100_000, 5), p=reference.exp()[0].numpy())
    scores = reward[0].numpy()[draws] + 1e-6 * rng.random(draws.shape)  # ties at random
    best = draws[np.arange(len(draws)), scores.argmax(-1)]
    expected = metrics.best_of_n(reference, reward, 5).exp()[0].numpy() * len(draws)
    seen = np.bincount(best, minlength=12)
    common = expected > 5
    observed, wanted = [np.append(v[common], v[~common].sum() + 1e-9) for v in (seen, expected)]
    assert chisquare(observed, wanted * observed.sum() / wanted.sum()).pvalue > 0.001


def test_best_of_n_kl_is_within_the_bound_and_near_it_without_ties():
    reference, reward, _ = random_case(5)
    for n in (1, 2, 10, 1000, 10**6):
        best = metrics.best_of_n(reference, reward, n)
        assert best.exp().sum(-1) == pytest.approx(1)
        assert metrics.kl_divergence(best, reference) <= metrics.best_of_n_kl_bound(n) + 1e-12
    assert metrics.best_of_n_kl_bound(4) == pytest.approx(math.log(4) - 0.75)
    many = torch.full((1, 100_000), -math.log(100_000), dtype=torch.float64)
    distinct = torch.arange(100_000).double()[None]
    kl = metrics.kl_divergence(metrics.best_of_n(many, distinct, 4), many)
    assert kl == pytest.approx(metrics.best_of_n_kl_bound(4), abs=1e-4)


def test_best_of_n_with_impossible_and_nearly_impossible_outcomes():
    reference = torch.tensor([[-math.inf, math.log(0.5), math.log(0.5), -800.0]], dtype=torch.float64)
    best = metrics.best_of_n(reference, rewards([0, 1, 2, 3]), 3)
    torch.testing.assert_close(best.exp(), rewards([0, 0.125, 0.875, 0]))
    assert best[0, 3].item() == pytest.approx(-800 + math.log(3))
    with pytest.raises(ConfigError, match="n=0"):
        metrics.best_of_n(reference, rewards([0, 1, 2, 3]), 0)


def test_more_samples_tend_to_the_greedy_policy():
    reference, reward, _ = random_case(6)
    best = metrics.best_of_n(reference, reward, 10**7)
    torch.testing.assert_close(best.exp(), metrics.greedy(reference, reward).exp(), atol=1e-6, rtol=0)


def test_win_rate_by_hand_and_against_all_pairs():
    even, reward = logs([0.5, 0.5]), rewards([0, 1])
    assert metrics.win_rate(logs([0.2, 0.8]), even, reward) == pytest.approx(0.8 * 0.75 + 0.2 * 0.25)
    assert metrics.win_rate(logs([0.0, 1.0]), logs([1.0, 0.0]), reward) == 1
    assert metrics.win_rate(logs([0.2, 0.8]), even, rewards([3, 3])) == pytest.approx(0.5)
    other, reward, policy = random_case(7)
    p, q = policy.exp(), other.exp()
    above = (reward[:, :, None] > reward[:, None]).double() + 0.5 * (reward[:, :, None] == reward[:, None])
    pairs = torch.einsum("xi,xj,xij->x", p, q, above).mean().item()
    assert metrics.win_rate(policy, other, reward) == pytest.approx(pairs)
    assert metrics.win_rate(other, policy, reward) == pytest.approx(1 - pairs)


def test_preference_optimum_is_the_objective_optimum():
    """The implicit reward β_DPO·log(π/π_ref) of the optimum at β = τ·β_DPO reproduces the labels' probabilities."""
    reference, reward, _ = random_case(8)
    optimum = metrics.optimum(reference, reward, beta=0.25 * 0.2)
    implicit = 0.2 * (optimum - reference)
    implied = torch.sigmoid(implicit[:, :-1] - implicit[:, 1:])
    torch.testing.assert_close(implied, torch.sigmoid((reward[:, :-1] - reward[:, 1:]) / 0.25))


def test_on_the_whole_language():
    """The scales that make the benchmark interesting: room to gain, at a few nats."""
    world = ExactWorld()
    reference = process_log_probs(world)
    optimum = metrics.optimum(reference, world.reward_XY, 0.05)
    assert 2 < metrics.kl_divergence(optimum, reference) < 3.5
    assert metrics.expectation(optimum, world.reward_XY) > metrics.expectation(reference, world.reward_XY) + 0.25
    assert metrics.frontier_efficiency(optimum, reference, world.reward_XY) == pytest.approx(1, abs=1e-9)
    for n in (4, 64):
        assert 0.5 < metrics.frontier_efficiency(
            metrics.best_of_n(reference, world.reward_XY, n), reference, world.reward_XY
        ) < 1  # fmt: skip
