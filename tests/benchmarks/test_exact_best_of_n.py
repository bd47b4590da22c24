"""Best of N as it is really drawn (local engine, scorer, selection) against its closed form."""

from __future__ import annotations

import math

import pytest
import torch
from scipy.stats import chisquare

from alignlab.benchmarks.exact import ExactReward, ExactWorld, ExactWorldSettings, completion_log_probs, metrics
from alignlab.benchmarks.exact.base_model import BaseModelSettings, pretrain
from alignlab.core import Group
from alignlab.models import PackedModel
from alignlab.rollout import LocalRollout, best_of

DRAWS = 3000


@pytest.fixture(scope="module")
def world() -> ExactWorld:
    return ExactWorld(ExactWorldSettings(words=4, max_tokens=2, prompts=2))


@pytest.fixture(scope="module")
def policy(world: ExactWorld) -> PackedModel:
    network = pretrain(world, BaseModelSettings(width=32, layers=1, steps=40, batch_size=64))
    return PackedModel(network, world.tokenizer())


@pytest.mark.parametrize("n", [1, 4])
def test_drawn_best_of_n_has_the_closed_form(world: ExactWorld, policy: PackedModel, n: int) -> None:
    """Chi-square over all 21 completions of each prompt; at the fixed seed the p-value is no coincidence's."""
    logp_XY = completion_log_probs(policy.network, world)
    expected_XY = metrics.best_of_n(logp_XY, world.reward_XY, n).exp()
    assert float(metrics.kl_divergence(expected_XY.log(), logp_XY)) <= math.log(n) - (n - 1) / n + 1e-9
    engine = LocalRollout(max_new_tokens=2).sampler(policy)
    for x, ids in enumerate(world.prompt_ids):
        groups = [Group(ids, origin=f"draw:{i}") for i in range(DRAWS)]
        chosen = best_of(engine, ExactReward(world), groups, n, seed=7)
        counts = torch.bincount(
            torch.tensor([world.index(g.responses[0].token_ids) for g in chosen]), minlength=world.Y
        )
        expected = expected_XY[x] * DRAWS
        common = expected >= 5  # the chi-square's rule of thumb; the rest goes into one cell
        observed = [*counts[common].tolist(), int(counts[~common].sum())]
        wanted = [*expected[common].tolist(), float(expected[~common].sum())]
        if wanted[-1] < 5:
            observed, wanted = [*observed[:-2], sum(observed[-2:])], [*wanted[:-2], sum(wanted[-2:])]
        assert chisquare(observed, wanted).pvalue > 0.01


def test_the_closed_form_is_told_from_its_neighbours(world: ExactWorld, policy: PackedModel) -> None:
    """The guard of the test above: 3000 draws of best of 4 are not taken for best of 3 or 5."""
    logp_XY = completion_log_probs(policy.network, world)
    engine = LocalRollout(max_new_tokens=2).sampler(policy)
    groups = [Group(world.prompt_ids[0], origin=f"draw:{i}") for i in range(DRAWS)]
    chosen = best_of(engine, ExactReward(world), groups, 4, seed=7)
    counts = torch.bincount(torch.tensor([world.index(g.responses[0].token_ids) for g in chosen]), minlength=world.Y)
    for n in (3, 5):
        expected = metrics.best_of_n(logp_XY, world.reward_XY, n)[0].exp() * DRAWS
        common = expected >= 5
        observed = [*counts[common].tolist(), int(counts[~common].sum())]
        wanted = [*expected[common].tolist(), float(expected[~common].sum())]
        assert chisquare(observed, wanted).pvalue < 0.001
