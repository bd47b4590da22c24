"""Stories: what a policy and best-of-N sampling are given for answers whose sentiment is known."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest

from alignlab.benchmarks.base import Subject
from alignlab.benchmarks.evaluate import build_benchmark
from alignlab.benchmarks.stories import StoriesBenchmark, distinct, sentiment
from alignlab.config import compose, resolve
from alignlab.core import ConfigError, DataError, Group, Response
from alignlab.rollout.policy import Policy
from alignlab.scoring import FunctionScorer
from tests import tiny

OPENINGS = [f"{a} b c " for a in "defg"]
TEXTS = ["good", "it was a dark night", "what a happy wonderful day", "bad", "lovely", "awful and sad"]


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    for name in ("train", "test"):
        stories = [{"text": f"{opening}h i j k"} for opening in OPENINGS]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(s) + "\n" for s in stories))
    return tmp_path


class Told:
    """A sampler whose k-th answer to an opening is a text of the list, by the seed; remembers what it was asked."""

    def __init__(self, calls: list[tuple[int, int]]) -> None:
        self.calls = calls

    def sample(self, groups: Sequence[Group], n: int, seed: int) -> list[Group]:
        self.calls.append((n, seed))
        made = []
        for i, group in enumerate(groups):
            found = [(i + k + seed) % len(TEXTS) for k in range(n)]
            drawn = {"behaviour_logp": [0.0] * 3}
            made.append(
                group.with_responses([Response([5 + t, 6, tiny.EOS], None, dict(drawn), text=TEXTS[t]) for t in found])
            )
        return made


def wordiness(prompt: str, response: str, extra: dict[str, Any]) -> float:
    """A proxy that is another thing than cheerfulness."""
    return float(len(response.split()))


def measured(texts: Path, **more: Any) -> tuple[dict[str, Any], list[tuple[int, int]], Subject]:
    calls: list[tuple[int, int]] = []
    policy, reference = Policy(tiny.model(seed=0)), Policy(tiny.model(seed=1))
    subject = Subject(policy, lambda: nullcontext(reference), lambda _: Told(calls), seed=1, **more)
    return StoriesBenchmark(str(texts), 3, 4, 4).evaluate(subject), calls, subject


def log_ratios(found: Sequence[Group]) -> list[float]:
    values = [tiny.plain_log_probs(tiny.network(seed=seed), found) for seed in (0, 1)]
    return (values[0] - values[1]).view(len(found), 3).sum(-1).tolist()


def chosen(texts: Sequence[int]) -> list[Group]:
    tokenizer = tiny.tokenizer()
    return [
        Group(tokenizer(opening)["input_ids"], [Response([5 + t, 6, tiny.EOS])])
        for opening, t in zip(OPENINGS, texts, strict=True)
    ]


def test_a_policy_is_measured_on_its_answers(texts: Path) -> None:
    found, calls, _ = measured(texts, proxy=FunctionScorer(wordiness))
    mine = [1, 2, 3, 4]
    gold = [sentiment("", TEXTS[t], {}) for t in mine]
    assert found["reward_per_prompt"] == gold
    assert found["reward"] == pytest.approx(sum(gold) / 4)
    assert found["kl"] == pytest.approx(sum(log_ratios(chosen(mine))) / 4, abs=1e-4)
    assert found["proxy_reward"] == (5 + 5 + 1 + 1) / 4
    assert "note" not in found
    # The reference answers by other random numbers: its samples are independent of the policy's.
    (mine_n, mine_seed), (other_n, other_seed) = calls
    assert (mine_n, other_n, mine_seed) == (1, 1, 1)
    assert other_seed != mine_seed
    theirs = [sentiment("", TEXTS[(i + other_seed) % len(TEXTS)], {}) for i in range(4)]
    wins = [1.0 if a > b else 0.5 if a == b else 0.0 for a, b in zip(gold, theirs, strict=True)]
    assert found["win_rate"] == sum(wins) / 4


def test_the_best_of_n_is_the_proxys_choice_and_pays_the_bound(texts: Path) -> None:
    """Of texts 1 2 3, 2 3 4, 3 4 5 and 4 5 0 the first of those with most words is taken."""
    found, calls, _ = measured(texts, proxy=FunctionScorer(wordiness), best_of=3)
    best = [1, 2, 5, 5]
    assert calls[0] == (3, 1)
    gold = [sentiment("", TEXTS[t], {}) for t in best]
    assert found["reward_per_prompt"] == gold
    assert found["proxy_reward"] == (5 + 5 + 3 + 3) / 4
    bound = math.log(3) - 2 / 3
    assert found["kl"] == pytest.approx(sum(log_ratios(chosen(best))) / 4 + bound, abs=1e-4)
    assert found["note"].startswith("its KL is an upper bound, log 3 - 2/3")
    assert [s["answer"] for s in found["samples"]] == [TEXTS[t] for t in best]


def test_the_best_of_n_needs_a_judge(texts: Path) -> None:
    with pytest.raises(ConfigError, match="best_of=3: a reward model picks the best"):
        measured(texts, best_of=3)


def test_openings_and_rests_are_the_stories(texts: Path, tmp_path: Path) -> None:
    made = StoriesBenchmark(str(texts), 3, 4, 4)
    made.write_data(tmp_path / "data", "")
    assert {p.stem for p in (tmp_path / "data").iterdir()} == set(made.files)
    first = json.loads((tmp_path / "data/demonstrations.jsonl").read_text().splitlines()[0])
    assert first == {"prompt": "d b c ", "completion": "h i j k"}


def test_too_few_stories(texts: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="only 4 of its stories are long enough for the split train, 5 are asked for"):
        StoriesBenchmark(str(texts), 3, 5, 4).write_data(tmp_path / "data", "")
    with pytest.raises(DataError, match=r"for the split test, 5 are asked for \(benchmark.test_stories\)"):
        StoriesBenchmark(str(texts), 3, 4, 5).write_data(tmp_path / "data", "")


def prompts(benchmark: StoriesBenchmark, folder: Path) -> tuple[list[str], list[str]]:
    """Openings for training and held-out ones."""
    benchmark.write_data(folder, "")
    train = [json.loads(line)["prompt"] for line in (folder / "prompts.jsonl").read_text().splitlines()]
    return train, [g.prompt for g in benchmark._prompts(tiny.model())]


def test_a_single_file_is_divided(tmp_path: Path) -> None:
    """Short stories do not count; what is held out stands behind what is trained on."""
    path = tmp_path / "stories.jsonl"
    lines = [{"text": f"{opening}h i j k"} for opening in OPENINGS]
    path.write_text("".join(json.dumps(line) + "\n" for line in [*lines[:1], {"text": "d b c h"}, *lines[1:]]))
    found = prompts(StoriesBenchmark(str(path), 3, 2, 2), tmp_path / "data")
    assert found == (OPENINGS[:2], OPENINGS[2:])
    with pytest.raises(DataError, match="only 1 of its stories after the first 3 are long enough"):
        StoriesBenchmark(str(path), 3, 3, 2).write_data(tmp_path / "data", "")


def test_by_default_they_come_from_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    asked = []

    def load_dataset(name: str, subset: None, split: str) -> list[dict[str, str]]:
        asked.append((name, split))
        first = {"train": 0, "validation": 2}[split]
        return [{"text": f"{opening}h i j k"} for opening in OPENINGS[first : first + 2]]

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    made = build_benchmark(resolve(compose("evaluate", ["run=.", "benchmark=stories"]))["benchmark"])
    assert isinstance(made, StoriesBenchmark)
    made.opening_words, made.train_stories, made.test_stories = 3, 2, 2
    assert prompts(made, tmp_path) == (OPENINGS[:2], OPENINGS[2:])
    assert set(asked) == {("roneneldan/TinyStories", "train"), ("roneneldan/TinyStories", "validation")}


def test_what_cannot_be_read_is_named(texts: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"benchmark.texts=/nowhere/at/all: is not there; give a file or folder"):
        StoriesBenchmark("/nowhere/at/all")
    (texts / "test.jsonl").write_text('{"story": "d b c h i j k"}\n')
    with pytest.raises(DataError, match=r'test.jsonl:1: not a record with a "text"'):
        StoriesBenchmark(str(texts), 3, 4, 4).write_data(tmp_path / "data", "")


def test_real_stories_are_divided_as_their_files_are(shared: Path, tmp_path: Path) -> None:
    folder = shared / "data" / "tinystories"
    train, test = prompts(StoriesBenchmark(str(folder), 12, 8, 8), tmp_path)
    for name, openings in (("train", train), ("test", test)):
        lines = (folder / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()[:20]
        words = [json.loads(line)["text"].split(" ") for line in lines]
        assert openings == [" ".join(w[:12]) + " " for w in words if len(w) > 13][:8]


def test_distinct_by_hand() -> None:
    assert distinct(["a b a", "b"], 1) == 2 / 4
    assert distinct(["a b a", "b"], 2) == 1.0
    assert distinct([""], 1) == 0.0
