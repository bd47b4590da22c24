"""The fused LoRA layer computes what PEFT's does, values and gradients, and leaves to PEFT what it cannot do."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import Linear
from torch import Tensor, nn

from alignlab.models import lora
from alignlab.models.adapters import adapter_in_use, copy_adapter
from alignlab.models.lora import FusedLinear, fuse, merged


class Net(nn.Module):
    def __init__(self, bias: bool) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(12, 20, bias=bias), nn.Linear(20, 7, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.two(torch.tanh(self.one(x)))


def network(bias: bool = True, dtype: torch.dtype = torch.float64, **options: Any) -> Any:
    torch.manual_seed(0)
    config = LoraConfig(r=3, lora_alpha=7, target_modules=["one", "two"], **options)
    found: Any = get_peft_model(Net(bias), config).to(dtype)  # type: ignore[arg-type]
    for name, p in found.named_parameters():
        if "lora_" in name:
            nn.init.normal_(p, std=0.5)
    return found


def gradients(net: Any, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    out = net(x)
    weight = torch.linspace(-1, 2, out.numel(), dtype=x.dtype).view_as(out)
    named = {"x": x} | {n: p for n, p in net.named_parameters() if p.requires_grad}
    return out, dict(zip(named, torch.autograd.grad((out * weight).sum(), list(named.values())), strict=True))


def same(net: Any, x: Tensor, atol: float = 1e-12) -> None:
    """PEFT's own pass against the fused one."""
    expected, of_expected = gradients(net, x)
    fuse(net)
    found, of_found = gradients(net, x)
    torch.testing.assert_close(found, expected, atol=atol, rtol=0)
    assert of_found.keys() == of_expected.keys()
    for name, gradient in of_expected.items():
        torch.testing.assert_close(of_found[name], gradient, atol=10 * atol, rtol=10 * atol)


@pytest.fixture
def products(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows with each fused product."""
    calls: list[int] = []
    right = lora.linear
    monkeypatch.setattr(lora, "linear", lambda *a: calls.append(1) or right(*a))
    return calls


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(40, 12), (2, 30, 12), (1, 12)])
def test_values_and_gradients(shape: tuple[int, ...], bias: bool, products: list[int]) -> None:
    same(network(bias), torch.randn(*shape, dtype=torch.float64, requires_grad=True))
    assert len(products) == 8, "two layers: one product there, three back besides those for the weights"


def test_in_single_precision(products: list[int]) -> None:
    same(network(dtype=torch.float32), torch.randn(40, 12, requires_grad=True), atol=1e-5)
    assert products


def test_finite_differences() -> None:
    net = network()
    fuse(net)
    x = torch.randn(16, 12, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(net, [x])


OTHERS: dict[str, Any] = {
    "dropout": {"lora_dropout": 0.3},
    "dora": {"use_dora": True},
    "bias of the adapter": {"lora_bias": True},
}


@pytest.mark.parametrize("what", [*OTHERS, "hooks", "merged", "trained base", "autocast", "two adapters"])
def test_what_is_left_to_peft(what: str, products: list[int]) -> None:
    net = network(dtype=torch.float32, **OTHERS.get(what, {}))
    x = torch.randn(60, 12, requires_grad=True)
    if what == "hooks":
        for module in net.modules():
            if type(module) is nn.Linear:
                module.register_forward_hook(lambda *_: None)
    elif what == "merged":
        net.merge_adapter()
    elif what == "trained base":
        net.base_model.model.one.base_layer.weight.requires_grad_(True)
        net.base_model.model.two.base_layer.weight.requires_grad_(True)
    elif what == "two adapters":
        copy_adapter(net, "other", trained=True)
        net.base_model.set_adapter(["default", "other"])
    with torch.autocast("cpu", torch.bfloat16, enabled=what == "autocast"):
        if what == "dropout":
            torch.manual_seed(3)
        expected = net(x)
        fuse(net)
        if what == "dropout":
            torch.manual_seed(3)
        assert torch.equal(net(x), expected)
    assert not products


def test_dropout_is_off_in_evaluation(products: list[int]) -> None:
    same(network(lora_dropout=0.3).eval(), torch.randn(40, 12, dtype=torch.float64, requires_grad=True))
    assert products


def test_with_the_adapter_off_it_is_the_base(products: list[int]) -> None:
    net = network()
    fuse(net)
    x = torch.randn(40, 12, dtype=torch.float64)
    with torch.no_grad():
        plain = Net(True).double()
        plain.load_state_dict(
            {k.replace(".base_layer", ""): v for k, v in net.base_model.model.state_dict().items() if "lora" not in k}
        )
        with adapter_in_use(net, None):
            torch.testing.assert_close(net(x), plain(x), atol=1e-12, rtol=0)
    assert len(products) == 2


def test_an_adapter_of_zeros_is_the_base_to_the_last_bit() -> None:
    """A policy that has learned nothing has a KL of exactly zero to its reference."""
    net = network(dtype=torch.float32)
    fuse(net)
    for name, p in net.named_parameters():
        if "lora_B" in name:
            nn.init.zeros_(p)
    for tokens in (2, 60):
        x = torch.randn(tokens, 12)
        policy = net(x)
        with torch.no_grad(), adapter_in_use(net, None):
            assert torch.equal(net(x), policy)


def test_the_adapter_in_use_counts() -> None:
    net = network()
    fuse(net)
    copy_adapter(net, "other", trained=False)
    for name, p in net.named_parameters():
        if ".other." in name:
            with torch.no_grad():
                p.mul_(-1.5)
    plain = copy.deepcopy(net)
    fuse(plain, on=False)
    x = torch.randn(40, 12, dtype=torch.float64)
    with adapter_in_use(net, "other"), adapter_in_use(plain, "other"):
        other = net(x)
        torch.testing.assert_close(other, plain(x), atol=1e-12, rtol=0)
    assert not torch.allclose(net(x), other)
    torch.testing.assert_close(net(x), plain(x), atol=1e-12, rtol=0)


def test_merged_for_a_while(products: list[int]) -> None:
    net = network()
    before = {n: p.clone() for n, p in net.named_parameters()}
    x = torch.randn(2, 12, dtype=torch.float64)
    expected = net(x)
    fuse(net)
    with torch.no_grad():
        with merged(net):
            torch.testing.assert_close(net(x), expected, atol=1e-12, rtol=0)
            assert len(products) == 2
            with adapter_in_use(net, None):
                assert not torch.allclose(net(x), expected), "the base alone"
        with torch.no_grad():
            net.base_model.model.one.lora_B["default"].weight.add_(1.0)
        assert not torch.allclose(net(x), expected), "nothing is held afterwards"
    for name, p in net.named_parameters():
        if ".one.lora_B" not in name:
            assert torch.equal(p, before[name]), "weights are left alone"


def test_it_is_still_peft_s_layer() -> None:
    """Copies, merges and names of weights are PEFT's."""
    net = network()
    names = list(net.state_dict())
    x = torch.randn(40, 12, dtype=torch.float64)
    expected = net(x)
    fuse(net)
    assert list(net.state_dict()) == names
    twin = copy.deepcopy(net)
    assert all(isinstance(m, FusedLinear) for m in twin.modules() if isinstance(m, Linear))
    with torch.no_grad():
        for p in net.parameters():
            p.zero_()
    torch.testing.assert_close(twin(x), expected, atol=1e-12, rtol=0)
    torch.testing.assert_close(twin.merge_and_unload()(x), expected, atol=1e-12, rtol=0)
