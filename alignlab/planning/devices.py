"""What is known of devices, and how fast they would be: an estimate from operations and bytes, nothing measured."""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch

from alignlab.core import ConfigError, did_you_mean
from alignlab.planning.memory import GB


@dataclass(frozen=True)
class Device:
    """A kind of device.

    Attributes:
        memory: bytes.
        tflops: peak in bfloat16 with float32 sums, dense, in 10^12 operations a second; None: not known.
        bandwidth: of its memory, in bytes a second; None: not known.
    """

    name: str
    memory: float
    tflops: float | None = None
    bandwidth: float | None = None


KNOWN = {
    d.name: d
    for d in (
        Device("a100-40gb", 40 * GB, 312, 1.555e12),
        Device("a100", 80 * GB, 312, 2.039e12),
        Device("h100", 80 * GB, 989, 3.35e12),
        Device("h200", 141 * GB, 989, 4.8e12),
        Device("l40s", 48 * GB, 362, 0.864e12),
        Device("rtx4090", 24 * GB, 165, 1.008e12),
    )
}
"""From NVIDIA's data sheets, the SXM variants where there are several; memory as named, in 10^9 bytes, which leaves a
few per cent of it unused."""

ALIASES = {"a100-80gb": "a100", "a10040gb": "a100-40gb", "4090": "rtx4090", "rtx-4090": "rtx4090"}

USUAL = Device("80 GB", 80 * GB)
"""Where nothing is said and this machine has no GPU."""


def find_device(wanted: str | float | None) -> Device:
    """The device that `gpu` names: by name, by GB of memory, "cpu", or this machine's own.

    Raises:
        ConfigError: no such device is known.
    """
    if wanted is None:
        return _own()
    name = str(wanted).lower().replace(" ", "").replace("_", "-")
    if name == "cpu":
        return Device("cpu", float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")))
    if (named := ALIASES.get(name, name)) in KNOWN:
        return KNOWN[named]
    try:
        size = float(name.removesuffix("gb"))
    except ValueError:
        size = 0.0
    if not 0 < size < float("inf"):
        raise ConfigError(f"gpu={wanted}: not known: give its memory in GB, as in gpu=24{did_you_mean(name, KNOWN)}")
    return Device(f"{size:g} GB", size * GB)


def _own() -> Device:
    """This machine's GPU; where it has none, one of the usual size."""
    if not torch.cuda.is_available():
        return USUAL
    properties = torch.cuda.get_device_properties(0)
    spelt = properties.name.lower().replace(" ", "")
    alike = next((d for d in KNOWN.values() if d.name.split("-")[0] in spelt), USUAL)
    return Device(properties.name, float(properties.total_memory), alike.tflops, alike.bandwidth)


@dataclass(frozen=True)
class Speed:
    """Tokens a second of one device: `trained` counts every token of a row that is trained on, `sampled` every token
    drawn; None where something is not known. `operations`: for each token that is trained on."""

    trained: float | None
    sampled: float | None
    operations: float


def speed(
    device: Device,
    parameters: float,
    trained: float,
    read_bytes: float,
    *,
    checkpointing: bool,
    reference: bool,
    rows: int = 0,
    tflops: float | None = None,
    share: float = 0.4,
) -> Speed:
    """Estimates.

    A token costs 2 operations for each parameter forward, 2 backward for the activations and 2 for the gradients of
    weights that are trained (Kaplan et al. 2020, arXiv:2001.08361, section 2.1): 6 in full fine-tuning, 4 with an
    adapter; 2 more where activations are recomputed, 2 for a reference. A step of sampling reads all weights and the
    cache once, however many rows it has.

    Args:
        parameters, trained: numbers in the model, and those of them that are trained.
        read_bytes: weights and cache, read for each token of all rows.
        rows: sampled together; 0 where nothing is sampled.
        tflops: instead of the device's peak.
        share: of the peak, reached in training; of the bandwidth, in sampling.
    """
    operations = 2.0 * parameters * (2 + checkpointing + reference) + 2.0 * min(trained, parameters)
    peak = (tflops or device.tflops or 0) * 1e12 * share
    sampled = None
    if rows and device.bandwidth:
        sampled = rows * device.bandwidth * share / read_bytes
        sampled = min(sampled, peak / (2 * parameters)) if peak else sampled
    return Speed(peak / operations if peak else None, sampled, operations)
