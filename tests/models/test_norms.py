"""The fused RMSNorm computes what a layer's own does, values and gradients; what is something else is left alone."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from alignlab.models import Features, FullFineTuning, LoRA, ModelSettings, load_model, norms
from alignlab.models.norms import FusedNorm, _RMSNorm, fuse_norms
from tests import tiny

EPS = 1e-5


def layer(width: int = 48, own: Any = LlamaRMSNorm) -> Any:
    made = own(width, eps=EPS)
    nn.init.normal_(made.weight, generator=torch.Generator().manual_seed(1))
    return made


def inputs(*shape: int) -> Tensor:
    """Rows of different lengths, down to where epsilon counts."""
    x = torch.randn(shape, generator=torch.Generator().manual_seed(2))
    return (x * torch.logspace(-3, 1, shape[-2])[:, None]).requires_grad_()


def gradients(module: Any, x: Tensor) -> list[Tensor]:
    """The output, and gradients of some function of it with respect to input and weight."""
    out = module(x)
    g = torch.randn(out.shape, generator=torch.Generator().manual_seed(3), dtype=out.dtype)
    return [out, *torch.autograd.grad(out, [x, module.weight], g)]


def fused(network: nn.Module) -> list[str]:
    return [name for name, m in network.named_modules() if isinstance(m, FusedNorm)]


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows with each use of the function."""
    made: list[int] = []
    right = norms._scaled
    monkeypatch.setattr(norms, "_scaled", lambda *a: made.append(1) or right(*a))
    return made


@pytest.mark.parametrize("shape", [(7, 48), (2, 9, 48), (2, 5, 3, 48), (1, 48)])
def test_values_and_gradients(shape: tuple[int, ...], calls: list[int]) -> None:
    module, x = layer(), inputs(*shape)
    expected = gradients(module, x)
    fuse_norms(module)
    calls.clear()
    found = gradients(module, x)
    assert len(calls) == 1
    # Both round in each of a few operations (6e-8) and add 48 terms, which may cancel in the gradient of a row.
    for ours, own in zip(found, expected, strict=True):
        assert ours.shape == own.shape
        error = (ours - own).flatten(0, -2).norm(dim=-1) if own.ndim > 1 else (ours - own).norm()
        size = own.flatten(0, -2).norm(dim=-1) if own.ndim > 1 else own.norm()
        assert bool((error <= 2e-6 * size).all())


def test_of_inputs_that_are_not_in_one_piece(calls: list[int]) -> None:
    """As queries of heads often are, and gradients of a sum, which have no strides."""
    module, x = layer(), inputs(2, 9, 48)
    expected = torch.autograd.grad(module(x.transpose(0, 1)).sum(), [x, module.weight])
    fuse_norms(module)
    found = torch.autograd.grad(module(x.transpose(0, 1)).sum(), [x, module.weight])
    for ours, own in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, own, rtol=1e-4, atol=1e-6 * float(own.abs().max()))


@pytest.mark.parametrize("trained", [(True, True), (True, False), (False, True)])
def test_finite_differences(trained: tuple[bool, bool]) -> None:
    x = torch.randn(3, 4, 6, dtype=torch.float64, requires_grad=trained[0])
    weight = torch.randn(6, dtype=torch.float64, requires_grad=trained[1])
    # An epsilon as large as the mean square, so that it counts.
    assert torch.autograd.gradcheck(lambda x, w: _RMSNorm.apply(x, w, 0.7), [x, weight])
    expected = weight * x / (x.square().mean(-1, keepdim=True) + 0.7).sqrt()
    torch.testing.assert_close(_RMSNorm.apply(x, weight, 0.7), expected, atol=1e-12, rtol=0)


def test_without_gradient_the_same_bits_and_nothing_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    module, x = layer(), inputs(30, 48)
    fuse_norms(module)
    expected = module(x)
    assert expected.requires_grad
    monkeypatch.setattr(norms, "_RMSNorm", None)  # not even entered
    with torch.no_grad():
        assert torch.equal(module(x), expected)
    module.requires_grad_(False)
    found = module(x.detach())
    assert torch.equal(found, expected) and not found.requires_grad


def test_a_trained_weight_on_inputs_without_gradient() -> None:
    module, x = layer(), inputs(30, 48)
    (expected,) = torch.autograd.grad(module(x).square().sum(), [module.weight])
    fuse_norms(module)
    (found,) = torch.autograd.grad(module(x.detach()).square().sum(), [module.weight])
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("of_input", [True, False])
def test_what_is_kept_for_the_backward_pass(of_input: bool) -> None:
    module, x = layer(), inputs(30, 48).requires_grad_(of_input)
    fuse_norms(module)
    kept: list[tuple[int, ...]] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(tuple(t.shape)) or t, lambda t: t):
        module(x)
    assert kept == [(30, 48), (30, 1), (48,)]


@pytest.mark.parametrize(("name", "count"), [("llama", 5), ("qwen2", 5), ("qwen3", 9), ("mistral", 5), ("granite", 5)])
def test_networks_whose_norms_are_fused(name: str, count: int) -> None:
    """Two in each of two layers and the last; four with those of queries and keys."""
    network = tiny.network(name)
    fuse_norms(network)
    assert len(fused(network)) == count


@pytest.mark.parametrize("name", ["gemma", "gemma2", "gemma3", "gpt2", "cohere"])
def test_networks_that_have_others(name: str) -> None:
    network = tiny.network(name)
    fuse_norms(network)
    assert not fused(network)


class Plain(nn.Module):
    """The right function, to be made wrong."""

    def __init__(self, width: int = 48, eps: float = EPS) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(width)), eps

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * x / (x.square().mean(-1, keepdim=True) + self.eps).sqrt()


class RightRMSNorm(Plain):
    pass


class RightLayer(Plain):
    """By another name."""


class OutsideRMSNorm(Plain):
    """Epsilon outside the root, which rows of usual size do not show."""

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * x / (x.square().mean(-1, keepdim=True).sqrt() + self.eps)


class SquareRMSNorm(Plain):
    """Which weights of 1 do not show."""

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * super().forward(x)


class ScalarRMSNorm(Plain):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(1.0))


class GatedRMSNorm(Plain):
    def forward(self, x: Tensor, gate: Tensor) -> Tensor:
        return super().forward(x) * gate


class BiasRMSNorm(Plain):
    def __init__(self) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(48))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + self.bias


class PairRMSNorm(Plain):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return super().forward(x), x


class ShapeRMSNorm(Plain):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)[None]


def of(dtype: torch.dtype | None = None, device: str | None = None) -> Any:
    return RightRMSNorm().to(device=device, dtype=dtype)


def ones(module: Any) -> Any:
    nn.init.ones_(module.weight)
    return module


def empty() -> Any:
    module = RightRMSNorm()
    module.weight.data = torch.empty(0)
    return module


OTHERS: dict[str, Any] = {
    "another name": RightLayer,
    "epsilon outside": lambda: OutsideRMSNorm(eps=1e-6),
    "weights squared": SquareRMSNorm,
    "a gate": GatedRMSNorm,
    "a bias": BiasRMSNorm,
    "two outputs": PairRMSNorm,
    "another shape": ShapeRMSNorm,
    "no epsilon": lambda: nn.RMSNorm(48),
    "one weight": ScalarRMSNorm,
    "two axes": lambda: nn.RMSNorm((4, 12), eps=EPS),
    "Gemma, weights 0": lambda: GemmaRMSNorm(48),
    "Gemma, weights 1": lambda: ones(GemmaRMSNorm(48)),
    "half precision": lambda: of(torch.bfloat16),
    "double precision": lambda: of(torch.float64),
    "weights nowhere": lambda: of(device="meta"),
    "weights elsewhere": empty,
}


@pytest.mark.parametrize("what", OTHERS)
def test_what_is_left_alone(what: str) -> None:
    module = OTHERS[what]()
    made = type(module)
    fuse_norms(module)
    assert type(module) is made


def test_the_right_function_is_known_and_trying_changes_nothing() -> None:
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    right, module = layer(own=RightRMSNorm), nn.Sequential()
    before = right.weight.clone()
    module.extend([right, nn.RMSNorm(48, eps=EPS)])
    fuse_norms(module)
    assert fused(module) == ["0", "1"]
    assert torch.equal(right.weight, before) and right.weight.requires_grad and right.weight.grad is None
    assert torch.equal(torch.rand(1), expected), "random numbers go on as before"


WAYS = ["autocast", "half precision", "double precision", "half precision of inputs", "half precision of weights"]


@pytest.mark.parametrize("what", WAYS)
def test_passes_that_go_their_own_way(what: str, calls: list[int]) -> None:
    module, x = layer(), inputs(7, 48)
    own = copy.deepcopy(module)
    fuse_norms(module)
    calls.clear()
    if what in ("half precision", "double precision"):
        dtype = torch.bfloat16 if what == "half precision" else torch.float64
        module.to(dtype), own.to(dtype)
        x = x.detach().to(dtype).requires_grad_()
    elif what == "half precision of inputs":
        x = x.detach().bfloat16().requires_grad_()
    elif what == "half precision of weights":
        module.bfloat16(), own.bfloat16()
    with torch.autocast("cpu", torch.bfloat16, enabled=what == "autocast"):
        for found, expected in zip(gradients(module, x), gradients(own, x), strict=True):
            assert found.dtype == expected.dtype and torch.equal(found, expected)
    assert not calls


def test_an_input_of_another_width_is_refused_as_before() -> None:
    module = layer()
    fuse_norms(module)
    with pytest.raises(RuntimeError, match="size of tensor"):
        module(torch.randn(3, 12))
    assert module(torch.randn(3, 1)).shape == (3, 48), "transformers' own stretches it"


def test_it_is_still_transformers_layer(calls: list[int]) -> None:
    """Copies, names of weights, its class and calls by name."""
    module, x = layer(), inputs(7, 48)
    names = list(module.state_dict())
    expected = module(x)
    fuse_norms(module)
    assert isinstance(module, LlamaRMSNorm) and list(module.state_dict()) == names
    other = layer()
    fuse_norms(other)
    assert type(module) is type(other), "one class for all"
    twin = copy.deepcopy(module)
    with torch.no_grad():
        module.weight.zero_()
    calls.clear()
    torch.testing.assert_close(twin(x), expected)
    assert calls and isinstance(twin, FusedNorm)
    torch.testing.assert_close(twin(hidden_states=x), expected)
    with pytest.raises(TypeError, match="gate"):
        twin(x, gate=x)


def test_switching_off_and_on(calls: list[int]) -> None:
    module, x = layer(), inputs(7, 48)
    expected = module(x)
    for _ in range(2):
        fuse_norms(module)
        fuse_norms(module)
        assert isinstance(module, FusedNorm)
        for _ in range(2):
            fuse_norms(module, on=False)
            assert type(module) is LlamaRMSNorm
    calls.clear()
    assert torch.equal(module(x), expected) and not calls


@pytest.mark.parametrize("adapter", ["none", "lora"])
@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_log_probs_and_gradients_of_a_model(name: str, adapter: Any, tmp_path: Path) -> None:
    path = str(tiny.save(tmp_path / "model", name))
    model = load_model(ModelSettings(path=path), LoRA() if adapter == "lora" else FullFineTuning())
    assert model.features.fused_norms and len(fused(model)) == {"llama": 5, "qwen3": 9}[name]
    rows = model.lay_out(tiny.some_groups())
    trained = [p for p in model.parameters() if p.requires_grad]

    def read() -> list[Tensor]:
        logp = model(rows)["logp_T"]
        return [logp, *torch.autograd.grad(logp.mean(), trained)]

    found = read()
    model.features = Features(fused_norms=False)
    assert not fused(model)
    for ours, own in zip(found, read(), strict=True):
        torch.testing.assert_close(ours, own, atol=1e-5, rtol=1e-5)
    model.features = Features()
    assert fused(model)


def test_gradient_checkpointing(tmp_path: Path, calls: list[int]) -> None:
    path = str(tiny.save(tmp_path / "model"))
    found = []
    for checkpointing in (False, True):
        model = load_model(ModelSettings(path=path, gradient_checkpointing=checkpointing))
        model.train()
        calls.clear()
        logp = model(model.lay_out(tiny.some_groups()))["logp_T"]
        logp.mean().backward()
        found.append([p.grad for p in model.parameters()])
        assert len(calls) == (9 if checkpointing else 5), "those of layers twice"
    for once, twice in zip(*found, strict=True):
        torch.testing.assert_close(once, twice, atol=1e-6, rtol=1e-5)


def test_saved_as_it_was(tmp_path: Path) -> None:
    path = tiny.save(tmp_path / "model")
    model = load_model(ModelSettings(path=str(path)))
    model.network.save_pretrained(tmp_path / "again")
    for file in ("model.safetensors", "config.json"):
        assert (tmp_path / "again" / file).read_bytes() == (path / file).read_bytes()


def test_a_critic_of_its_own_switches_with_the_policy(tmp_path: Path) -> None:
    from alignlab.models.heads import add_value_head

    model = load_model(ModelSettings(path=str(tiny.save(tmp_path / "model"))))
    add_value_head(model, "own")
    assert len(fused(model)) == 10
    model.features = Features(fused_norms=False)
    assert not fused(model)


def test_beside_other_processes(tmp_path: Path) -> None:
    """Data parallel training goes by hooks on weights, which the function's gradients must reach."""
    module, x = layer(), inputs(7, 48)
    fuse_norms(module)
    expected = gradients(module, x)[2]
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/meet", rank=0, world_size=1)
    try:
        wrapped = DistributedDataParallel(module)
        g = torch.randn(7, 48, generator=torch.Generator().manual_seed(3))
        wrapped(x).backward(g)
    finally:
        torch.distributed.destroy_process_group()
    assert module.weight.grad is not None
    torch.testing.assert_close(module.weight.grad, expected)
