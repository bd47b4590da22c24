"""AdamW with its state in 8 bits, or paged: what torch's own AdamW does, to what the state's precision allows."""

from __future__ import annotations

import io
from typing import Any

import pytest
import torch
from torch import Tensor

from alignlab.config import compose, resolve
from alignlab.training.optimizer import build_optimizer, parameter_groups
from tests import components

components.need("bitsandbytes")
pytestmark = pytest.mark.component

LARGE, SMALL = (128, 64), (64, 63)
"""Shapes on either side of the 4096 elements from which on the state is in 8 bits."""

BITS = {"adamw_8bit": 8, "paged_adamw_8bit": 8, "paged_adamw": 32}


def made(name: str, *words: str) -> tuple[list[torch.nn.Parameter], torch.optim.Optimizer]:
    """Parameters of both sizes and a vector, and the optimiser of that config on them."""
    generator = torch.Generator().manual_seed(0)
    parameters = [torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in (LARGE, SMALL, (64,))]
    config = resolve(compose("train", [f"optimizer={name}", "model.path=m", "optimizer.lr=0.01", *words]))
    return parameters, build_optimizer(config["optimizer"], parameter_groups(parameters))


def steps(parameters: list[torch.nn.Parameter], optimizer: torch.optim.Optimizer, first: int, last: int) -> None:
    """With gradients that are half the same at each step, half noise."""
    for step in range(first, last):
        for i, parameter in enumerate(parameters):
            fixed, own = torch.Generator().manual_seed(i), torch.Generator().manual_seed(100 * step + i)
            steady, noise = (torch.randn(parameter.shape, generator=g) for g in (fixed, own))
            parameter.grad = steady + noise
        optimizer.step()


def moved(parameters: list[torch.nn.Parameter]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [p.detach() - torch.randn(p.shape, generator=generator) for p in parameters]


@pytest.mark.parametrize("decay", [0.0, 0.1])
@pytest.mark.parametrize("name", BITS)
def test_it_goes_where_torch_s_adamw_goes(name: str, decay: float) -> None:
    """In 32 bits to rounding. In 8 bits a number of the state is off by up to 0.9/64/2 of the largest in its block of
    256, and by up to a twentieth of itself in the decade below that: rounding, not bias, most of which averages out
    over 20 steps. Small tensors have theirs in 32 bits."""
    found, expected = [], []
    for which, into in ((name, found), ("adamw", expected)):
        parameters, optimizer = made(which, f"optimizer.weight_decay={decay}")
        steps(parameters, optimizer, 0, 20)
        into += moved(parameters)
    for mine, theirs, shape in zip(found, expected, (LARGE, SMALL, (64,)), strict=True):
        error = float((mine - theirs).norm() / theirs.norm())
        if BITS[name] == 8 and shape == LARGE:
            assert 1e-4 < error < 0.05
        else:
            assert error < 1e-5


@pytest.mark.parametrize("name", BITS)
def test_its_state_has_the_precision_it_says(name: str) -> None:
    parameters, optimizer = made(name)
    steps(parameters, optimizer, 0, 1)
    kinds = [optimizer.state[p]["state1"].dtype for p in parameters]
    assert kinds == [torch.uint8 if BITS[name] == 8 else torch.float32, torch.float32, torch.float32]


@pytest.mark.parametrize("name", BITS)
def test_it_goes_on_bit_for_bit_from_its_saved_state(name: str) -> None:
    parameters, optimizer = made(name)
    steps(parameters, optimizer, 0, 10)
    other, resumed = made(name)
    buffer: Any = io.BytesIO()
    steps(other, resumed, 0, 4)
    torch.save([resumed.state_dict(), [p.detach() for p in other]], buffer)
    buffer.seek(0)
    state, weights = torch.load(buffer, weights_only=True)
    later, again = made(name)
    with torch.no_grad():
        for parameter, weight in zip(later, weights, strict=True):
            parameter.copy_(weight)
    again.load_state_dict(state)
    steps(later, again, 4, 10)
    assert all(torch.equal(a, b) for a, b in zip(parameters, later, strict=True))
