"""A scorer of a user's that works with the policy and has metrics: one class and one config; and several scorers."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from alignlab.algorithms.sft import SFT
from alignlab.benchmarks.base import Benchmark, Subject
from alignlab.config import compose, resolve
from alignlab.core import AlignlabError, ConfigError, Group, NeedsPolicy, Reports, Response, Scorer
from alignlab.core.parts import score
from alignlab.rollout import LocalRollout
from alignlab.rollout.policy import Policy
from alignlab.rollout.produce import produce
from alignlab.scoring import CombinedScorer, FunctionScorer, SeveralScorers, build_scorers
from alignlab.training.trainer import Trainer
from tests.rollout import tiny
from tests.training import runs

# ---------------------------------------------------------------------- what a user writes


class Surprise:
    """Rewards what the policy itself finds unlikely: minus the mean log-prob of a response's tokens, in nats."""

    def __init__(self, scale: float = 1.0, column: str = "reward") -> None:
        self.scale, self.column, self.fills = scale, column, (column,)
        self.report: Mapping[str, float] = {}

    def bind(self, policy: Any, tokenizer: Any) -> None:
        self.policy, self.tokenizer = policy, tokenizer

    def score(self, groups: Sequence[Group]) -> None:
        for group, found in zip(groups, self.policy.log_probs(groups), strict=True):
            for response, logp_C in zip(group.responses, found, strict=True):
                response.columns[self.column] = -self.scale * float(logp_C.mean())
        responses = [r for g in groups for r in g.responses]
        self.report = {"surprise": float(np.mean([r.columns[self.column] for r in responses]))}


CONFIG = """\
_target_: tests.scoring.test_user_scorer.Surprise
scale: 2.0                     # of the reward
"""


def length(prompt: str, response: str, extra: dict[str, Any]) -> float:
    return float(len(response))


# ---------------------------------------------------------------------- what it gets for it


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("scorer")
    runs.prepare(made)
    (made / "configs" / "scoring").mkdir(parents=True)
    (made / "configs" / "scoring" / "surprise.yaml").write_text(CONFIG)
    return made


RULE = ["scoring.function.column=length", "scoring.function.function.path=tests.scoring.test_user_scorer.length"]


def words(folder: Path, command: str, *more: str) -> dict[str, Any]:
    given = [f"model={folder}/base", "data=prompts", f"data.path={folder}/prompts.jsonl", "rollout.max_new_tokens=6"]
    return resolve(compose(command, [*given, f"out={folder}/{command}", *more], own=folder / "configs"))


def test_its_reward_is_what_the_sampler_says_of_its_own_samples() -> None:
    """Sampled without filters: minus twice the mean of `behaviour_logp`."""
    model = tiny.model("llama")
    groups = LocalRollout(max_new_tokens=6).sampler(model).sample(tiny.prompts(3, 9, 5), 4, 0)
    scorer = Surprise(2.0)
    scorer.bind(Policy(model), model.tokenizer)
    scorer.score(groups)
    for response in (r for g in groups for r in g.responses):
        assert response.columns["reward"] == pytest.approx(-2 * np.mean(response.columns["behaviour_logp"]), abs=1e-4)


def test_alignlab_sample_scores_with_it_and_with_a_rule_beside_it(folder: Path) -> None:
    produce(words(folder, "sample", "scoring=[surprise,function]", *RULE), folder / "sample")
    lines = [json.loads(line) for line in (folder / "sample" / "groups.jsonl").read_text().splitlines()]
    responses = [r for line in lines for r in line["responses"]]
    assert len(responses) == 24
    for response in responses:
        assert response["columns"]["reward"] > 0
        assert response["columns"]["length"] == len(response["text"])


def test_a_run_trains_on_its_reward_and_logs_its_metrics(folder: Path) -> None:
    from alignlab.training.run import train

    more = ["algorithm=grpo", "source=rollout", "source.group_size=3", "training.batch_size=4", "training.epochs=null"]
    more += ["training.steps=2", "training.progress=off", "optimizer.lr=0.01"]
    train(words(folder, "train", *more, "scoring=[surprise,function]", *RULE), folder / "train")
    lines = runs.metrics(folder, "train")
    assert len(lines) == 2
    for line in lines:
        assert line["surprise"] == pytest.approx(line["reward"], abs=1e-6)
    samples = [json.loads(line) for line in (folder / "train" / "samples.jsonl").read_text().splitlines()]
    assert all(s["length"] == len(s["response"]) and "reward" in s for s in samples)


class Probe(Benchmark):
    """What a benchmark sees of the scorer: it has the policy that is measured."""

    name = "probe"

    def evaluate(self, subject: Subject) -> dict[str, Any]:
        groups = subject.answers(tiny.prompts(3, 9))
        assert subject.proxy is not None
        subject.proxy.score(groups)
        same = subject.proxy.members["0"].policy is subject.policy  # type: ignore[attr-defined]
        return {"columns": sorted(groups[0].responses[0].columns), "same": same}


def test_alignlab_evaluate_measures_by_it(folder: Path) -> None:
    from alignlab.benchmarks.evaluate import evaluate

    given = [f"run={folder}/base", f"reference={folder}/base", "rollout.max_new_tokens=4", f"out={folder}/evaluated"]
    config = resolve(compose("evaluate", [*given, "scoring=[surprise,function]", *RULE], own=folder / "configs"))
    config["benchmark"] = {"_target_": "tests.scoring.test_user_scorer.Probe"}
    found = evaluate(config)
    assert found["columns"] == ["behaviour_logp", "length", "reward"] and found["same"]
    with pytest.raises(ConfigError, match="reward_model='m': scoring gives the reward: leave out one of them"):
        evaluate({**config, "reward_model": "m"})
    with pytest.raises(ConfigError, match="scoring: fills length, not reward"):
        evaluate({**config, "scoring": config["scoring"]["function"]})


# ---------------------------------------------------------------------- one, several, none

TARGET = {"_target_": "tests.scoring.test_user_scorer.Surprise"}


@pytest.mark.parametrize(
    ("values", "scales"),
    [
        (None, []),
        ({}, []),
        (TARGET, [1.0]),
        ([TARGET, {**TARGET, "scale": 2.0, "column": "other"}], [1.0, 2.0]),
        ({"a": TARGET, "b": {**TARGET, "scale": 3.0, "column": "other"}}, [1.0, 3.0]),
    ],
)
def test_one_several_or_none(values: Any, scales: list[float]) -> None:
    found = build_scorers(values)
    assert all(isinstance(s, Scorer) for s in found)
    assert [s.scale for s in found] == scales  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ([TARGET, {**TARGET, "scal": 1}], r"scoring\.1\.scal: unknown key; did you mean 'scale'"),
        ({"a": {**TARGET, "scale": "x"}}, r"scoring\.a\.scale='x'"),
        ({"a": {"_target_": "collections.Counter"}}, r"scoring\.a\._target_=collections\.Counter: not a Scorer"),
        ({"a": {"path": "m"}}, r"scoring\.a\._target_: must name a class"),
    ],
)
def test_what_is_wrong_is_said_with_the_scorer_s_key(values: Any, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        build_scorers(values)


BOTH = "scoring.b: fills the column 'reward', as scoring.a does, .*: make one of both with scoring=combined"


def test_two_scorers_of_one_column_are_refused() -> None:
    """The last one's values would be all that is left."""
    with pytest.raises(ConfigError, match=BOTH):
        build_scorers({"a": TARGET, "b": {**TARGET, "scale": 3.0}})
    with pytest.raises(ConfigError, match="b: fills the column 'reward', as a does"):
        SeveralScorers({"a": Surprise(), "b": Surprise()})
    with pytest.raises(ConfigError, match=r"scorers\[1\], Surprise: fills .* as scorers\[0\], Surprise"):
        Trainer(Policy(tiny.model("llama")), SFT(), lr=0.1, scorers=[Surprise(), Surprise()])


class Returns:
    """Sets a column to what it is made with; nothing for None."""

    fills = ("reward",)

    def __init__(self, value: Any) -> None:
        self.value = value

    def score(self, groups: Sequence[Group]) -> None:
        for response in (r for g in groups for r in g.responses if self.value is not None):
            response.columns["reward"] = self.value


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (None, "response 1 got no 'reward', which is in `fills`"),
        ("hi", r"'reward' of response 1 is no number \(str\): a finite number is wanted, .*; got 'hi'"),
        (float("nan"), "'reward' of response 1 is not finite .*; got nan"),
        ([1.0, float("inf")], r"'reward' of response 1 has the shape \(2,\): .*; got \[1\.0, inf\]"),
        ([float("inf")], r"'reward' of response 1 has numbers that are not finite: .*; got \[inf\]"),
        ({}, "'reward' of response 1 .*; got {}"),
    ],
)
def test_a_scorer_that_fills_nothing_or_no_numbers_is_named_with_the_record(value: Any, said: str) -> None:
    groups = [Group([1], [Response([2])], "data.jsonl:7")]
    method = r"tests\.scoring\.test_user_scorer\.Returns\.score"
    with pytest.raises(AlignlabError, match=rf"^data\.jsonl:7: {method}: {said}"):
        score(Returns(value), groups)
    score(Returns(2), groups)
    score(Returns(np.zeros(1)), groups)


def test_one_of_ours_that_fills_none_of_a_group_is_named() -> None:
    """It may leave responses out, but not all of them."""
    scorer = FunctionScorer(length)
    scorer.score = lambda groups: None  # type: ignore[method-assign]
    with pytest.raises(AlignlabError, match=r"^data\.jsonl:7: .*FunctionScorer\.score: filled none of reward"):
        score(scorer, [Group([1], [Response([2])], "data.jsonl:7")])


def test_a_list_of_classes_is_no_list_of_options(folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"options are listed, as in scoring=\[a,b\]; a class is \+scoring\.NAME"):
        words(folder, "sample", "scoring=[{_target_: a}]")


def test_scorers_in_scorers_get_the_policy_and_report_by_name() -> None:
    """Whatever holds others hands the policy on."""
    inner = Surprise()
    inner.report = {"surprise": 2.0}
    for outer in (CombinedScorer({"odd": inner}), SeveralScorers({"odd": inner, "rule": FunctionScorer(length, "x")})):
        assert isinstance(outer, NeedsPolicy) and isinstance(outer, Reports)
        outer.bind("policy", "tokenizer")
        assert inner.policy == "policy"
        assert outer.report == {"odd/surprise": 2.0}
    assert outer.fills == ("reward", "x")
