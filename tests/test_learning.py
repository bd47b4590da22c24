"""Every algorithm learns what it is for, measured exactly: in a small language whose completions can all be listed.

A language of 5 words, completions of up to 3 (156 to each of 4 prompts), a known reward in [0, 1]. Each algorithm is
given its kind of data, made from the base model, and some steps; figures are computed over all completions, so that
there is no noise but that of training itself. Thresholds lie well below what several seeds gave.
"""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch

from alignlab.benchmarks.exact.benchmark import ExactBenchmark
from alignlab.benchmarks.exact.enumeration import completion_log_probs
from alignlab.benchmarks.exact.language import WORDS, ExactReward
from alignlab.benchmarks.exact.metrics import policy_metrics
from alignlab.benchmarks.exact.process import demonstration_log_probs
from alignlab.benchmarks.exact.steps import labelled_steps
from alignlab.config import compose, config_folder, resolve
from alignlab.core import Group, Response
from alignlab.data.groups import group_to_record
from alignlab.models import ModelSettings, PackedModel, load_model
from alignlab.rollout import LocalRollout
from alignlab.scoring import BradleyTerryLabels, PairwiseScorer
from alignlab.training.run import train
from tests import components
from tests.training.runs import ALGORITHMS

WORLD = {"words": 5, "max_tokens": 3, "prompts": 4}
BASE = {"layers": 1, "width": 64, "steps": 150, "batch_size": 128}
TEMPERATURE = 0.2
"""Of the annotators: two completions whose rewards differ by this much are told apart 73 times in 100."""


@dataclass
class Place:
    """The folder with everything that the runs read."""

    folder: Path
    benchmark: ExactBenchmark
    base: PackedModel

    def run(self, out: str, *words: str) -> PackedModel:
        """Train from the base model; the model that was saved."""
        common = ["training.progress=off", "training.epochs=null", "training.batch_size=64", "optimizer.lr=3e-3"]
        common += ["schedule=linear", "rollout.max_new_tokens=3", f"model={self.base.source}"]
        filled = [w.format(folder=self.folder) for w in [*common, *words]]
        config = resolve(compose("train", [*filled, f"out={self.folder / out}"]))
        train(config, self.folder / out)
        kind = {"reward_model": "score", "pairwise_model": "score", "process_reward_model": "step"}.get(out, "policy")
        settings = ModelSettings(path=str(self.folder / out / "model"))
        return load_model(settings, kind=kind, trainable=False, labels=2)  # type: ignore[arg-type]

    def figures(self, policy: PackedModel, beta: float = 0.1) -> dict[str, float]:
        world = self.benchmark.world
        logp, ref = (completion_log_probs(m.network, world) for m in (policy, self.base))
        return policy_metrics(logp, ref, world.reward_XY, beta)

    def everything(self) -> list[Group]:
        """Every completion of every prompt, as groups with one response each, row by row."""
        world = self.benchmark.world
        found = []
        for ids in world.prompt_ids:
            found += [Group(list(ids), [Response(world.token_ids(y))]) for y in range(world.Y)]
        return found


class Gold(ExactReward):
    """The true reward, by name for configs."""

    def __init__(self, world: dict[str, Any]) -> None:
        super().__init__(ExactBenchmark(world=world).world)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    folder = tmp_path_factory.mktemp("learning")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ALIGNLAB_CACHE", str(folder / "cache"))
        benchmark = ExactBenchmark(demonstrations=1024, prompt_copies=32, world=WORLD, base=BASE)
        base = load_model(ModelSettings(path=str(benchmark.base_model())), trainable=False)
    benchmark.write_data(folder, base.source)
    prompts = [
        Group(
            list(benchmark.world.prompt_ids[i % 4]),
            origin=f"prompts.jsonl:{i + 1}",
            prompt=benchmark.world.prompt_texts[i % 4],
        )
        for i in range(1024)
    ]
    engine = LocalRollout(max_new_tokens=3).sampler(base)
    for name, samples, certain in (("pairs", 2, False), ("fours", 4, True)):
        drawn = engine.sample(prompts, samples, 0)
        BradleyTerryLabels(benchmark.gold(), TEMPERATURE, certain).score(drawn)
        text = "".join(json.dumps(group_to_record(g)) + "\n" for g in drawn)
        (folder / f"{name}.jsonl").write_text(text)
    return Place(folder, benchmark, base)


PAIRS = ["data=groups", "data.path={folder}/pairs.jsonl", "training.steps=200"]
FOURS = ["data=groups", "data.path={folder}/fours.jsonl", "training.steps=120", "training.batch_size=32"]
GOLD = "{{_target_: tests.test_learning.Gold, world: {{words: 5, max_tokens: 3, prompts: 4}}}}"
ONLINE = [
    *("data=prompts", "data.path={folder}/prompts.jsonl", "source=rollout", "source.group_size=8"),
    *("training.batch_size=16", "training.steps=120", f"+scoring={GOLD}", "schedule=cosine"),
]

POLICIES: dict[str, tuple[list[str], float, float]] = {
    "dpo": (["algorithm.beta=0.5", *PAIRS], 0.10, 0.8),
    "ipo": (["algorithm.beta=0.5", *PAIRS], 0.07, 0.7),
    "hinge": (["algorithm.gamma=0.5", *PAIRS], 0.10, 0.5),
    "kto": (["algorithm.beta=0.5", *PAIRS], 0.10, 0.5),
    "orpo": (PAIRS, 0.02, 0.4),
    "simpo": (PAIRS, 0.10, 0.4),
    "slic": (PAIRS, 0.06, 0.35),
    "rrhf": (FOURS, 0.02, 0.15),
    "rejection_sampling": (ONLINE, 0.25, 0.8),
    "expert_iteration": (["algorithm.minimum=0.5", *ONLINE], 0.25, 0.8),
    "ppo": (["algorithm.kl_coef=0.1", "source.ppo_epochs=2", *ONLINE], 0.09, 0.75),
    "grpo": (["algorithm.kl_coef=0.1", *ONLINE], 0.25, 0.8),
    "rloo": (["algorithm.kl_coef=0.1", *ONLINE], 0.11, 0.85),
    "reinforce_pp": (["algorithm.kl_coef=0.1", *ONLINE], 0.11, 0.85),
}
"""Algorithm → its words, the least gain in reward, and the least share of the gain reachable at the KL it spends."""

NO_POLICIES = ("sft", "reward_model", "pairwise_model", "process_reward_model")


def test_all_algorithms_are_here() -> None:
    assert {*POLICIES, *NO_POLICIES} == set(ALGORITHMS) == {p.stem for p in config_folder().glob("algorithm/*.yaml")}


@pytest.mark.parametrize("algorithm", POLICIES)
def test_a_policy_learns_to_earn_more(place: Place, algorithm: str) -> None:
    words, gain, efficiency = POLICIES[algorithm]
    found = place.figures(place.run(algorithm, f"algorithm={algorithm}", *words))
    assert found["reward"] > found["reference_reward"] + gain
    assert found["frontier_efficiency"] > efficiency


@pytest.fixture(scope="module")
def float32_score(place: Place) -> float:
    return _score(place, "float32")


def _score(place: Place, out: str, *words: str) -> float:
    """The objective score of 200 steps of DPO at a learning rate that bfloat16 weights hardly follow."""
    trained = place.run(out, "algorithm=dpo", "algorithm.beta=0.5", *PAIRS, *words, "optimizer.lr=3e-4")
    return place.figures(trained.float())["objective_score"]


@pytest.mark.parametrize("kept", ["in float32", "by Kahan summation", "not"])
def test_bfloat16_products_reach_the_objective_if_weights_keep_their_bits(
    place: Place, float32_score: float, kept: str
) -> None:
    """To 0.01, while a twentieth of the gain is lost where weights and optimiser states are in bfloat16 too."""
    words = ["model.dtype=bfloat16"]
    if kept != "in float32":
        words.append("training.mixed_precision=pure")
    if kept == "by Kahan summation":
        components.need("optimi")
        words.append("optimizer=adamw_kahan")
    found = _score(place, f"kept {kept}", *words)
    if kept == "not":
        assert found < float32_score - 0.03
    else:
        assert found == pytest.approx(float32_score, abs=0.01)


def test_sft_approaches_the_demonstrations(place: Place) -> None:
    """KL(demonstrations‖policy), 0 for a perfect imitator; the base model's is what there was to learn."""
    more = ["data=demonstrations", "data.path={folder}/demonstrations.jsonl", "training.steps=120"]
    policy = place.run("sft", "algorithm=sft", *more)
    demonstrated = demonstration_log_probs(place.benchmark.world)
    weight = demonstrated.exp()

    def distance(model: PackedModel) -> float:
        logp = completion_log_probs(model.network, place.benchmark.world)
        return float((weight * (demonstrated.where(weight > 0, 0.0) - logp)).sum(-1).mean())

    assert distance(policy) < 0.35 * distance(place.base)


def correlation(a: torch.Tensor, b: torch.Tensor, weight: torch.Tensor | None = None) -> float:
    """Pearson's, of things that occur with these weights."""
    weights = (torch.ones_like(a) if weight is None else weight).numpy()
    covariance = numpy.cov(a.numpy(), b.numpy(), aweights=weights)
    return float(covariance[0, 1] / (covariance[0, 0] * covariance[1, 1]) ** 0.5)


def test_a_reward_model_agrees_with_the_true_reward(place: Place) -> None:
    """Score and reward of every completion, as the base model draws them, prompt by prompt: preferences say nothing of
    responses to different prompts."""
    model = place.run("reward_model", "algorithm=reward_model", *PAIRS)
    scores = torch.tensor(model.outputs(place.everything(), ("score",))["score"]).view(4, -1)
    probability = completion_log_probs(place.base.network, place.benchmark.world).exp()
    for mine, true, weight in zip(scores, place.benchmark.world.reward_XY, probability, strict=True):
        assert correlation(mine, true, weight) > 0.8


def test_a_pairwise_model_tells_the_better_of_two(place: Place) -> None:
    place.run("pairwise_model", "algorithm=pairwise_model", "algorithm.separator='<end>'", *PAIRS)
    world, generator = place.benchmark.world, random.Random(0)
    groups, better = [], []
    for _ in range(400):
        x, a, b = generator.randrange(4), generator.randrange(world.Y), generator.randrange(world.Y)
        gap = float(world.reward_XY[x, a] - world.reward_XY[x, b])
        if abs(gap) > TEMPERATURE:
            groups.append(Group(list(world.prompt_ids[x]), [Response(world.token_ids(y)) for y in (a, b)]))
            better.append(gap > 0)
    PairwiseScorer(str(place.folder / "pairwise_model/model")).score(groups)
    right = [
        (float(g.responses[0].columns["preference"]) > 0.5) == first for g, first in zip(groups, better, strict=True)
    ]
    assert len(right) > 100
    assert sum(right) / len(right) > 0.8


def test_a_process_reward_model_learns_what_a_prefix_is_worth(place: Place) -> None:
    """P(right) after each word against the enumerated probability of success, on completions drawn anew."""
    more = ["data=steps", "data.path={folder}/steps.jsonl", "data.step_separator=", "training.steps=150"]
    model = place.run("process_reward_model", "algorithm=process_reward_model", "algorithm.supervise=all", *more)
    world = place.benchmark.world
    words = {f" {word}": i for i, word in enumerate(WORDS)}
    texts = dict(zip(world.prompt_texts, world.prompt_ids, strict=True))
    fresh = labelled_steps(world, 500, seed=99)
    groups = [Group(list(texts[r["prompt"]]), [Response([words[s] for s in r["steps"]])]) for r in fresh]
    logits = torch.cat(model.outputs(groups, ("step",))["step"])
    expected = torch.tensor([label for record in fresh for label in record["soft_labels"]])
    assert correlation(logits.softmax(-1)[:, 1], expected) > 0.8
