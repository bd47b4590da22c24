"""A rollout engine of a user's: one class and one config, none of our files touched."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from alignlab.config import compose, resolve
from alignlab.core import ConfigError, ExactSampler, Group, Response, RolloutEngine, Sampler
from alignlab.models import PackedModel
from alignlab.rollout import BaseRollout, LocalRollout, build_engine
from alignlab.rollout.produce import produce
from tests.rollout.tiny import model, prompts
from tests.training import runs

# ---------------------------------------------------------------------- what a user writes


class TableRollout(BaseRollout):
    """Responses from a table of answers: always the same ones, in turn. Its annotated attributes are its settings."""

    answers: list[str]

    def sampler(self, policy: PackedModel) -> TableSampler:
        return TableSampler(policy, self.answers)


class TableSampler:
    def __init__(self, policy: PackedModel, answers: Sequence[str]) -> None:
        self.policy, self.answers, self.generated_tokens = policy, answers, 0

    def sample(self, groups: Sequence[Group], n: int, seed: int) -> list[Group]:
        found = []
        for group in groups:
            responses = [self._response(self.answers[k % len(self.answers)]) for k in range(n)]
            self.generated_tokens += sum(len(r.token_ids) for r in responses)
            found.append(group.with_responses(responses))
        return found

    def _response(self, text: str) -> Response:
        tokens = self.policy.tokenizer(text, add_special_tokens=False)["input_ids"]
        return Response(tokens, columns={"behaviour_logp": [0.0] * len(tokens)}, text=text, source="policy")


class BannedWord(LocalRollout):
    """The local engine with a word that never comes: responses that have it are drawn again."""

    word: str
    tries: int = 20

    def sampler(self, policy: PackedModel) -> Sampler:
        return WithoutWord(super().sampler(policy), self.word, self.tries)


class WithoutWord:
    def __init__(self, sampler: Sampler, word: str, tries: int) -> None:
        self.inner, self.word, self.tries = sampler, word, tries

    @property
    def generated_tokens(self) -> int:
        return self.inner.generated_tokens

    def sample(self, groups: Sequence[Group], n: int, seed: int) -> list[Group]:
        found: list[list[Response]] = [[] for _ in groups]
        for attempt in range(self.tries):
            short = [i for i, some in enumerate(found) if len(some) < n]
            if not short:
                break
            for i, group in zip(short, self.inner.sample([groups[i] for i in short], n, seed + attempt), strict=True):
                found[i] += [r for r in group.responses if self.word not in r.text.split()]
        return [g.with_responses(some[:n]) for g, some in zip(groups, found, strict=True)]


CONFIG = """\
defaults:
  - local

_target_: tests.rollout.test_user_engine.BannedWord
word: a                        # never comes
"""


# ---------------------------------------------------------------------- what it gets for it


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("engine")
    runs.prepare(made)
    (made / "configs" / "rollout").mkdir(parents=True)
    (made / "configs" / "rollout" / "banned.yaml").write_text(CONFIG)
    return made


def table(temperature: float = 1.0) -> dict[str, Any]:
    target = "tests.rollout.test_user_engine.TableRollout"
    return {"_target_": target, "temperature": temperature, "answers": ["b", "a b a"]}


def test_a_class_with_a_sampler_is_an_engine() -> None:
    engine = build_engine(table())
    assert isinstance(engine, RolloutEngine)
    assert (engine.temperature, engine.importance_cap, engine.off_policy, engine.prefetches) == (
        1.0,
        None,
        False,
        False,
    )
    sampler = engine.sampler(model("llama"))
    assert isinstance(sampler, Sampler) and not isinstance(sampler, ExactSampler)


def test_what_is_no_engine_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"_target_=collections\.Counter: not a RolloutEngine: it has no check, i"):
        build_engine({"_target_": "collections.Counter"})
    with pytest.raises(ConfigError, match=r"rollout\.answers: must be given"):
        build_engine({"_target_": table()["_target_"]})
    with pytest.raises(ConfigError, match=r"rollout\.temperature=-1"):
        build_engine(table(temperature=-1))
    with pytest.raises(ConfigError, match=r"rollout\.anwsers: unknown key; did you mean 'answers'"):
        build_engine({**table(), "anwsers": ["b"]})


def test_the_banned_word_never_comes() -> None:
    packed = model("llama")
    ours, plain = BannedWord(word="ab", max_new_tokens=1), LocalRollout(max_new_tokens=1)
    found = ours.sampler(packed).sample(prompts(4, 6), 40, 0)
    assert "ab" in {r.text for g in plain.sampler(packed).sample(prompts(4, 6), 40, 0) for r in g.responses}
    assert all(len(g.responses) == 40 for g in found)
    assert "ab" not in {r.text for g in found for r in g.responses}


def words(folder: Path, command: str, *more: str) -> dict[str, Any]:
    own = [w for w in runs.ONLINE if command == "train" or not w.startswith("source")]
    given = [f"model={folder}/base", *own, f"data.path={folder}/prompts.jsonl", "rollout=banned", *more]
    return resolve(compose(command, [*given, f"out={folder}/{command}"], own=folder / "configs"))


def test_alignlab_sample_draws_with_it(folder: Path) -> None:
    made = produce(words(folder, "sample", "group_size=3"), folder / "sample")
    lines = [json.loads(line) for line in (folder / "sample" / "groups.jsonl").read_text().splitlines()]
    texts = [r["text"] for line in lines for r in line["responses"]]
    assert len(texts) == 36 and not any("a" in t.split() for t in texts)
    assert made["generated_tokens"] > sum(len(r["token_ids"]) for line in lines for r in line["responses"])


def test_a_run_trains_on_its_samples(folder: Path) -> None:
    from alignlab.training.run import train

    more = [
        "algorithm=grpo",
        "training.batch_size=4",
        "training.epochs=null",
        "training.steps=2",
        "training.progress=off",
    ]
    train(words(folder, "train", *more, "optimizer.lr=0.01"), folder / "train")
    samples = [json.loads(line) for line in (folder / "train" / "samples.jsonl").read_text().splitlines()]
    assert len(samples) == 12 and not any("a" in s["response"].split() for s in samples)
    assert len(runs.metrics(folder, "train")) == 2


def test_evaluation_draws_with_it_too(folder: Path) -> None:
    """`alignlab evaluate` builds the same section: no place of ours names an engine."""
    config = resolve(compose("evaluate", ["run=r", "rollout=banned"], own=folder / "configs"))
    assert isinstance(build_engine(config["rollout"]), BannedWord)
