"""The exact benchmark's language: completions, reward, tokenizer, scorer."""

import random

import pytest
import torch

from alignlab.benchmarks.exact.language import END, ExactReward, ExactWorld, ExactWorldSettings
from alignlab.core import ConfigError, DataError, Group, Response, Scorer


@pytest.fixture(scope="module")
def world() -> ExactWorld:
    return ExactWorld()


@pytest.fixture
def hand_made() -> ExactWorld:
    """Three words, one prompt that ends with word 1, and tables small enough for arithmetic by hand."""
    world = ExactWorld(ExactWorldSettings(words=3, max_tokens=4, prompts=1))
    world.prompt_ids = [[0, 1]]
    world.likes_XV = torch.tensor([[0.0, 0.5, 1.0]], dtype=torch.float64)
    world.favoured_VV = torch.tensor([[0, 1, 0], [0, 0, 1], [0, 0, 0]], dtype=torch.float64)  # 0→1 and 1→2
    world.wanted_X = torch.tensor([2])
    return world


def test_completions_are_all_sequences_in_order(world):
    assert world.Y == 16_105 == len(world.words_YL)
    assert torch.bincount(world.length_Y).tolist() == [1, 11, 121, 1331, 14641]
    assert len(set(map(tuple, world.words_YL.tolist()))) == 16_105
    assert world.token_ids(0) == [11]
    assert world.token_ids(1) == [0, 11]
    assert world.token_ids(12) == [0, 0, 11]
    assert world.token_ids(14) == [0, 2, 11]
    assert world.token_ids(16_104) == [10, 10, 10, 10]


def test_index_is_the_inverse_of_token_ids(world):
    for y in [0, 1, 11, 12, 132, 133, 1463, 1464, *random.Random(0).sample(range(world.Y), 200)]:
        assert world.index(world.token_ids(y)) == y
    assert world.index([3, 2, 1, 0, world.end_id]) == world.index([3, 2, 1, 0])


@pytest.mark.parametrize("tokens", [[], [1, 2], [11, 1, 11], [1, 2, 3, 4, 5], [1, 2, 3, 4, 5, 11], [12, 11], [-1, 11]])
def test_what_is_no_completion_is_refused(world, tokens):
    with pytest.raises(DataError, match=r"data\.jsonl:3.*no completion"):
        world.words_of(tokens, "data.jsonl:3")


def test_prompts_are_different_pairs_of_different_words(world):
    assert len(set(map(tuple, world.prompt_ids))) == world.X == 6
    assert all(first != second for first, second in world.prompt_ids)
    assert [world.prompt_index(ids) for ids in world.prompt_ids] == list(range(6))
    assert world.prompts() == [{"prompt": text} for text in world.prompt_texts]


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ([], 0.2 * (1 - 2 / 4)),
        ([2], 0.5 * 1.0 + 0.3 * 1 + 0.2 * (1 - 1 / 4)),  # 1→2 across the end of the prompt
        ([0, 1], 0.5 * (0.0 + 0.5) / 2 + 0.3 * 1 / 2 + 0.2),
        ([2, 2], 0.5 * 1.0 / 2 + 0.3 * 1 / 2 + 0.2),  # the second 2 earns no liking
        ([2, 0, 1, 2], 0.5 * 1.5 / 4 + 0.3 * 3 / 4 + 0.2 * (1 - 2 / 4)),
    ],
)
def test_reward_by_hand(hand_made, words, expected):
    y = hand_made.index([*words, 3])
    assert hand_made.reward_XY[0, y].item() == pytest.approx(expected, abs=1e-6)


def test_reward_table_against_a_plain_implementation(world):
    def plain(x: int, words: list[int]) -> float:
        n = len(words)
        length = 1 - abs(n - int(world.wanted_X[x])) / 4
        if n == 0:
            return 0.2 * length
        liking = sum(float(world.likes_XV[x, w]) for w in set(words)) / n
        pairs = zip([world.prompt_ids[x][1], *words], words, strict=False)
        return 0.5 * liking + 0.3 * sum(float(world.favoured_VV[a, b]) for a, b in pairs) / n + 0.2 * length

    rng = random.Random(1)
    for y in rng.sample(range(world.Y), 300):
        x = rng.randrange(world.X)
        words = world.words_YL[y, : int(world.length_Y[y])].tolist()
        assert world.reward_XY[x, y].item() == pytest.approx(plain(x, words), abs=1e-6)


def test_rewards_are_in_range_and_depend_on_the_prompt(world):
    assert world.reward_XY.min() >= 0
    assert world.reward_XY.max() <= 1
    assert world.reward_XY.std(-1).min() > 0.05
    assert torch.corrcoef(world.reward_XY).fill_diagonal_(0).max() < 0.95


def test_equal_rewards_are_equal_bit_for_bit(hand_made):
    """0, 1, 2 in any order are liked the same; orders with as many favoured neighbours must tie
    exactly; and rewards have six decimals, so that rounding elsewhere cannot untie them."""
    by_favoured = {}
    for words in ([0, 2, 1], [1, 0, 2], [2, 1, 0]):
        favoured = sum(pair in ((0, 1), (1, 2)) for pair in zip([1, *words], words, strict=False))
        by_favoured.setdefault(favoured, set()).add(hand_made.reward_XY[0, hand_made.index([*words, 3])].item())
    assert all(len(rewards) == 1 for rewards in by_favoured.values())
    assert hand_made.reward_XY.tolist() == [[round(reward, 6) for reward in hand_made.reward_XY[0].tolist()]]


def test_the_seed_alone_decides():
    first, again, other = (ExactWorld(ExactWorldSettings(seed=seed)) for seed in (3, 3, 4))
    assert first.prompt_ids == again.prompt_ids
    assert torch.equal(first.reward_XY, again.reward_XY)
    assert not torch.equal(first.reward_XY, other.reward_XY)


def test_impossible_settings_are_refused():
    with pytest.raises(ConfigError, match="prompts=7"):
        ExactWorld(ExactWorldSettings(words=3, prompts=7))
    with pytest.raises(ConfigError, match="max_tokens"):
        ExactWorld(ExactWorldSettings(words=20, max_tokens=6))


def test_tokenizer_round_trip_through_a_folder(world, tmp_path):
    from transformers import AutoTokenizer

    world.tokenizer().save_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert len(tokenizer) == 12
    assert tokenizer.eos_token_id == tokenizer.pad_token_id == world.end_id
    for x, text in enumerate(world.prompt_texts):
        for special in (True, False):
            assert tokenizer(text, add_special_tokens=special)["input_ids"] == world.prompt_ids[x]
    for y in random.Random(2).sample(range(world.Y), 50):
        ids = world.token_ids(y)
        text = tokenizer.decode(ids, skip_special_tokens=True)
        assert text == world.text(ids)
        assert tokenizer(text)["input_ids"] == tokenizer(" " + text)["input_ids"] == [i for i in ids if i != 11]
    assert tokenizer("fox " + END)["input_ids"] == [1, 11]
    with pytest.raises(Exception, match="UNK"):
        tokenizer("the zebra")


def test_scorer_fills_in_the_table(world):
    rng = random.Random(3)
    picks = [[rng.randrange(world.Y) for _ in range(5)] for _ in world.prompt_ids]
    groups = [
        Group(ids, [Response(world.token_ids(y)) for y in ys]) for ids, ys in zip(world.prompt_ids, picks, strict=True)
    ]
    groups.append(Group(world.prompt_ids[2], [Response([1, 2, 3, 4, world.end_id])]))
    groups.append(Group(world.prompt_ids[0]))
    scorer = ExactReward(world)
    assert isinstance(scorer, Scorer)
    assert scorer.fills == ("reward",)
    scorer.score(groups)
    for x, ys in enumerate(picks):
        assert [r.columns["reward"] for r in groups[x].responses] == world.reward_XY[x, ys].tolist()
    assert groups[6].responses[0].columns["reward"] == world.reward_XY[2, world.index([1, 2, 3, 4])].item()
    scorer.score([])


def test_scorer_refuses_prompts_of_another_language(world):
    with pytest.raises(DataError, match=r"data\.jsonl:7.*prompts"):
        ExactReward(world).score([Group([0, 0], [Response([11])], origin="data.jsonl:7")])
