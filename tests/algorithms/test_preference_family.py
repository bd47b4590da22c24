"""DPO's relatives: IPO, the hinge of RSO, ORPO and SimPO. Hand arithmetic, published values, and their properties."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from alignlab.algorithms.dpo import DPO, dpo_loss
from alignlab.algorithms.hinge import Hinge, hinge_loss
from alignlab.algorithms.ipo import IPO, ipo_loss
from alignlab.algorithms.orpo import ORPO, log_odds, orpo_loss
from alignlab.algorithms.preferences import PairAlgorithm
from alignlab.algorithms.rrhf import RRHF
from alignlab.algorithms.simpo import SimPO, simpo_loss
from alignlab.algorithms.slic import SLiC
from alignlab.core import Algorithm, Batch, ConfigError, Outputs
from tests.algorithms.common import group
from tests.algorithms.ragged import Made, found, made, run

FAMILY = [DPO(), IPO(), Hinge(), ORPO(), SimPO(), SLiC(delta=5.0)]


def log_sigmoid(x: float) -> float:
    return -math.log1p(math.exp(-x))


def name(algorithm: Algorithm) -> str:
    return type(algorithm).__name__


def pair(winner: dict[str, float] | None = None, loser: dict[str, float] | None = None) -> Made:
    """Winner: 2 tokens, log-prob −2.5, reference −3. Loser: 4 tokens, −6, reference −4."""
    return made(
        ([-1.5, -1.0], {"ref_logp": [-1.0, -2.0], **(winner or {"score": 1.0})}),
        ([-2.0, -1.0, -1.0, -2.0], {"ref_logp": [-1.0] * 4, **(loser or {"score": 0.0})}),
    )


def test_ipo_by_hand() -> None:
    """Ratios per token: 0.5 / 2 and −2 / 4, so that h = 0.75; the aim is 1 / (2·0.25) = 2."""
    losses, metrics = run(IPO(beta=0.25), pair())
    assert losses.tolist() == pytest.approx([(0.75 - 2.0) ** 2])
    assert metrics["margin"].tolist() == pytest.approx([0.75])
    assert metrics["reward_winner"].tolist() == pytest.approx([0.25])
    assert metrics["reward_loser"].tolist() == pytest.approx([-0.5])


def test_ipo_of_the_reference_itself_is_finite() -> None:
    """h = 0, so the loss is 1 / (4·beta²) and each token of the winner is pulled by −1 / beta / length."""
    same: dict[str, Any] = {"ref_logp": [-1.0, -0.5]}
    both = made(([-1.0, -0.5], {"score": 1.0, **same}), ([-1.0, -0.5], {"score": 0.0, **same}))
    assert found(IPO(beta=0.1), both) == [25.0]
    margin = torch.zeros(1, dtype=torch.float64, requires_grad=True)
    value = ipo_loss(margin, 0.1)
    value.sum().backward()
    assert margin.grad is not None
    assert margin.grad.tolist() == pytest.approx([-10.0])


@pytest.mark.parametrize("times", [2, 5])
def test_ipo_averages_over_tokens(times: int) -> None:
    """The same ratio per token over a longer response is the same loss."""
    one = made(([-1.0], {"score": 1.0, "ref_logp": [-2.0]}), ([-3.0], {"score": 0.0, "ref_logp": [-2.5]}))
    many = made(
        ([-1.0] * times, {"score": 1.0, "ref_logp": [-2.0] * times}),
        ([-3.0], {"score": 0.0, "ref_logp": [-2.5]}),
    )
    assert found(IPO(), one) == pytest.approx([(1.5 - 5.0) ** 2])
    assert found(IPO(), many) == pytest.approx([(1.5 - 5.0) ** 2])


def test_hinge_by_hand() -> None:
    """Ratios 0.5 and −2: a margin of 2.5."""
    losses, metrics = run(Hinge(gamma=0.1), pair())
    assert losses.tolist() == pytest.approx([0.75])
    assert metrics["margin"].tolist() == pytest.approx([0.25])
    assert metrics["active"].tolist() == [1.0]
    losses, metrics = run(Hinge(gamma=0.5), pair())
    assert losses.tolist() == metrics["active"].tolist() == [0.0], "enough is enough"


def test_hinge_equals_torchtune(published: dict[str, dict[str, Any]]) -> None:
    """Its fixture has the inputs of that of DPO."""
    fixture, inputs = published["rso_hinge_loss_torchtune"], published["dpo_loss_torchtune"]["inputs"]
    pc, pr, rc, rr = (torch.tensor(inputs[k]) for k in ("pc", "pr", "rc", "rr"))
    margin_P = (pc - rc) - (pr - rr)
    losses = hinge_loss(margin_P, fixture["inputs"]["gamma"])
    assert losses.tolist() == pytest.approx(fixture["expected"], abs=fixture["atol"])


def test_orpo_by_hand() -> None:
    """Mean log-probs −1.25 and −1.5."""
    losses, metrics = run(ORPO(ratio_weight=0.5), pair())
    p, q = math.exp(-1.25), math.exp(-1.5)
    ratio = math.log(p / (1 - p)) - math.log(q / (1 - q))
    assert losses.tolist() == pytest.approx([1.25 - 0.5 * log_sigmoid(ratio)])
    assert metrics["margin"].tolist() == pytest.approx([ratio])
    assert metrics["nll"].tolist() == pytest.approx([1.25])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_log_odds_are_exact_near_one_and_near_zero(dtype: torch.dtype) -> None:
    """Near p = 1, log p ≈ −(1 − p), so that the log-odds are −log(1 − p); near p = 0 they are log p."""
    small = [1e-3, 1e-5] if dtype == torch.float32 else [1e-3, 1e-8, 1e-14]
    near_one = torch.tensor([-s for s in small], dtype=dtype)
    expected = [math.log(math.exp(-s)) - math.log(-math.expm1(-s)) for s in small]
    assert log_odds(near_one).tolist() == pytest.approx(expected, rel=1e-5)
    assert log_odds(torch.tensor([-50.0, -1e4], dtype=dtype)).tolist() == pytest.approx([-50.0, -1e4])
    assert float(log_odds(torch.tensor(-math.log(2), dtype=dtype))) == pytest.approx(0.0, abs=1e-6)


def test_orpo_has_finite_gradients_at_certainty() -> None:
    """Log-probs of exactly 0 happen: a model is sure of its only token."""
    values = torch.tensor([0.0, -1e-9, -0.7, -200.0], requires_grad=True)
    losses = orpo_loss(values, values.flip(0), 1.0)
    losses.sum().backward()
    assert bool(torch.isfinite(losses).all())
    assert values.grad is not None
    assert bool(torch.isfinite(values.grad).all())


def test_simpo_by_hand() -> None:
    losses, metrics = run(SimPO(beta=2.0, gamma=0.3), pair())
    assert losses.tolist() == pytest.approx([-log_sigmoid(2.0 * (-1.25 + 1.5) - 0.3)])
    assert metrics["reward_winner"].tolist() == pytest.approx([-2.5])
    assert metrics["reward_loser"].tolist() == pytest.approx([-3.0])


def test_simpo_mirrors_the_whole_logit_for_a_soft_label() -> None:
    """u = 2·0.3 − 1 = −0.4: 0.9·−log σ(−0.4) + 0.1·−log σ(0.4) = 0.9·0.91302 + 0.1·0.51302, as the authors' label
    smoothing. Mirroring the margin alone would give 1.0001."""
    found = simpo_loss(torch.tensor([0.3], dtype=torch.float64), beta=2.0, gamma=1.0, probability_P=0.9)
    assert found.tolist() == pytest.approx([0.87302], abs=1e-5)


@pytest.mark.parametrize("algorithm", [SimPO(), ORPO(), SLiC(), RRHF()], ids=name)
def test_the_loss_does_not_depend_on_a_reference_that_is_not_needed(algorithm: Algorithm) -> None:
    """The same with another reference, and with none at all."""
    other = pair({"score": 1.0}, {"score": 0.0})
    for response in other.group.responses:
        response.columns["ref_logp"] = [-9.0] * len(response.token_ids)
    none = pair()
    for response in none.group.responses:
        del response.columns["ref_logp"]
    assert found(algorithm, pair()) == found(algorithm, other) == found(algorithm, none)
    assert algorithm.needs == ()


@pytest.mark.parametrize("algorithm", FAMILY, ids=name)
def test_the_winner_is_known_by_its_score_not_its_place(algorithm: Algorithm) -> None:
    there = pair()
    swapped = Made(there.group.with_responses(there.group.responses[::-1]), there.logp[::-1])
    assert found(algorithm, there) == pytest.approx(found(algorithm, swapped))
    other = pair({"score": 0.0}, {"score": 1.0})
    assert found(algorithm, other) != pytest.approx(found(algorithm, there))


@pytest.mark.parametrize("algorithm", FAMILY, ids=name)
def test_a_better_winner_is_a_smaller_loss(algorithm: Algorithm) -> None:
    logp = torch.tensor([-1.5, -1.0, -2.0, -1.0, -1.0, -2.0], dtype=torch.float64, requires_grad=True)
    losses, _ = algorithm.loss(Outputs(logp_T=logp), Batch([pair().group]))
    (gradient,) = torch.autograd.grad(losses.sum(), logp)
    assert bool((gradient[:2] < 0).all())
    assert bool((gradient[2:] > 0).all())


@pytest.mark.parametrize("algorithm", [*(a for a in FAMILY if not isinstance(a, SimPO)), RRHF()], ids=name)
def test_a_soft_label_is_the_mean_over_both_orders(algorithm: Algorithm) -> None:
    """Every relative takes the probability that the winner is preferred, and none drops it."""
    p = 0.8
    there = found(algorithm, pair({"preference": 1.0}, {"preference": 0.0}))[0]
    back = found(algorithm, pair({"preference": 0.0}, {"preference": 1.0}))[0]
    soft = found(algorithm, pair({"preference": p}, {"preference": 1 - p}))[0]
    if isinstance(algorithm, SLiC | RRHF):  # the response imitated is the likelier winner whatever the probability
        weight = algorithm.sft_weight
        there, back, soft = there - weight * 2.5, back - weight * 6.0, soft - weight * 2.5
    assert there != pytest.approx(back)
    assert soft == pytest.approx(p * there + (1 - p) * back)


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.4])
@pytest.mark.parametrize("labels", ["score", "preference", "lost_to", "reward"])
def test_label_smoothing_reaches_every_kind_of_label(labels: str, smoothing: float) -> None:
    """P(winner preferred) is 0.8 where the label says so, else 1, before a label is flipped."""
    columns: dict[str, tuple[dict[str, float], dict[str, float]]] = {
        "score": ({"score": 3.0}, {"score": 1.0}),
        "preference": ({"preference": 0.8}, {"preference": 0.2}),
        "lost_to": ({"lost_to": -1.0}, {"lost_to": 0.0}),
        "reward": ({"reward": 0.5}, {"reward": 0.25}),
    }
    p = 0.8 if labels == "preference" else 1.0
    sure = p * (1 - smoothing) + (1 - p) * smoothing
    expected = -sure * log_sigmoid(0.2 * 2.5) - (1 - sure) * log_sigmoid(-0.2 * 2.5)
    assert found(DPO(0.2, smoothing), pair(*columns[labels])) == pytest.approx([expected])
    margin = torch.tensor([2.5], dtype=torch.float64)
    assert dpo_loss(margin, 0.2, p, smoothing).tolist() == pytest.approx([expected])


def test_ipo_of_a_soft_label_aims_at_less() -> None:
    """Least where h = (2p − 1) / (2·beta)."""
    best = (2 * 0.7 - 1) / (2 * 0.25)
    margin = torch.tensor([best, best + 0.1, best - 0.1], dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(ipo_loss(margin, 0.25, 0.7).sum(), margin)
    assert gradient.tolist() == pytest.approx([0.0, 0.2, -0.2], abs=1e-12)


@pytest.mark.parametrize(
    "function",
    [lambda m: hinge_loss(m, 1.0), lambda m: simpo_loss(m, 1.0, 0.5), lambda m: dpo_loss(m, 1.0)],
    ids=["hinge", "simpo", "dpo"],
)
def test_large_margins_stay_finite(function: Any) -> None:
    margin: Tensor = torch.tensor([-1e4, 1e4], requires_grad=True)
    value = function(margin)
    value.sum().backward()
    assert value.tolist() == pytest.approx([1e4, 0.0], rel=1e-3)
    assert margin.grad is not None
    assert margin.grad.tolist() == pytest.approx([-1.0, 0.0])


def test_a_single_response_is_refused() -> None:
    for algorithm in FAMILY:
        assert isinstance(algorithm, PairAlgorithm)
        assert algorithm.check(group({}, {})) is None
        assert (
            str(algorithm.check(group({})))
            == f"{name(algorithm)} needs at least 2 responses to a prompt; this record has 1"
        )
        assert algorithm.unit == "pair"
    for algorithm in (DPO(), IPO(), Hinge()):
        assert algorithm.needs == ("ref_logp",)


@pytest.mark.parametrize(
    ("kind", "settings"),
    [(IPO, {"beta": 0.0}), (Hinge, {"gamma": 0.0}), (ORPO, {"ratio_weight": 0.0}), (SimPO, {"beta": -1.0}),
     (SimPO, {"gamma": -0.1})],
)  # fmt: skip
def test_values_out_of_range_are_refused_by_name(kind: Any, settings: dict[str, float]) -> None:
    (key,) = settings
    with pytest.raises(ConfigError, match=rf"^algorithm\.{key}="):
        kind(**settings)
