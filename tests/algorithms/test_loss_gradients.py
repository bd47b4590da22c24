"""Every preference and ranking loss: its gradient against finite differences, and the same however the batch is cut."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from alignlab.algorithms.dpo import DPO, dpo_loss
from alignlab.algorithms.hinge import Hinge, hinge_loss
from alignlab.algorithms.ipo import IPO, ipo_loss
from alignlab.algorithms.kto import KTO, kto_loss
from alignlab.algorithms.orpo import ORPO, orpo_loss
from alignlab.algorithms.rrhf import RRHF, rrhf_loss
from alignlab.algorithms.simpo import SimPO, simpo_loss
from alignlab.algorithms.slic import SLiC, slic_loss
from alignlab.core import Algorithm, Batch, Group, Outputs, Response, aggregate

MARGINS = [-40.0, -1.25, 0.25, 0.5, 40.0]
"""None at a kink of a hinge."""
SURE = torch.tensor([1.0, 0.7, 0.5, 1.0, 0.9], dtype=torch.float64)
GROUP_P = torch.tensor([0, 0, 1, 1, 1])
BEST_G = torch.tensor([-3.0, -1.0], dtype=torch.float64)

LOSSES: dict[str, Callable[[Tensor, Any], Tensor]] = {
    "dpo": lambda m, p: dpo_loss(m, 0.3, p, 0.1),
    "ipo": lambda m, p: ipo_loss(m, 0.3, p),
    "hinge": lambda m, p: hinge_loss(m, 0.3, p),
    "simpo": lambda m, p: simpo_loss(m, 2.0, 0.7, p),
    "orpo": lambda m, p: orpo_loss(-m.abs() - 0.01, -0.5 * m.abs() - 0.3, 0.5, p),
    "slic": lambda m, p: slic_loss(m, 0.1 * m - 2.0, 1.0, 0.5, p),
    "rrhf": lambda m, p: rrhf_loss(m, GROUP_P, BEST_G, 0.5, p),
    "kto": lambda m, p: kto_loss(m, torch.full_like(m, 0.4), torch.tensor([1, 0, 0, 1, 1]), 0.3, (1.0, 2.0)),
}


@pytest.mark.parametrize("probability", [1.0, SURE], ids=["certain", "soft"])
@pytest.mark.parametrize("name", LOSSES)
def test_gradients_are_those_of_finite_differences(name: str, probability: float | Tensor) -> None:
    margin = torch.tensor(MARGINS, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda m: LOSSES[name](m, probability), (margin,))


def test_gradients_with_respect_to_the_best_response() -> None:
    best = BEST_G.clone().requires_grad_()
    margin = torch.tensor(MARGINS, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda b: rrhf_loss(margin, GROUP_P, b, 0.5), (best,))
    target = torch.tensor(MARGINS, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda t: slic_loss(margin, t, 1.0, 0.5), (target,))


ALGORITHMS = {
    "dpo": DPO(0.3, 0.1),
    "ipo": IPO(),
    "hinge": Hinge(0.3),
    "simpo": SimPO(),
    "orpo": ORPO(),
    "slic": SLiC(sft_weight=0.5),
    "slic_data": SLiC(sft_weight=0.5, target="data"),
    "rrhf": RRHF(),
    "kto": KTO(weight_undesirable=1.5),
}
ALGORITHMS["kto"].state = {"z_ref": 0.25}  # of an iteration before: these groups have no mismatched responses


def groups() -> list[Group]:
    """Scores of two and three responses (a tie among them), a soft label, a tournament, rewards beside a record's own
    response: 13 responses of 1 to 4 tokens, some of which bear no loss."""
    generator = torch.Generator().manual_seed(3)
    ranks: list[list[dict[str, float]]] = [
        [{"score": 0.0}, {"score": 1.0}],
        [{"score": 2.0}, {"score": 2.0}, {"score": 0.0}],
        [{"preference": 0.3}, {"preference": 0.7}],
        [{}, {"lost_to": 2.0}, {"lost_to": -1.0}],
        [{}, {"reward": 1.0}, {"reward": 0.25}],
    ]
    found = []
    for i, columns in enumerate(ranks):
        responses = []
        for k, known in enumerate(columns):
            length = 1 + (i + k) % 4
            mask = [True, *([False] * (length - 2)), True][-length:] if length == 4 else None
            source = "data" if k == 0 or i < 3 else "policy"
            response = Response([2] * length, mask, dict(known), source=source)
            for column in ("ref_logp", "old_logp"):
                values = -2 * torch.rand(response.loss_tokens, generator=generator)
                response.columns[column] = values.tolist()
            responses.append(response)
        found.append(Group([i + 1], responses, f"data.jsonl:{i + 1}", columns={"z_ref": 0.25}))
    return found


def prepared(algorithm: Algorithm) -> list[Group]:
    return algorithm.prepare(groups())


def log_probs(chosen: list[Group]) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return -3 * torch.rand(sum(r.loss_tokens for g in chosen for r in g.responses), generator=generator).double()


@pytest.mark.parametrize("name", ALGORITHMS)
def test_gradients_through_the_classes(name: str) -> None:
    algorithm = ALGORITHMS[name]
    chosen = prepared(algorithm)
    assert torch.autograd.gradcheck(
        lambda logp_T: algorithm.loss(Outputs(logp_T=logp_T), Batch(chosen))[0],
        (log_probs(chosen).requires_grad_(),),
    )


@pytest.mark.parametrize("name", ALGORITHMS)
def test_the_mean_does_not_depend_on_the_split_of_the_batch(name: str) -> None:
    """Loss and gradient, summed over micro-batches of any sizes; one loss for each of the unit, finite metrics."""
    algorithm = ALGORITHMS[name]
    chosen = prepared(algorithm)
    units = Batch(chosen).count(algorithm.unit)
    results = []
    for size in (len(chosen), 2, 1):
        logp = log_probs(chosen).requires_grad_()
        start, total = 0, 0.0
        for i in range(0, len(chosen), size):
            batch = Batch(chosen[i : i + size])
            found, metrics = algorithm.loss(Outputs(logp_T=logp[start : start + batch.T]), batch)
            assert found.shape == (batch.count(algorithm.unit),)
            assert all(bool(torch.isfinite(m).all()) for m in metrics.values())
            value = aggregate(found, units)
            value.backward()
            start, total = start + batch.T, total + float(value.detach())
        assert logp.grad is not None
        results.append((total, logp.grad.tolist()))
    for total, gradient in results[1:]:
        assert total == pytest.approx(results[0][0])
        assert gradient == pytest.approx(results[0][1])
