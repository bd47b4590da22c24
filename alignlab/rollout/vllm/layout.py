"""Which servers a run has: on which GPUs, started by which process, asked by which, with how much memory."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from alignlab.core import ConfigError
from alignlab.rollout.settings import VllmSettings

ON_CPU = 0.3
"""Share of the host's memory that the servers on it may hold together."""

ALONE = 0.9
"""Share of a GPU's memory that a server may hold that has the GPU to itself."""

ASLEEP = 0.9
"""Of the memory that is free beside the trainer's weights: the share for a server that sleeps while it trains. The rest
is for what PyTorch and CUDA hold of their own."""

AWAKE = 0.5
"""The same for a server that stays awake: the other half is for the trainer's activations and gradients."""


LEAST = 0.02
"""Share of a GPU below which no server is started on it."""


@dataclass(frozen=True)
class Place:
    """Where one of the run's processes is.

    Attributes:
        host: name of its host.
        gpu: its GPU, as CUDA_VISIBLE_DEVICES names it; None: it computes on a CPU.
    """

    host: str
    gpu: str | None


def own_place(device: torch.device) -> Place:
    """That of this process, which computes on `device`."""
    if device.type != "cuda":
        return Place(os.uname().nodename, None)
    index = device.index or 0
    visible = [name.strip() for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name.strip()]
    return Place(os.uname().nodename, visible[index] if index < len(visible) else str(index))


@dataclass(frozen=True)
class Replica:
    """One server of the run.

    Attributes:
        owner: rank of the process that starts it, gives it weights and ends it.
        devices: GPUs that it has, as in CUDA_VISIBLE_DEVICES; none on CPUs.
        shares: ranks of the processes that compute on these GPUs, too, in the GPUs' order; none: they are its own.
        users: ranks of the processes that draw from it.
    """

    owner: int
    devices: tuple[str, ...]
    shares: tuple[int, ...]
    users: tuple[int, ...]


def replicas_of(settings: VllmSettings, places: Sequence[Place]) -> list[Replica]:
    """The servers of a run whose processes are at `places`, in order of rank: on each host as many as
    `rollout.vllm.replicas` says, each on `rollout.vllm.tensor_parallel` GPUs.

    They share the trainer's GPUs, one server for each process where nothing else is said, or have those that
    `rollout.vllm.devices` names. On CPUs there is one, which all processes of the host share.

    Raises:
        ConfigError: there are too few GPUs, or they cannot be divided so.
    """
    hosts: dict[str, list[int]] = {}
    for rank, place in enumerate(places):
        hosts.setdefault(place.host, []).append(rank)
    found: list[Replica] = []
    for ranks in hosts.values():
        gpus = {rank: gpu for rank in ranks if (gpu := places[rank].gpu) is not None}
        if settings.devices is not None:
            found += _apart(settings, ranks, set(gpus.values()))
        elif gpus:
            found += _shared(settings, ranks, gpus)
        else:
            found += _on_cpus(settings, ranks)
    return found


def _apart(settings: VllmSettings, ranks: list[int], taken: set[str]) -> list[Replica]:
    devices, width = str(settings.devices).split(","), settings.tensor_parallel
    if both := sorted(taken & set(devices)):
        raise ConfigError(
            f"rollout.vllm.devices={settings.devices}: GPU {both[0]} is the trainer's: name others, or leave devices "
            "out and the servers share the trainer's"
        )
    count = settings.replicas or len(devices) // width
    if count < 1 or count * width > len(devices):
        raise ConfigError(
            f"rollout.vllm.devices={settings.devices}: too few for {max(count, 1)} replica(s) of "
            f"tensor_parallel={width} GPUs"
        )
    return [
        Replica(ranks[0], tuple(devices[i * width : (i + 1) * width]), (), _users(ranks, i, count))
        for i in range(count)
    ]


def _shared(settings: VllmSettings, ranks: list[int], gpus: dict[int, str]) -> list[Replica]:
    width = settings.tensor_parallel
    count = settings.replicas or max(len(ranks) // width, 1)
    span = len(ranks) // count
    if len(ranks) % count or span < width:
        raise ConfigError(
            f"rollout.vllm.replicas={count}, tensor_parallel={width}: {len(ranks)} process(es) per host cannot be "
            "divided so: replicas must divide their number, with at least tensor_parallel for each"
        )
    found = []
    for i in range(count):
        users = ranks[i * span : (i + 1) * span]
        shares = users[:width]
        if len({gpus[r] for r in shares}) < width:
            raise ConfigError(
                f"rollout.vllm.tensor_parallel={width}: each process sees one GPU, a server needs {width}: start "
                "the processes so that they see all of their host, or use 1"
            )
        found.append(Replica(users[0], tuple(gpus[r] for r in shares), tuple(shares), tuple(users)))
    return found


def _on_cpus(settings: VllmSettings, ranks: list[int]) -> list[Replica]:
    if settings.tensor_parallel > 1:
        raise ConfigError(f"rollout.vllm.tensor_parallel={settings.tensor_parallel}: only on GPUs: leave it out")
    count = settings.replicas or 1
    return [Replica(ranks[0], (), (), _users(ranks, i, count)) for i in range(count)]


def _users(ranks: list[int], index: int, count: int) -> tuple[int, ...]:
    """The processes in turn over the servers; servers in turn over the processes where there are more of these."""
    return tuple(r for place, r in enumerate(ranks) if place % count == index or index % len(ranks) == place)


def memory_share(settings: VllmSettings, memory: tuple[int, int] | None, held: float, sleeps: bool) -> float:
    """The share of each of its GPUs that a server may hold (`--gpu-memory-utilization`), as `rollout.vllm.memory` says.

    Else it is `ALONE` on GPUs of its own. On the trainer's it is a part of what is free before its model is there and
    what its weights and optimiser states will leave over: `ASLEEP` where the server sleeps while it trains, `AWAKE`
    where it does not.

    Args:
        memory: bytes of the trainer's GPU: free, before anything of the run is on it, and in all; None: no server is
            on it.
        held: bytes that the trainer will hold there all the time.

    Raises:
        ConfigError: nothing is left for a server.
    """
    if settings.memory is not None:
        return settings.memory
    if memory is None:
        return ALONE
    free, total = memory
    share = round((ASLEEP if sleeps else AWAKE) * (free - held) / total, 3)
    if share < LEAST:
        raise ConfigError(
            f"rollout.vllm: of {free / 1e9:.0f} GB free on the GPU the trainer will hold about {held / 1e9:.0f} GB: "
            "too little is left for a server: use adapter=lora, distributed=fsdp or rollout.vllm.devices, or give "
            "rollout.vllm.memory"
        )
    return share
