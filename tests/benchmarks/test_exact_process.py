"""Where sentences come from: the process and the demonstrations."""

import pytest
import torch

from alignlab.benchmarks.exact import (
    ExactWorld,
    demonstration_log_probs,
    demonstrations,
    metrics,
    process_log_probs,
)
from alignlab.benchmarks.exact import process as process_module
from alignlab.benchmarks.exact.process import sample


@pytest.fixture(scope="module")
def world() -> ExactWorld:
    return ExactWorld()


@pytest.fixture(scope="module")
def process(world):
    return process_log_probs(world)


def test_lengths_are_those_of_the_end_probabilities(world, process, monkeypatch):
    ends = (0.1, 0.2, 0.3, 0.4)
    monkeypatch.setattr(process_module, "END_PROBABILITY", ends)
    p_XY = process_log_probs(world).exp()
    expected = [0.1, 0.9 * 0.2, 0.9 * 0.8 * 0.3, 0.9 * 0.8 * 0.7 * 0.4, 0.9 * 0.8 * 0.7 * 0.6]
    for length, probability in enumerate(expected):
        torch.testing.assert_close(
            p_XY[:, world.length_Y == length].sum(-1), torch.full((6,), probability, dtype=torch.float64)
        )


def test_the_next_word_depends_on_the_last_word_and_the_prompt_alone(world, process):
    """Sums of the table over the first word leave the same chances of the last word given the one before it."""
    four = process[:, world.length_Y == 4].exp().reshape(6, 11, 11, 11, 11)
    two = process[:, world.length_Y == 2].exp().reshape(6, 11, 11)
    given_two = two / two.sum(-1, keepdim=True)
    last = four.sum((1, 2))
    torch.testing.assert_close(last / last.sum(-1, keepdim=True), given_two)
    # The first word follows the last one of the prompt.
    one = process[:, world.length_Y == 1].exp()
    for x, ids in enumerate(world.prompt_ids):
        torch.testing.assert_close(one[x] / one[x].sum(), given_two[x, ids[-1]])


def test_entropies_leave_room(world, process):
    assert 6 < metrics.entropy(process) < 7
    assert 6 < metrics.entropy(demonstration_log_probs(world)) < 7


def test_demonstrations_are_the_process_tilted_by_the_reward(world, process):
    better = demonstration_log_probs(world)
    torch.testing.assert_close(better.exp().sum(-1), torch.ones(6, dtype=torch.float64))
    ratio = (better - process)[:, 1:]
    tilt = world.reward_XY[:, 1:] / process_module.DEMONSTRATION_BETA
    torch.testing.assert_close(ratio - ratio[:, :1], tilt - tilt[:, :1])
    assert better[:, 0].exp().tolist() == [0] * 6
    gain = metrics.expectation(better, world.reward_XY) - metrics.expectation(process, world.reward_XY)
    assert 0.03 < gain < 0.15


def test_demonstration_records(world):
    records = demonstrations(world, 3000, seed=1)
    assert records == demonstrations(world, 3000, seed=1)
    assert records != demonstrations(world, 3000, seed=2)
    ids = {word: i for i, word in enumerate(world.text(list(range(11))).split())}
    rewards = []
    counts = [0] * 6
    for record in records:
        assert record["completion"].startswith(" ")
        words = [ids[word] for word in record["completion"].split()]
        x = world.prompt_index([ids[word] for word in record["prompt"].split()])
        assert 1 <= len(words) <= 4
        counts[x] += 1
        rewards.append(world.reward_XY[x, world.index([*words, world.end_id])].item())
    assert counts == [500] * 6
    drawn = torch.tensor(rewards)
    expected = metrics.expectation(demonstration_log_probs(world), world.reward_XY)
    assert abs(drawn.mean().item() - expected) < 4 * drawn.std().item() / 3000**0.5


def test_sampling_has_the_right_frequencies():
    from scipy.stats import chisquare

    p_XY = torch.tensor([[0.1, 0.0, 0.6, 0.3], [0.7, 0.1, 0.1, 0.1]], dtype=torch.float64)
    prompt_N = torch.arange(40_000) % 2
    y_N = sample(p_XY.log(), prompt_N, torch.Generator().manual_seed(0))
    first, second = (torch.bincount(y_N[prompt_N == x], minlength=4).numpy() for x in (0, 1))
    assert first[1] == 0
    assert chisquare(first[[0, 2, 3]], p_XY[0, [0, 2, 3]].numpy() * 20_000).pvalue > 0.001
    assert chisquare(second, p_XY[1].numpy() * 20_000).pvalue > 0.001
