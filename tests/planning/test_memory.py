"""What is divided by what: against the ZeRO paper, DeepSpeed's own estimators and hand arithmetic."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from alignlab.planning.memory import GB, MODES, Memory, Optimizer, device_memory, optimizer_of
from alignlab.planning.shapes import nf4_bytes
from alignlab.planning.trace import Needs
from tests.components import need

STATES = ("weights", "float32 copy", "optimizer states")
ADAM = Optimizer(own=2.0)


def whole(parameters: float, element: int = 2, **passes: float) -> Needs:
    """Full fine-tuning of so many parameters in half precision, nothing else."""
    size = parameters * element
    return Needs(
        parameters=parameters,
        trained=parameters,
        trained_weights=size,
        largest=size / 10,
        layer=size / 20,
        outside=size / 10,
        **passes,
    )


def on(mode: str, devices: int, needs: Needs, **changes: Any) -> Memory:
    return device_memory(needs, ADAM, mode, devices, **changes)


def states(memory: Memory) -> float:
    """Weights, gradients and everything of the optimiser: the paper's model states."""
    return sum(memory.held.get(k, 0.0) for k in STATES) + memory.phases["training"]["gradients"]


@pytest.mark.parametrize(
    ("parameters", "devices", "published"),
    [  # figure 1 (31.4, 16.6 and 1.9): 7.5 billion on 64 devices
        (7.5e9, 64, {"zero1": 31.4, "zero2": 16.6, "zero3": 1.88}),
        # table 1: the same at other degrees, and other sizes
        (7.5e9, 1, {"zero1": 120, "zero2": 120, "zero3": 120}),
        (7.5e9, 4, {"zero1": 52.5, "zero2": 41.3, "zero3": 30}),
        (7.5e9, 1024, {"zero1": 30.1, "zero2": 15.1, "zero3": 0.12}),
        (128e9, 64, {"zero1": 536, "zero2": 284, "zero3": 32}),
        (1e12, 1024, {"zero1": 4011, "zero2": 2013, "zero3": 15.6}),
    ],
)
def test_the_zero_paper(parameters: float, devices: int, published: dict[str, float]) -> None:
    """Rajbhandari et al. 2020, arXiv:1910.02054, figure 1 and table 1: GB for each device."""
    for mode, gb in published.items():
        assert states(on(mode, devices, whole(parameters))) / GB == pytest.approx(gb, rel=0.01, abs=0.005), mode


@pytest.mark.parametrize("devices", [1, 2, 8, 64])
def test_deepspeed_s_estimators(devices: int) -> None:
    """They count the update, where a float32 gradient is beside the others; ZeRO-3's leaves out the half one."""
    zero = need("deepspeed.runtime.zero.stage_1_and_2")
    three = need("deepspeed.runtime.zero.stage3")
    n = 7_500_000_000
    memory = on("zero2", devices, whole(n))
    _, theirs = zero.estimate_zero2_model_states_mem_needs(n, devices, 1, cpu_offload=False)
    ours = sum(memory.held[k] for k in STATES) + memory.phases["update"]["gradients"]
    assert ours == pytest.approx(theirs, rel=1e-6)
    memory = on("zero3", devices, whole(n))
    _, theirs, _ = three.estimate_zero3_model_states_mem_needs(n, 0, devices, 1, cpu_offload=False)
    ours = sum(memory.held[k] for k in STATES) + memory.phases["update"]["gradients"] - 2 * n / devices
    assert ours == pytest.approx(theirs, rel=1e-6)


@pytest.mark.parametrize("devices", [1, 8])
def test_offloading_against_deepspeed(devices: int) -> None:
    """All states are in the node's memory: 18 bytes a parameter by its estimator, 16 here before the update."""
    three = need("deepspeed.runtime.zero.stage3")
    n = 7_500_000_000
    memory = on("zero3_offload", devices, whole(n), on_cpu=False)
    theirs, _, _ = three.estimate_zero3_model_states_mem_needs(n, 0, devices, 1, additional_buffer_factor=1.0)
    assert memory.host * devices == pytest.approx(theirs, rel=0.12)
    assert not any(memory.held.get(k) for k in STATES)


def test_one_process_and_ddp_by_hand() -> None:
    """AdamW of torch keeps its two means in the weights' precision; DDP's buckets are as large as the gradients."""
    what = whole(1e9)
    one = on("single", 1, what)
    assert one.held == {"weights": 2e9, "optimizer states": 4e9}
    assert one.phases["training"]["gradients"] == 2e9
    assert on("ddp", 8, what).held == {**one.held, "communication": 2e9}


def test_fsdp_by_hand() -> None:
    """A layer's weights are gathered while the next one's come, in training and in scoring; sampling needs all."""
    what = whole(1e9)
    memory = on("fsdp", 4, what)
    assert memory.held == {"weights": 0.5e9, "optimizer states": 1e9}
    assert memory.phases["training"]["gradients"] == 0.5e9
    assert memory.phases["training"]["gathered weights"] == 2 * what.layer + what.outside
    assert memory.phases["scoring"]["gathered weights"] == 2 * what.layer + what.outside
    sampled = on("fsdp", 4, whole(1e9, prefill=1e9, step=1e9))
    assert sampled.phases["sampling"]["gathered weights"] == 2e9


def test_an_adapter_leaves_the_optimiser_little_and_a_quantised_base_is_not_divided() -> None:
    what = Needs(parameters=1e9, trained=1e7, trained_weights=4e7, quantised=5e8, frozen_weights=1e8)
    memory = on("single", 1, what)
    assert memory.held == {"weights": 6.4e8, "optimizer states": 8e7}
    assert on("fsdp", 2, what).held["weights"] == 5e8 + 1.4e8 / 2


def test_phases_are_alternatives() -> None:
    """Activations, the update's temporaries and sampling never exist together."""
    passes = {"saved": 3e9, "activations": 5e9, "scoring": 1e9}
    memory = on("single", 1, whole(1e9, **passes, prefill=1e9, step=7e9), on_cpu=True)
    assert memory.peak == "training" and memory.total == 6e9 + 2e9 + 5e9
    later = on("single", 1, whole(1e9, prefill=1e9, step=7e9), on_cpu=True)
    assert later.peak == "sampling" and later.total == 6e9 + 7e9


def test_gradients_come_while_activations_go() -> None:
    """In a step of one micro-batch the peak is at the turn, or at the end with what the update makes of the largest
    tensor, never the sum."""
    largest = whole(1e9).largest
    for activations, expected in ((5e9, 6e9 + 5e9), (1e9, 6e9 + 2e9 + 2 * largest)):
        memory = on("single", 1, whole(1e9, activations=activations), micro_batches=1, on_cpu=True)
        assert memory.total == expected


@pytest.mark.parametrize("mode", [m for m in MODES if m != "single"])
@pytest.mark.parametrize("element", [2, 4])
def test_more_devices_never_need_more(mode: str, element: int) -> None:
    needs = whole(3e9, element, saved=2e9, activations=2e9, scoring=1e9)
    totals = [on(mode, n, needs).total for n in (2, 4, 8, 16, 32, 64)]
    assert totals == sorted(totals, reverse=True)


def test_each_stage_of_zero_needs_less_of_the_states() -> None:
    found = [states(on(mode, 8, whole(3e9))) for mode in ("zero1", "zero2", "zero3")]
    assert found == sorted(found, reverse=True) and found[0] > found[2]


# ------------------------------------------------------------------ optimisers


@pytest.mark.parametrize(
    ("values", "bytes_each"),
    [
        ({"_target_": "torch.optim.AdamW"}, 8.0),
        ({"_target_": "torch.optim.AdamW", "amsgrad": True}, 12.0),
        ({"_target_": "torch.optim.SGD", "lr": 0.1}, 0.0),
        ({"_target_": "torch.optim.SGD", "lr": 0.1, "momentum": 0.9}, 4.0),
    ],
)
def test_states_in_float32(values: dict[str, object], bytes_each: float) -> None:
    numbers = 1000.0
    assert optimizer_of(values).states(numbers, 4 * numbers) == bytes_each * numbers


def test_states_in_the_weights_own_precision() -> None:
    assert optimizer_of({"_target_": "torch.optim.AdamW"}).states(10.0, 20.0) == 40.0


@pytest.mark.component
def test_states_in_8_bits() -> None:
    """A byte each for two means, and a float32 constant for each 256 of them (Dettmers et al. 2022)."""
    need("bitsandbytes")
    found = optimizer_of({"_target_": "bitsandbytes.optim.AdamW8bit"})
    assert found.states(1e6, 2e6) == pytest.approx(2e6 * (1 + 4 / 256), rel=1e-3)
    paged = optimizer_of({"_target_": "bitsandbytes.optim.PagedAdamW"})
    assert paged.paged and paged.states(1e6, 2e6) == pytest.approx(8e6)
    assert device_memory(whole(1e6), paged).paged == pytest.approx(8e6)


@pytest.mark.parametrize("name", ["transformers.Adafactor", "torch.optim.Adafactor"])
def test_adafactor_keeps_next_to_nothing(name: str) -> None:
    """A number for each row and column of a matrix (Shazeer & Stern 2018, algorithm 2): of one of 2048 · 2048, 4096."""
    assert optimizer_of({"_target_": name}).states(2048.0**2, 4 * 2048.0**2) <= 4096 * 4


@pytest.mark.parametrize(
    ("values", "temporary"),
    [
        ({"_target_": "torch.optim.AdamW"}, 2.0),  # the square root of the second mean, and that over its correction
        ({"_target_": "torch.optim.SGD", "lr": 0.1}, 0.0),
        ({"_target_": "torch.optim.SGD", "lr": 0.1, "weight_decay": 0.1}, 1.0),  # the gradient with the decay
        ({"_target_": "tests.planning.test_memory.OnGpusAlone"}, 2.0),
    ],
)
def test_temporaries_of_an_update(values: dict[str, object], temporary: float) -> None:
    assert optimizer_of(values).temporary == temporary


class OnGpusAlone(torch.optim.SGD):
    """Refuses to step here."""

    def step(self, closure: Any = None) -> None:
        raise RuntimeError("no kernel for this device")


def test_an_optimiser_that_cannot_be_tried_here_counts_as_adam_in_float32() -> None:
    found = optimizer_of({"_target_": "tests.planning.test_memory.OnGpusAlone", "lr": 0.1})
    assert found.states(10.0, 20.0) == 80.0


def test_the_constants_of_double_quantisation() -> None:
    """QLoRA, section 3: 0.127 bits a parameter instead of 0.5."""
    assert 8 * nf4_bytes(double=True) - 4 == pytest.approx(0.127, abs=5e-4)
    assert 8 * nf4_bytes(double=False) - 4 == 0.5
