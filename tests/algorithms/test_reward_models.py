"""Reward models: margin, centring, rankings, the language-model loss, what is reported; starting points and reload."""

from __future__ import annotations

import json
import math
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from alignlab.algorithms.reward_model import RewardModel
from alignlab.core import Batch, ConfigError, Group, Outputs, Response
from alignlab.models import FullFineTuning, LoRA, ModelSettings, load_model
from alignlab.scoring import RewardModelScorer
from tests import tiny
from tests.algorithms.common import group, loss, means
from tests.components import need
from tests.training import runs


def log_sigmoid(x: float) -> float:
    return -math.log1p(math.exp(-x))


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


# Margin, centring, rankings


def test_margin_by_hand() -> None:
    """Llama 2, equation 2: the winner's 3 points ahead, a third of them wanted, so 1.5 − 1 are left."""
    pair = group({"score": 5.0}, {"score": 2.0})
    assert loss(RewardModel(margin=1 / 3), [pair], score_N=[1.25, -0.25]).tolist() == pytest.approx([-log_sigmoid(0.5)])
    metrics = RewardModel(margin=1 / 3).loss(Outputs(score_N=torch.tensor([1.25, -0.25])), Batch([pair]))[1]
    assert metrics["margin"].tolist() == [1.5], "what is reported is the model's own"


def test_a_margin_adds_loss_though_the_order_is_right() -> None:
    pair = group({"score": 1.0}, {"score": 0.0})
    metrics = RewardModel(margin=2.0).loss(Outputs(score_N=torch.tensor([1.0, 0.0])), Batch([pair]))[1]
    assert metrics["accuracy"].tolist() == [1.0]
    assert loss(RewardModel(margin=2.0), [pair], score_N=[1.0, 0.0]).item() == pytest.approx(-log_sigmoid(-1.0))


def test_centring_by_hand() -> None:
    """As TRL's `center_rewards_coefficient`: the square of the sum, not of each."""
    pairs = [group({"score": 1.0}, {"score": 0.0}), group({"score": 0.0}, {"score": 1.0})]
    found = loss(RewardModel(center=0.1), pairs, score_N=[2.0, 1.0, -3.0, 3.0])
    assert found.tolist() == pytest.approx([-log_sigmoid(1.0) + 0.1 * 9, -log_sigmoid(6.0)])


@pytest.mark.parametrize(("margin", "center"), [(0.0, None), (1.0, None), (0.5, 0.01)])
def test_the_loss_equals_trl(margin: float, center: float | None) -> None:
    """TRL's trainer on the logits of a stub."""
    trl = need("trl")
    generator = torch.Generator().manual_seed(0)
    chosen, rejected = torch.randn(2, 6, generator=generator)
    gaps = torch.rand(6, generator=generator) + 0.1
    groups = [group({"score": g}, {"score": 0.0}) for g in gaps.tolist()]
    found = RewardModel(margin, center or 0.0).loss(
        Outputs(score_N=torch.stack([chosen, rejected], 1).flatten()), Batch(groups)
    )[0]

    class Stub:
        def __call__(self, **_: Any) -> Any:
            return type("Output", (), {"logits": torch.cat([chosen, rejected])[:, None]})()

    trainer = object.__new__(trl.RewardTrainer)
    trainer.args = type("Arguments", (), {"center_rewards_coefficient": center})()
    trainer.model = type("Model", (), {"training": False})()
    trainer._metrics, trainer._total_train_tokens = {"eval": defaultdict(list)}, 0
    trainer.accelerator = type("One", (), {"gather": staticmethod(lambda x: x)})()
    trainer.accelerator.gather_for_metrics = lambda x: x
    inputs = {"attention_mask": torch.ones(12, 3), "input_ids": torch.ones(12, 3)}
    if margin:
        inputs["margin"] = margin * gaps
    theirs = trainer.compute_loss(Stub(), inputs)
    assert float(found.mean()) == pytest.approx(float(theirs), abs=1e-6)


RANKINGS = [
    group({"score": 3.0}, {"score": 2.0}, {"score": 1.0}, {"score": 0.0}),
    group({"score": 0.0}, {"score": 1.0}),
]
SCORES = [0.5, 1.5, -1.0, 0.25, 2.0, 1.75]


def test_prompts_weigh_the_same_however_many_were_ranked() -> None:
    """Ouyang et al., equation 1: six pairs of one prompt, one of another."""
    four = [(0.5, 1.5), (0.5, -1.0), (0.5, 0.25), (1.5, -1.0), (1.5, 0.25), (-1.0, 0.25)]
    first = sum(-log_sigmoid(better - worse) for better, worse in four)
    second = -log_sigmoid(1.75 - 2.0)
    by_prompt, by_pair = RewardModel(mean_over="prompts"), RewardModel()
    assert loss(by_prompt, RANKINGS, score_N=SCORES).tolist() == pytest.approx([first / 6, second])
    assert means(by_prompt, RANKINGS, [2], score_N=SCORES)["loss"] == pytest.approx((first / 6 + second) / 2)
    assert means(by_pair, RANKINGS, [2], score_N=SCORES)["loss"] == pytest.approx((first + second) / 7)
    assert (by_prompt.unit, by_pair.unit, RewardModel.unit) == ("group", "pair", "pair")


def test_prompts_without_a_preference_are_left_out() -> None:
    tie = group({"score": 1.0}, {"score": 1.0})
    kept = RewardModel(mean_over="prompts").prepare([tie, *RANKINGS])
    assert [len(g.responses) for g in kept] == [4, 2]


# The language-model loss


def test_language_model_loss_by_hand() -> None:
    """The mean over the best response's tokens, whichever it is; the loser's say nothing."""
    pair = group({"score": 0.0}, {"score": 1.0}, length=2)
    algorithm = RewardModel(lm_weight=0.5)
    outputs = {"score_N": [0.0, 2.0], "logp_T": [-9.0, -9.0, -1.0, -2.0]}
    assert loss(algorithm, [pair], **outputs).tolist() == pytest.approx([-log_sigmoid(2.0) + 0.5 * 1.5])
    assert means(algorithm, [pair], [1], **outputs)["lm_loss"] == pytest.approx(1.5)
    assert algorithm.reads == {"score", "logp"}
    assert RewardModel().reads == {"score"}, "nobody pays for log-probs that are not used"


def test_language_model_loss_of_a_ranking_is_the_best_response_s() -> None:
    ranking = group({"score": 0.0}, {"score": 2.0}, {"score": 1.0})
    logp = [-5.0, -1.0, -7.0]
    for mean_over, expected in (("pairs", [2.0] * 3), ("prompts", [2.0])):
        plain = loss(RewardModel(mean_over=mean_over), [ranking], score_N=[0.1, 0.2, 0.3])  # type: ignore[arg-type]
        both = RewardModel(mean_over=mean_over, lm_weight=2.0)  # type: ignore[arg-type]
        found = loss(both, [ranking], score_N=[0.1, 0.2, 0.3], logp_T=logp)
        assert (found - plain).tolist() == pytest.approx(expected)


def test_gradients_are_those_of_finite_differences() -> None:
    groups = [
        group({"score": 2.5}, {"score": 1.0}, {"score": 0.0}, length=2),
        group({"preference": 0.3}, {"preference": 0.7}),
    ]
    generator = torch.Generator().manual_seed(1)
    score_N = torch.randn(5, generator=generator).double().requires_grad_()
    logp_T = torch.randn(8, generator=generator).double().requires_grad_()
    for mean_over in ("pairs", "prompts"):
        algorithm = RewardModel(0.4, 0.2, mean_over, 0.7)  # type: ignore[arg-type]

        def value(s: Tensor, t: Tensor, algorithm: RewardModel = algorithm) -> Tensor:
            return algorithm.loss(Outputs(score_N=s, logp_T=t), Batch(groups))[0]

        assert torch.autograd.gradcheck(value, (score_N, logp_T))


# What is reported


def some_pairs(count: int, seed: int = 0) -> tuple[list[Group], list[float]]:
    """Pairs of responses of many lengths, and scores that have something to do with them."""
    generator = torch.Generator().manual_seed(seed)
    groups, scores = [], []
    for _ in range(count):
        lengths = torch.randint(1, 30, (2,), generator=generator).tolist()
        won = 1.0 if float(torch.rand(1, generator=generator)) < 0.7 else 0.0
        groups.append(
            Group([1], [Response([2] * n, columns={"score": s}) for n, s in zip(lengths, (won, 1 - won), strict=True)])
        )
        noise = torch.randn(2, generator=generator)
        scores += [0.05 * n + float(e) + 3 for n, e in zip(lengths, noise, strict=True)]
    assert len(groups) == count
    return groups, scores


@pytest.mark.parametrize("mean_over", ["pairs", "prompts"])
def test_metrics_do_not_depend_on_the_split(mean_over: Any) -> None:
    groups, scores = some_pairs(24)
    algorithm = RewardModel(0.5, 0.01, mean_over)
    whole = means(algorithm, groups, [24], score_N=scores)
    for splits in ([1] * 24, [5, 19], [12, 3, 9]):
        assert means(algorithm, groups, splits, score_N=scores) == pytest.approx(whole, rel=1e-6, abs=1e-9)
    assert {"calibration_error", "length_correlation", "brier", "accuracy"} <= set(whole)


def test_metrics_equal_numpy() -> None:
    import numpy as np

    groups, scores = some_pairs(40, 3)
    found = means(RewardModel(), groups, [40], score_N=scores)
    lengths = [len(r.token_ids) for g in groups for r in g.responses]
    assert found["length_correlation"] == pytest.approx(np.corrcoef(scores, lengths)[0, 1], abs=1e-6)
    confidence, right, brier = [], [], []
    for i, g in enumerate(groups):
        chance = sigmoid(scores[2 * i] - scores[2 * i + 1])  # that the first is better
        label = float(g.responses[0].columns["score"] == 1.0)
        confidence.append(max(chance, 1 - chance))
        right.append(label if chance > 0.5 else 1 - label)
        brier.append((chance - label) ** 2)
    edges = np.digitize(confidence, np.linspace(0.5, 1, 11)[1:-1])
    error = sum(
        (edges == b).mean() * abs(np.mean(np.array(right)[edges == b]) - np.mean(np.array(confidence)[edges == b]))
        for b in set(edges)
    )
    assert found["calibration_error"] == pytest.approx(error, abs=1e-6)
    assert found["brier"] == pytest.approx(np.mean(brier), abs=1e-6)
    assert found["accuracy"] == pytest.approx(np.mean(right))


def test_calibration_by_hand() -> None:
    """Two pairs at a confidence of 0.92, one of them right; one at 0.62, wrong."""
    high, low = math.log(0.92 / 0.08), math.log(0.62 / 0.38)
    pairs = [group({"score": 1.0}, {"score": 0.0}) for _ in range(3)]
    found = means(RewardModel(), pairs, [1, 2], score_N=[high, 0.0, 0.0, high, 0.0, low])
    assert found["calibration_error"] == pytest.approx(2 / 3 * 0.42 + 1 / 3 * 0.62, abs=1e-6)
    assert found["brier"] == pytest.approx((0.08**2 + 0.92**2 + 0.62**2) / 3, abs=1e-6)


def test_soft_labels_can_be_met_exactly() -> None:
    """A model that says the labels' own probabilities is calibrated; its Brier score is their variance."""
    pairs = [group({"preference": p}, {"preference": 1 - p}) for p in (0.9, 0.6, 0.2)]
    scores = [v for p in (0.9, 0.6, 0.2) for v in (math.log(p / (1 - p)), 0.0)]
    found = means(RewardModel(), pairs, [3], score_N=scores)
    assert found["calibration_error"] == pytest.approx(0.0, abs=1e-6)
    assert found["brier"] == pytest.approx((0.09 + 0.24 + 0.16) / 3, abs=1e-6)


def test_equal_lengths_or_scores_have_no_correlation() -> None:
    alike = [group({"score": 1.0}, {"score": 0.0}, length=3) for _ in range(3)]
    assert "length_correlation" not in means(RewardModel(), alike, [3], score_N=[0.1, 0.2, 0.3, 0.4, 0.5, 0.6])
    groups, _ = some_pairs(3)
    assert "length_correlation" not in means(RewardModel(), groups, [3], score_N=[0.7] * 6)
    assert RewardModel().derive({"response_length": 3.0}) == {}, "nothing was compared"


@pytest.mark.parametrize("key", ["margin", "center", "lm_weight"])
def test_values_out_of_range_are_refused_by_name(key: str) -> None:
    with pytest.raises(ConfigError, match=rf"^algorithm\.{key}=-0\.1: must be >= 0"):
        RewardModel(**{key: -0.1})  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"^algorithm\.mean_over='tokens': must be 'pairs' or 'prompts'"):
        RewardModel(mean_over="tokens")  # type: ignore[arg-type]


# From the command line to plain transformers


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, records, and the same policy fine-tuned: whole, as an adapter, and merged."""
    made = tmp_path_factory.mktemp("rewards")
    runs.prepare(made)
    for line in (lines := [json.loads(s) for s in (made / "preferences.jsonl").read_text().splitlines()]):
        line["margin"] = 0.5 + len(line["chosen"]) / 10
    (made / "preferences.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    runs.train(made, "sft", "sft", "training.steps=2")
    runs.train(made, "sft", "adapter", "training.steps=2", "adapter=lora", "adapter.r=4")
    runs.train(made, "sft", "merged", "training.steps=2", "adapter=lora", "adapter.r=4", "training.save_model=merged")
    return made


ALL = ["algorithm.margin=0.5", "algorithm.center=0.01", "algorithm.mean_over=prompts", "algorithm.lm_weight=0.1"]


@pytest.mark.parametrize("adapter", [[], ["adapter=lora", "adapter.r=4"]], ids=["full", "lora"])
def test_a_trained_reward_model_scores_alike_in_plain_transformers(folder: Path, adapter: list[str]) -> None:
    from peft import PeftModel
    from transformers import AutoModelForSequenceClassification

    out = f"reward-{len(adapter)}"
    runs.train(folder, "reward_model", out, *ALL, *adapter)
    logged = runs.metrics(folder, out)
    assert {"calibration_error", "length_correlation", "brier", "accuracy", "lm_loss", "loss"} <= set(logged[-1])
    assert not any(name.startswith("_") for name in logged[-1])
    model = folder / out / "model"
    if adapter:
        base = AutoModelForSequenceClassification.from_pretrained(folder / "base", num_labels=1, pad_token_id=tiny.PAD)
        network = PeftModel.from_pretrained(base, model).eval()
    else:
        network = AutoModelForSequenceClassification.from_pretrained(model)
    groups = tiny.some_groups()
    RewardModelScorer(str(model)).score(groups)
    for response, prompt in ((r, g.prompt_ids) for g in groups for r in g.responses):
        with torch.no_grad():
            expected = float(network(input_ids=torch.tensor([prompt + response.token_ids])).logits)
        assert response.columns["reward"] == pytest.approx(expected, abs=1e-5)


def test_the_language_model_loss_moves_the_trunk_alone(folder: Path) -> None:
    """The language head is the base's own throughout: the loss starts at the base's −log P of the winners."""
    runs.train(folder, "reward_model", "lm", "algorithm.lm_weight=10", "training.steps=30", "training.batch_size=12")
    logged = [line["lm_loss"] for line in runs.metrics(folder, "lm")]
    base = load_model(ModelSettings(path=f"{folder}/base"))
    lines = [json.loads(s) for s in (folder / "preferences.jsonl").read_text().splitlines()]
    total = 0.0
    for line in lines:
        prompt = base.tokenizer(line["prompt"], add_special_tokens=False)["input_ids"]
        answer = [*base.tokenizer(line["chosen"], add_special_tokens=False)["input_ids"], tiny.EOS]
        one = Group(prompt, [Response(answer)])
        total -= float(tiny.plain_log_probs(base.network, [one]).mean())
    assert logged[0] == pytest.approx(total / len(lines), abs=1e-4)
    assert logged[-1] < logged[0] - 0.1


@pytest.mark.parametrize("start", ["base", "sft/model", "merged/model"])
@pytest.mark.parametrize("adapter", ["none", "lora"])
def test_a_reward_model_starts_from_any_whole_policy(folder: Path, start: str, adapter: Any) -> None:
    """Its trunk is the policy's; its head is new, and the same for a seed."""
    made = [
        load_model(
            ModelSettings(path=f"{folder}/{start}"), LoRA() if adapter == "lora" else FullFineTuning(), "score", seed=3
        )
        for _ in range(2)
    ]
    policy = load_model(ModelSettings(path=f"{folder}/{start}"))
    ids = torch.tensor([[5, 6, 7, 8]])
    torch.testing.assert_close(made[0].decoder(ids).last_hidden_state, policy.decoder(ids).last_hidden_state)
    assert torch.equal(next(made[0].head.parameters()), next(made[1].head.parameters()))
    assert made[0].head.weight.shape[0] == 1


def test_a_reward_model_starts_from_a_policy_s_adapter(folder: Path) -> None:
    """Whole, it starts from the two folded into one; a new adapter would forget the old: it says what to do."""
    start = f"model.path={folder}/adapter/model"
    runs.train(folder, "reward_model", "from-adapter", start)
    with pytest.raises(ConfigError, match=r"^model\.path=.*trained as CAUSAL_LM, a score model is wanted: .*merged"):
        runs.train(folder, "reward_model", "adapter-on-adapter", start, "adapter=lora")
