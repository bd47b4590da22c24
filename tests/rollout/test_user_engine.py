"""A rollout engine of a user's: one class and one config, none of our files touched."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from alignlab.config import compose, resolve
from alignlab.core import AlignlabError, ConfigError, ExactSampler, Group, Response, RolloutEngine, Sampler
from alignlab.core.parts import taken
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


class Meagre(TableRollout):
    """Draws something else than what was asked for."""

    fault: str

    def sampler(self, policy: PackedModel) -> Sampler:
        sampler = super().sampler(policy)
        sample = sampler.sample

        def wrong(groups: Sequence[Group], n: int, seed: int) -> Any:
            found = sample(groups, n, seed)
            if self.fault == "none":
                return [g.with_responses([]) for g in found]
            if self.fault == "fewer":
                found[1].responses.pop()
            elif self.fault == "empty":
                found[1].responses[0].token_ids = []
            elif self.fault == "groups":
                return found[:1]
            elif self.fault == "nothing":
                return None
            elif self.fault == "logp":
                del found[1].responses[0].columns["behaviour_logp"]
            return found

        sampler.sample = wrong  # type: ignore[method-assign]
        return sampler

    @property
    def off_policy(self) -> bool:
        return True


NAME = r"tests\.rollout\.test_user_engine\.TableSampler\.sample"


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ("none", rf"jsonl:1: {NAME}: must give 2 responses; got 0"),
        ("fewer", rf"jsonl:2: {NAME}: must give 2 responses; got 1"),
        ("empty", rf"jsonl:2: {NAME}: response 1 needs a list of at least one token id"),
        ("groups", rf"^{NAME}: returned 1 groups for \d+ prompts; must be one for each"),
        ("nothing", rf"^{NAME}: must return a list of groups, \d+, one for each prompt; got None"),
        ("logp", rf"jsonl:2: {NAME}: response 1 needs `behaviour_logp`, a log-prob for each of its \d+ tokens"),
    ],
)
def test_an_engine_that_draws_too_little_is_named(folder: Path, fault: str, said: str) -> None:
    """It would train on less than was asked for, or on nothing, and look well."""
    from alignlab.training.run import train

    words = [f"model={folder}/base", "data=prompts", f"data.path={folder}/prompts.jsonl"]
    config = resolve(compose("sample", [*words, f"out={folder}/{fault}"]))
    config["rollout"] = {"_target_": "tests.rollout.test_user_engine.Meagre", "fault": fault, "answers": ["a", "b"]}
    with pytest.raises(AlignlabError, match=said):
        produce(config, folder / fault)
    given = ["algorithm=grpo", "source=rollout", "source.group_size=2", "scoring=function", "training.progress=off"]
    rule = "scoring.function.path=tests.scoring.test_user_scorer.length"
    config = resolve(compose("train", [*words, *given, rule, "order=sequential", f"out={folder}/run-{fault}"]))
    config["rollout"] = {"_target_": "tests.rollout.test_user_engine.Meagre", "fault": fault, "answers": ["a", "b"]}
    with pytest.raises(AlignlabError, match=said):
        train(config, folder / f"run-{fault}")


def test_what_was_drawn_ahead_is_checked_too() -> None:
    """A sampler of a user's that prefetches: as if it had been waited for."""
    sampler = TableSampler(model("llama"), ["a", "b"])
    asked = prompts(3, 9)
    assert taken(sampler, lambda: sampler.sample(asked, 2, 0), asked, 2)[0].responses[1].text == "b"
    with pytest.raises(AlignlabError, match=r"TableSampler\.prefetch: must give 2 responses; got 1"):
        taken(sampler, lambda: sampler.sample(asked, 1, 0), asked, 2)
    with pytest.raises(AlignlabError, match=r"TableSampler\.prefetch: .*KeyError"):
        taken(sampler, lambda: {}["groups"], asked, 2)
