"""The model that reads both responses: how a pair is written, its loss, what is reported."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from alignlab.algorithms.pairwise_model import PairwiseModel, rendering_of
from alignlab.core import AlignlabError, Batch, ConfigError, DataError, Group, Outputs, Response
from tests import tiny
from tests.algorithms.common import group, loss, means


def log_sigmoid(x: float) -> float:
    return -math.log1p(math.exp(-x))


def pairwise(separator: str = "x y", max_length: int | None = None) -> PairwiseModel:
    algorithm = PairwiseModel(separator, max_length)
    algorithm.setup(tiny.tokenizer())
    return algorithm


X, Y = (tiny.VOCABULARY.index(letter) for letter in "xy")


def two(first: list[int], second: list[int], prompt: int = 3, **columns: tuple[float, float]) -> Group:
    made = Group([5] * prompt, [Response(first, text="one"), Response(second, text="two")], "data.jsonl:7", "ask")
    for name, values in columns.items():
        for response, value in zip(made.responses, values, strict=True):
            response.columns[name] = value
    return made


def test_a_pair_is_read_in_both_orders() -> None:
    pair = two([7, 8, tiny.EOS], [9], score=(0.0, 2.0))
    before = repr(pair)
    (found,) = pairwise().arrange([pair])
    better_first, worse_first = found.responses
    assert better_first.token_ids == [9, X, Y, 7, 8, tiny.EOS], "the end of the first response stays where it is"
    assert worse_first.token_ids == [7, 8, tiny.EOS, X, Y, 9]
    assert [r.columns for r in found.responses] == [{"preference": 1.0}, {"preference": 0.0}]
    assert (found.prompt_ids, found.origin, found.prompt) == ([5, 5, 5], "data.jsonl:7", "ask")
    assert repr(pair) == before, "what was read is left as it is"
    assert repr(pairwise().arrange([pair])) == repr([found])


def test_a_ranking_becomes_all_its_pairs() -> None:
    ranking = Group([5], [Response([7 + i], columns={"score": s}) for i, s in enumerate((1.0, 3.0, 2.0, 2.0))])
    found = pairwise("x").arrange([ranking, two([7], [9], score=(1.0, 1.0))])
    texts = {tuple(g.responses[0].token_ids) for g in found}
    assert texts == {(8, X, 7), (9, X, 7), (10, X, 7), (8, X, 9), (8, X, 10)}, "better first; a tie makes no pair"


def test_over_the_limit_both_orders_are_cut_alike() -> None:
    long, short = [7] * 9, [8, 8]
    for first, second in ((long, short), (short, long)):
        (found,) = pairwise("x", 12).arrange([two(first, second, score=(1.0, 0.0))])
        kept = {tuple(sorted(r.token_ids)) for r in found.responses}
        assert kept == {tuple(sorted([7] * 6 + [8, 8] + [X]))}, "3 of the prompt, 1 between: the shorter stays whole"
    (found,) = pairwise("x", 13).arrange([two([7] * 9, [8] * 9, score=(1.0, 0.0))])
    assert found.responses[0].token_ids == [7] * 4 + [X] + [8] * 4
    (found,) = pairwise("x", 12).arrange([two([7] * 4, [8] * 4, score=(1.0, 0.0))])
    assert found.responses[0].token_ids == [7] * 4 + [X] + [8] * 4, "just fits"
    assert "no room for two responses in the 12" in str(pairwise("x", 12).check(two([7], [8], prompt=10)))
    assert pairwise("x", 12).check(two([7], [8], prompt=9)) is None
    with pytest.raises(DataError, match=r"^data\.jsonl:7: its prompt of 10 tokens leaves no room"):
        pairwise("x", 12).arrange([two([7], [8], prompt=10, score=(1.0, 0.0))])


def test_a_response_that_was_cut_is_not_finished() -> None:
    (found,) = pairwise("x", 12).arrange([two([7] * 9, [8, 8], score=(1.0, 0.0))])
    assert [r.finished for r in found.responses] == [True, False], "by what comes last"


def test_the_limit_is_the_tokenizer_s_own_and_is_saved_with_it() -> None:
    tokenizer = tiny.tokenizer()
    assert rendering_of(tokenizer, "x").limit is None, "of 10^30 tokens"
    tokenizer.model_max_length = 20
    assert rendering_of(tokenizer, "x").limit == 20
    assert rendering_of(tokenizer, "x", 15).limit == 15
    PairwiseModel("x y").setup(tokenizer)
    assert tokenizer.init_kwargs["pairwise"] == {"separator": "x y", "max_length": 20}


def test_pairwise_loss_by_hand() -> None:
    """Logits that the first is better: 2 with the better one first, 0.5 with the worse one first."""
    arranged = pairwise().arrange([two([7], [9], score=(1.0, 0.0))])
    found, metrics = pairwise().loss(Outputs(score_N=torch.tensor([2.0, 0.5])), Batch(arranged))
    assert found.tolist() == pytest.approx([(-log_sigmoid(2.0) - log_sigmoid(-0.5)) / 2])
    assert metrics["margin"].tolist() == [0.75]
    assert metrics["position_bias"].tolist() == [1.25]
    assert metrics["accuracy"].tolist() == [1.0]
    assert len(found) == Batch(arranged).count("pair")


def test_pairwise_loss_of_soft_labels() -> None:
    """P(first of the record better) = 0.2: the better one is the second, with 0.8, in both orders."""
    algorithm = pairwise()
    arranged = algorithm.arrange([two([7], [9], preference=(0.2, 0.8))])
    assert arranged[0].responses[0].token_ids == [9, X, Y, 7]
    found = loss(algorithm, arranged, score_N=[1.0, -3.0])
    cross = [-0.8 * log_sigmoid(1.0) - 0.2 * log_sigmoid(-1.0), -0.2 * log_sigmoid(-3.0) - 0.8 * log_sigmoid(3.0)]
    assert found.tolist() == pytest.approx([sum(cross) / 2])


@pytest.mark.parametrize("p", [0.5, 0.9])
def test_pairwise_gradients_and_where_they_vanish(p: float) -> None:
    algorithm = pairwise()
    arranged = algorithm.arrange([two([7], [9], preference=(p, 1 - p)), two([6], [8], score=(0.0, 1.0))])

    def value(score_N: Tensor) -> Tensor:
        return algorithm.loss(Outputs(score_N=score_N), Batch(arranged))[0]

    assert torch.autograd.gradcheck(value, (torch.tensor([0.3, -1.0, 2.0, 0.5]).double().requires_grad_(),))
    odds = math.log(p / (1 - p))
    at = torch.tensor([odds, -odds, 40.0, -40.0], dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(value(at).sum(), at)
    assert gradient.tolist() == pytest.approx([0.0] * 4, abs=1e-7), "at the labels' log-odds, of either sign"


def test_pairwise_metrics_do_not_depend_on_the_split() -> None:
    algorithm = pairwise()
    groups = algorithm.arrange([two([7] * (1 + i % 3), [9], score=(i % 2, 0.5)) for i in range(10)])
    scores = torch.randn(20, generator=torch.Generator().manual_seed(0)).tolist()
    whole = means(algorithm, groups, [10], score_N=scores)
    for splits in ([1] * 10, [3, 7]):
        assert means(algorithm, groups, splits, score_N=scores) == pytest.approx(whole, rel=1e-6, abs=1e-9)
    assert "calibration_error" in whole


def test_the_pairwise_model_refuses_what_it_cannot_read() -> None:
    with pytest.raises(ConfigError, match=r"^algorithm\.separator='  ': has no tokens"):
        pairwise("  ")
    with pytest.raises(ConfigError, match=r"^algorithm\.max_length=3: must be at least 4"):
        PairwiseModel(max_length=3)
    with pytest.raises(AlignlabError, match="setup"):
        PairwiseModel().arrange([two([7], [8], score=(1.0, 0.0))])
    assert "at least 2 responses" in str(pairwise().check(group({})))
