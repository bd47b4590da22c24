"""DPO and reward models: hand arithmetic, published values, finite differences, and what they are made from."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from alignlab.algorithms.dpo import DPO, dpo_loss
from alignlab.algorithms.reward_model import RewardModel, bradley_terry_loss
from alignlab.core import AlignlabError, Batch, ConfigError, Outputs, aggregate
from alignlab.models import PackedModel
from alignlab.scoring import fill_log_probs
from tests import tiny
from tests.algorithms.common import group, loss


def log_sigmoid(x: float) -> float:
    return -math.log1p(math.exp(-x))


def test_dpo_by_hand() -> None:
    """Ratios of π to π_ref, summed over tokens: +0.5 and −1.5; β = 0.2, so the margin is 0.4."""
    pair = group({"score": 1.0, "ref_logp": [-1.0, -2.0]}, {"score": 0.0, "ref_logp": [-1.0, -1.0]}, length=2)
    found, metrics = DPO(beta=0.2).loss(Outputs(logp_T=torch.tensor([-1.5, -1.0, -2.5, -1.0])), Batch([pair]))
    assert found.tolist() == pytest.approx([math.log(1 + math.exp(-0.4))])
    assert metrics["margin"].tolist() == pytest.approx([0.4])
    assert metrics["reward_winner"].tolist() == pytest.approx([0.1])
    assert metrics["reward_loser"].tolist() == pytest.approx([-0.3])
    assert metrics["accuracy"].tolist() == [1.0]


def test_dpo_knows_the_winner_by_its_score_not_its_place() -> None:
    worse_first = group({"score": 0.0, "ref_logp": [-1.0]}, {"score": 1.0, "ref_logp": [-1.0]})
    assert loss(DPO(beta=1.0), [worse_first], logp_T=[-3.0, -1.0]).tolist() == pytest.approx([-log_sigmoid(2.0)])


def test_dpo_loss_equals_torchtune(published: dict[str, dict[str, Any]]) -> None:
    fixture = published["dpo_loss_torchtune"]
    pc, pr, rc, rr = (torch.tensor(fixture["inputs"][k]) for k in ("pc", "pr", "rc", "rr"))
    found = dpo_loss((pc - rc) - (pr - rr), fixture["inputs"]["beta"])
    assert found.tolist() == pytest.approx(fixture["expected"], abs=fixture["atol"])


@pytest.mark.parametrize("name", ["dpo_loss_tunix_ls0", "dpo_loss_tunix_ls0.3"])
def test_dpo_of_whole_groups_equals_tunix(name: str, published: dict[str, dict[str, Any]]) -> None:
    """Per-token log-probs in, the global mean out; label smoothing through the class."""
    fixture = published[name]
    rng = np.random.RandomState(0)
    logp, ref = (rng.normal(0, 5, (8, 4)) for _ in range(2))
    pairs = [
        group(
            {"score": 1.0, "ref_logp": ref[i].tolist()},
            {"score": 0.0, "ref_logp": ref[i + 4].tolist()},
            length=4,
        )
        for i in range(4)
    ]
    algorithm = DPO(fixture["inputs"]["beta"], fixture["inputs"]["label_smoothing"])
    order = [i + k for i in range(4) for k in (0, 4)]
    found = loss(algorithm, pairs, logp_T=logp[order].flatten().tolist())
    assert float(aggregate(found, Batch(pairs).count("pair"))) == pytest.approx(
        fixture["expected"], abs=fixture["atol"]
    )


def test_bradley_terry_by_hand() -> None:
    assert bradley_terry_loss(torch.tensor([0.0, 2.0, -1.0])).tolist() == pytest.approx(
        [math.log(2), -log_sigmoid(2.0), -log_sigmoid(-1.0)]
    )
    soft = float(bradley_terry_loss(torch.tensor([2.0]), torch.tensor([0.75])))
    assert soft == pytest.approx(-0.75 * log_sigmoid(2.0) - 0.25 * log_sigmoid(-2.0))


def test_reward_model_of_a_ranking_has_all_its_pairs() -> None:
    """Four responses with a tie: five pairs, one from another group."""
    groups = [
        group({"score": 3.0}, {"score": 1.0}, {"score": 1.0}, {"score": 0.0}),
        group({"score": 0.0}, {"score": 5.0}),
    ]
    scores = [2.0, 0.5, -1.0, 0.25, 7.0, 7.5]
    found, metrics = RewardModel().loss(Outputs(score_N=torch.tensor(scores)), Batch(groups))
    margins = [2.0 - 0.5, 2.0 + 1.0, 2.0 - 0.25, 0.5 - 0.25, -1.0 - 0.25, 7.5 - 7.0]
    assert metrics["margin"].tolist() == pytest.approx(margins)
    assert found.tolist() == pytest.approx([-log_sigmoid(m) for m in margins])
    assert metrics["accuracy"].tolist() == [1, 1, 1, 1, 0, 1]
    assert metrics["score"].tolist() == scores


def test_dpo_of_a_ranking_has_all_its_pairs() -> None:
    ranking = group(*({"score": s, "ref_logp": [-1.0]} for s in (2.0, 0.0, 1.0)))
    logp = [-0.5, -2.0, -1.25]
    margins = [1.5, 0.75, 0.75]  # (0, 1), (0, 2), (2, 1)
    found = loss(DPO(beta=2.0), [ranking], logp_T=logp)
    assert found.tolist() == pytest.approx([-log_sigmoid(2 * m) for m in margins])


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_soft_labels_by_hand(smoothing: float) -> None:
    """P(first preferred) = 0.2: the second wins with 0.8, or, where a label may be flipped, a little less."""
    pair = group({"preference": 0.2, "ref_logp": [-1.0]}, {"preference": 0.8, "ref_logp": [-1.0]})
    sure = 0.8 * (1 - smoothing) + 0.2 * smoothing
    margin = 0.5 * ((-3.0 + 1.0) - (-1.5 + 1.0))  # of the second
    expected = -sure * log_sigmoid(-margin) - (1 - sure) * log_sigmoid(margin)
    assert loss(DPO(0.5, smoothing), [pair], logp_T=[-3.0, -1.5]).tolist() == pytest.approx([expected])
    if not smoothing:
        assert loss(RewardModel(), [pair], score_N=[-1.0, -0.25]).tolist() == pytest.approx([expected])


@pytest.mark.parametrize("p", [0.5, 0.7, 0.9])
def test_the_loss_is_least_at_the_log_odds_of_a_soft_label(p: float) -> None:
    """The loss is least where the margin is the log-odds of the label; at even odds, zero."""
    best = math.log(p / (1 - p))
    margin = torch.tensor([best, best + 0.5, best - 0.5], dtype=torch.float64, requires_grad=True)
    value = bradley_terry_loss(margin, p)
    (gradient,) = torch.autograd.grad(value.sum(), margin)
    assert float(gradient[0]) == pytest.approx(0.0, abs=1e-12)
    assert gradient[1] > 0 > gradient[2]
    assert value[0] < value[1]
    assert value[0] < value[2]
    assert float(dpo_loss(margin[:1] / 0.1, 0.1, p)) == pytest.approx(float(value[0].detach()))


@pytest.mark.parametrize("probability", [1.0, 0.7])
@pytest.mark.parametrize("function", [lambda m, p: dpo_loss(m, 0.3, p), bradley_terry_loss], ids=["dpo", "reward"])
def test_gradients_are_those_of_finite_differences(function: Any, probability: float) -> None:
    margin = torch.tensor([-40.0, -1.0, 0.0, 0.5, 40.0], dtype=torch.float64, requires_grad=True)
    sure = torch.full((5,), probability, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda m: function(m, sure), (margin,))


def test_gradients_through_the_classes() -> None:
    groups = [
        group({"score": 1.0, "ref_logp": [-1.0, -2.0]}, {"score": 0.0, "ref_logp": [-3.0, -1.0]}, length=2),
        group(*({"score": s, "ref_logp": [-1.0, -1.0]} for s in (0.0, 2.0, 2.0)), length=2),
    ]

    def dpo(logp_T: Tensor) -> Tensor:
        return DPO(0.4, 0.1).loss(Outputs(logp_T=logp_T), Batch(groups))[0]

    def reward(score_N: Tensor) -> Tensor:
        return RewardModel().loss(Outputs(score_N=score_N), Batch(groups))[0]

    generator = torch.Generator().manual_seed(0)
    assert torch.autograd.gradcheck(dpo, (torch.randn(10, generator=generator).double().requires_grad_(),))
    assert torch.autograd.gradcheck(reward, (torch.randn(5, generator=generator).double().requires_grad_(),))


def test_large_margins_stay_finite() -> None:
    margin = torch.tensor([-1e4, 1e4], requires_grad=True)
    value = bradley_terry_loss(margin)
    assert value.tolist() == pytest.approx([1e4, 0.0])
    value.sum().backward()
    assert margin.grad is not None
    assert margin.grad.tolist() == pytest.approx([-1.0, 0.0])


@pytest.mark.parametrize("name", ["llama", "bloom"])
def test_dpo_of_the_reference_itself_is_log_2(name: str) -> None:
    """Before the first step policy and reference are the same to the last bit: rewards are 0, not nearly 0."""
    model: PackedModel = tiny.model(name)
    model.layout = "packed" if name == "llama" else "plain"
    groups = tiny.groups([(5, [3, 4]), (7, [2, 6]), (2, [1, 1])])
    for pair in groups:
        for response, score in zip(pair.responses, (1.0, 0.0), strict=True):
            response.columns["score"] = score
    fill_log_probs(model, groups, "ref_logp", 10_000)
    outputs = Outputs(**model(model.lay_out(groups)))
    found, metrics = DPO(beta=5.0).loss(outputs, Batch(groups))
    assert found.tolist() == pytest.approx([math.log(2)] * 3, abs=1e-7)
    for key in ("margin", "reward_winner", "reward_loser", "accuracy"):
        assert metrics[key].tolist() == [0.0] * 3


def test_a_single_response_is_refused() -> None:
    for algorithm in (DPO(), RewardModel()):
        assert algorithm.check(group({}, {})) is None
        assert "at least 2 responses" in str(algorithm.check(group({})))
        assert algorithm.unit == "pair"
    assert RewardModel().model == "score"
    assert "ref_logp" in DPO().needs


def test_missing_columns_are_named_with_their_record() -> None:
    unlabelled = group({"ref_logp": [-1.0]}, {"ref_logp": [-1.0]})
    for algorithm, outputs in ((DPO(), {"logp_T": [0.0, 0.0]}), (RewardModel(), {"score_N": [0.0, 0.0]})):
        with pytest.raises(AlignlabError, match=r"^data\.jsonl:3: preference pairs need a 'score'"):
            loss(algorithm, [unlabelled], **outputs)
    with pytest.raises(AlignlabError, match=r"^data\.jsonl:3: no column 'ref_logp'"):
        loss(DPO(), [group({"score": 1.0}, {"score": 0.0})], logp_T=[0.0, 0.0])


@pytest.mark.parametrize(
    ("settings", "key"),
    [({"beta": 0.0}, "beta=0.0"), ({"beta": -1.0}, "beta"), ({"label_smoothing": 0.5}, "label_smoothing=0.5"),
     ({"label_smoothing": -0.1}, "label_smoothing")],
)  # fmt: skip
def test_values_out_of_range_are_refused_by_name(settings: dict[str, float], key: str) -> None:
    with pytest.raises(ConfigError, match=rf"^algorithm\.{key}"):
        DPO(**settings)
