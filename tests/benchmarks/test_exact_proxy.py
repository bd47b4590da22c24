"""Best-of-N sampling by a proxy, as the exact benchmark computes it: against all tuples, and against drawing."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import numpy as np
import pytest
from scipy.stats import chisquare

from alignlab.benchmarks.base import Subject
from alignlab.benchmarks.exact import ExactReward, completion_log_probs
from alignlab.benchmarks.exact.base_model import BaseModelSettings, pretrain
from alignlab.benchmarks.exact.benchmark import ExactBenchmark
from alignlab.core import AlignlabError, ConfigError, Group
from alignlab.models import PackedModel
from alignlab.rollout import LocalRollout
from alignlab.rollout.policy import Policy

WORLD = {"words": 2, "max_tokens": 2, "prompts": 2}
COMPLETIONS = 7  # 1 + 2 + 4
TIED = {(): 0.0, (0,): 1.0, (1,): 2.0, (0, 0): 2.0, (0, 1): 1.0, (1, 0): 3.0, (1, 1): 3.0}
"""What the proxy thinks of each completion, by its words: three ties, and another order than the true reward's."""


class Table:
    """A proxy that looks its reward up."""

    fills = ("reward",)

    def __init__(self, table: dict[tuple[int, ...], float], end: int) -> None:
        self.table, self.end = table, end

    def score(self, groups: Sequence[Group]) -> None:
        for group in groups:
            for response in group.responses:
                response.columns["reward"] = self.table[tuple(t for t in response.token_ids if t != self.end)]


@pytest.fixture(scope="module")
def benchmark() -> ExactBenchmark:
    return ExactBenchmark(world=WORLD, beta=0.1)


@pytest.fixture(scope="module")
def policies(benchmark: ExactBenchmark) -> list[PackedModel]:
    """A policy and a reference."""
    settings = [BaseModelSettings(width=32, layers=1, steps=steps, batch_size=64) for steps in (60, 5)]
    return [PackedModel(pretrain(benchmark.world, s), benchmark.world.tokenizer()) for s in settings]


def subject(benchmark: ExactBenchmark, policies: list[PackedModel], **more: Any) -> Subject:
    rollout = LocalRollout(max_new_tokens=2)
    given = {"proxy": Table(TIED, benchmark.world.end_id), **more}
    policy, reference = map(Policy, policies)
    return Subject(policy, lambda: nullcontext(reference), lambda p: rollout.sampler(p.model), **given)


def brute_force(p_Y: list[float], proxy_Y: list[float], n: int) -> list[float]:
    """Over all tuples of n samples: the first of those with the highest proxy reward is the answer."""
    chosen = [0.0] * len(p_Y)
    for drawn in itertools.product(range(len(p_Y)), repeat=n):
        chosen[max(drawn, key=lambda y: proxy_Y[y])] += math.prod(p_Y[y] for y in drawn)
    return chosen


@pytest.mark.parametrize("n", [2, 4])
def test_figures_are_those_of_all_tuples(benchmark: ExactBenchmark, policies: list[PackedModel], n: int) -> None:
    found = benchmark.evaluate(subject(benchmark, policies, best_of=n))
    world = benchmark.world
    proxy_Y = [TIED[tuple(world.words_of(world.token_ids(y)))] for y in range(COMPLETIONS)]
    p_XY, ref_XY = (completion_log_probs(m.network, world).exp().tolist() for m in policies)
    wanted = dict.fromkeys(("reward", "kl", "proxy_reward", "win_rate", "objective"), 0.0)
    for x, (p_Y, ref_Y) in enumerate(zip(p_XY, ref_XY, strict=True)):
        q_Y, r_Y = brute_force(p_Y, proxy_Y, n), world.reward_XY[x].tolist()
        reward = sum(q * r for q, r in zip(q_Y, r_Y, strict=True))
        kl = sum(q * math.log(q / ref) for q, ref in zip(q_Y, ref_Y, strict=True))
        wins = [
            q * ref * (1.0 if a > b else 0.5 if a == b else 0.0)
            for (q, a), (ref, b) in itertools.product(zip(q_Y, r_Y, strict=True), zip(ref_Y, r_Y, strict=True))
        ]
        proxy = sum(q * v for q, v in zip(q_Y, proxy_Y, strict=True))
        for key, value in zip(wanted, (reward, kl, proxy, sum(wins), reward - 0.1 * kl), strict=True):
            wanted[key] += value / world.X
    assert {key: found[key] for key in wanted} == pytest.approx(wanted, rel=1e-6)
    assert found["objective_score"] < 1
    assert found["samples"]


def test_best_of_one_is_the_policy_itself(benchmark: ExactBenchmark, policies: list[PackedModel]) -> None:
    gold = ExactReward(benchmark.world)
    alone, one = (benchmark.evaluate(subject(benchmark, policies, proxy=proxy)) for proxy in (None, gold))
    assert {k: v for k, v in one.items() if k != "proxy_reward"} == alone
    assert one["proxy_reward"] == pytest.approx(one["reward"], abs=0.02)  # estimated from 4096 draws


def test_drawn_answers_have_the_closed_form(benchmark: ExactBenchmark, policies: list[PackedModel]) -> None:
    """The engine's samples, the proxy's scores, the choice: chi-square over the completions of a prompt."""
    draws, world = 4000, benchmark.world
    groups = [Group(world.prompt_ids[1], origin=f"draw:{i}") for i in range(draws)]
    found = subject(benchmark, policies, best_of=2, seed=11).answers(groups)
    counts = np.bincount([world.index(g.responses[0].token_ids) for g in found], minlength=world.Y)
    proxy_Y = [TIED[tuple(world.words_of(world.token_ids(y)))] for y in range(COMPLETIONS)]
    p_Y = completion_log_probs(policies[0].network, world)[1].exp().tolist()
    pvalue = {}
    for n in (1, 2, 3):
        expected = draws * np.array(brute_force(p_Y, proxy_Y, n))
        common = expected >= 5  # the chi-square's rule of thumb
        seen, wanted = counts[common], expected[common]
        pvalue[n] = chisquare(seen, wanted * seen.sum() / wanted.sum()).pvalue
    assert pvalue[2] > 0.01
    assert max(pvalue[1], pvalue[3]) < 1e-3  # it is told from its neighbours


def test_scores_of_all_completions_are_in_their_places(benchmark: ExactBenchmark) -> None:
    larger = ExactBenchmark(world={"words": 9, "max_tokens": 4, "prompts": 2})  # more than one batch, uneven groups
    for made in (benchmark, larger):
        assert made.scores(ExactReward(made.world)).equal(made.world.reward_XY)


def test_scores_that_are_no_numbers(benchmark: ExactBenchmark) -> None:
    with pytest.raises(AlignlabError, match=r"'reward' of response 3 is not finite"):
        benchmark.scores(Table({**TIED, (1,): math.nan}, benchmark.world.end_id))


def test_without_a_judge(benchmark: ExactBenchmark, policies: list[PackedModel]) -> None:
    with pytest.raises(ConfigError, match="best_of=4: a reward model picks the best"):
        benchmark.evaluate(subject(benchmark, policies, proxy=None, best_of=4))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"world": {"words": 1}}, r"benchmark\.world\.words=1: "),
        ({"world": {"word": 3}}, r"benchmark\.world\.word: unknown key; did you mean 'words'\?"),
        ({"world": {"words": 2, "prompts": 3}}, r"benchmark\.world\.prompts=3: 2 words make only 2 prompts"),
        ({"base": {"width": 33}}, r"benchmark\.base\.width=33: "),
        ({"base": {"depth": 2}}, r"benchmark\.base\.depth: unknown key"),
        ({"solutions": 0}, r"benchmark\.solutions=0: must be at least 1"),
        ({"demonstrations": 0}, r"benchmark\.demonstrations=0: must be at least 1"),
        ({"prompt_copies": 0}, r"benchmark\.prompt_copies=0: must be at least 1"),
    ],
)
def test_impossible_settings_are_named_by_their_keys(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ExactBenchmark(**given)
