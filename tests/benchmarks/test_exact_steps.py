"""The truth for process reward models: values of prefixes against their definition, and the records made of them."""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any

import pytest
import torch

from alignlab.benchmarks.exact import ExactWorld, ExactWorldSettings, demonstration_log_probs
from alignlab.benchmarks.exact.benchmark import ExactBenchmark
from alignlab.benchmarks.exact.steps import labelled_steps, prefix_values, step_values, successes
from alignlab.data import DataSettings, load, write_jsonl

N = 6000


@pytest.fixture(scope="module")
def world() -> ExactWorld:
    return ExactWorld(ExactWorldSettings(words=3, max_tokens=3, prompts=2))


def words(world: ExactWorld, y: int) -> list[int]:
    return world.words_of(world.token_ids(y))


def test_values_of_prefixes_are_conditional_means(world: ExactWorld) -> None:
    """Over all completions that begin with the words, by listing them."""
    generator = torch.Generator().manual_seed(0)
    shape = (world.X, world.Y)
    logp_XY = torch.randn(shape, generator=generator, dtype=torch.float64).log_softmax(-1)
    value_XY = torch.rand(shape, generator=generator, dtype=torch.float64)
    found = prefix_values(world, logp_XY, value_XY)
    assert found.shape == shape
    for x in range(world.X):
        for y in range(world.Y):
            start = words(world, y)
            within = [z for z in range(world.Y) if words(world, z)[: len(start)] == start]
            mass = sum(logp_XY[x, z].exp().item() for z in within)
            mean = sum(logp_XY[x, z].exp().item() * value_XY[x, z].item() for z in within) / mass
            assert found[x, y].item() == pytest.approx(mean)
    torch.testing.assert_close(found[:, world.length_Y == world.L], value_XY[:, world.length_Y == world.L])


def test_success_is_a_reward_above_the_median(world: ExactWorld) -> None:
    logp_XY = demonstration_log_probs(world)
    found = successes(world, logp_XY)
    for x in range(world.X):
        p, reward = logp_XY[x].exp(), world.reward_XY[x]
        above = [(reward > r).double() for r in reward.unique()]
        shares = [(p * a).sum().item() for a in above]
        chosen = next(i for i, a in enumerate(above) if a.equal(found[x]))
        assert shares[chosen] <= 0.5 < (shares[chosen - 1] if chosen else 1.0)  # the least bar that half do not pass


def test_labels_are_the_chances_of_success(world: ExactWorld) -> None:
    """The frequency of success among the drawn solutions that begin alike, five standard errors wide."""
    records = labelled_steps(world, N, seed=3)
    good_XY = successes(world, demonstration_log_probs(world))
    tokenizer = world.tokenizer()
    outcomes: dict[tuple[str, str], list[float]] = {}
    labels: dict[tuple[str, str], float] = {}
    for record in records:
        assert len(record["steps"]) == len(record["soft_labels"]) >= 1
        x = world.prompt_texts.index(record["prompt"])
        ids = tokenizer(record["prompt"] + "".join(record["steps"]))["input_ids"]
        assert ids[:2] == world.prompt_ids[x]
        assert len(ids) == 2 + len(record["steps"])  # a word is a step is a token
        y = world.index([*ids[2:], world.end_id])
        for k, label in enumerate(record["soft_labels"], start=1):
            place = (record["prompt"], "".join(record["steps"][:k]))
            outcomes.setdefault(place, []).append(good_XY[x, y].item())
            assert labels.setdefault(place, label) == label
    common = {place: seen for place, seen in outcomes.items() if len(seen) >= 200}
    assert len(common) >= 10
    assert {labels[place] for place in common} - {0.0, 1.0}
    for place, seen in common.items():
        error = max(labels[place] * (1 - labels[place]) / len(seen), 1e-12) ** 0.5
        assert abs(statistics.mean(seen) - labels[place]) <= 5 * error + 1e-6, place


def test_read_as_steps_each_word_has_its_label(tmp_path: Path) -> None:
    world = ExactWorld(ExactWorldSettings(words=5, max_tokens=3, prompts=2))
    write_jsonl(tmp_path / "steps.jsonl", labelled_steps(world, 50, seed=0))
    settings = DataSettings(path=str(tmp_path / "steps.jsonl"), parser="steps", step_separator="")
    value_XY = step_values(world)
    groups = load(settings, world.tokenizer()).train
    assert len(groups) == 50
    for group in groups:
        [response] = group.responses
        x, ids = world.prompt_index(group.prompt_ids), [response.token_ids[i] for i in response.predicted]
        assert ids == world.words_of(response.token_ids)  # the end token is no step
        places = [world.index([*ids[: k + 1], world.end_id]) for k in range(len(ids))]
        labels: Any = response.columns["step_label"]
        assert [(label + 1) / 2 for label in labels] == pytest.approx(value_XY[x, places].tolist(), abs=1e-6)


def test_prompts_come_in_equal_shares_and_the_seed_decides(world: ExactWorld) -> None:
    records = labelled_steps(world, 100, seed=0)
    assert [r["prompt"] for r in records].count(world.prompt_texts[0]) == 50
    assert [r["prompt"] for r in records[:50]].count(world.prompt_texts[0]) not in (0, 25, 50)  # in random order
    assert labelled_steps(world, 100, seed=0) == records
    assert labelled_steps(world, 100, seed=1) != records


def test_the_benchmark_writes_what_it_says(tmp_path: Path) -> None:
    made = ExactBenchmark(demonstrations=8, solutions=12, prompt_copies=2, world={"words": 3, "prompts": 2})
    made.write_data(tmp_path, "")
    lines = {p.stem: p.read_text().splitlines() for p in tmp_path.iterdir()}
    assert set(lines) == set(made.files)
    assert {name: len(found) for name, found in lines.items()} == {"demonstrations": 8, "prompts": 4, "steps": 12}
    value_XY = step_values(made.world)
    for line in lines["steps"]:
        record = json.loads(line)
        x = made.world.prompt_texts.index(record["prompt"])
        ids = made.world.tokenizer()("".join(record["steps"]))["input_ids"]
        y = made.world.index([*ids, made.world.end_id])
        assert record["soft_labels"][-1] == pytest.approx(value_XY[x, y].item(), abs=1e-6)
