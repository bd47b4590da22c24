"""The processes of a run: one, or several that we, torchrun, accelerate, deepspeed or srun started."""

from __future__ import annotations

import atexit
import os
import subprocess
from collections.abc import Iterator, MutableMapping
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar
from weakref import WeakSet

import torch
from torch import Tensor

from alignlab.core import AlignlabError, ConfigError, PeerLost
from alignlab.core.private_api import forget_accelerator, same_timeout
from alignlab.training.distributed.watchdog import STACKS, Watchdog
from alignlab.training.settings import DistributedSettings

T = TypeVar("T")

WRAPPERS: WeakSet[Any] = WeakSet()
"""What engines have put around models, as long as it is in use: it may hold on to the process group."""

SEVERAL = "ddp, fsdp, zero1, zero2 or zero3"

OTHERS = {"ACCELERATE_USE_DEEPSPEED": "zero", "ACCELERATE_USE_FSDP": "fsdp"}
"""What `accelerate launch` sets where its own config names an engine → how our modes of that engine begin."""

LOST = (
    *("connection closed", "connection reset", "connection refused", "broken pipe", "timed out", "timeout", "tcpstore"),
    *("ncclremoteerror", "communicator was aborted"),
)
"""Part of what PyTorch's process groups say when another process is gone or does not answer."""


class Processes:
    """Accelerate's view of the run's processes.

    Attributes:
        accelerator: the `accelerate.Accelerator`.
        rank, world: this process and how many there are.
        device: where this process computes.
        timeout: seconds that the processes wait for one another.
    """

    def __init__(self, mixed_precision: str = "no", distributed: DistributedSettings | None = None) -> None:
        from accelerate import Accelerator
        from accelerate.utils import DistributedDataParallelKwargs, InitProcessGroupKwargs

        distributed = distributed or DistributedSettings()
        on_cpu = not torch.cuda.is_available()
        self.world = asked = _check_launch(distributed)
        self.timeout = distributed.timeout
        self.watchdog: Watchdog | None = None
        handlers = []
        if distributed.mode != "single":
            # Without a backend named, Accelerate on CPU takes every process for rank 0 of 1. On GPUs objects and what
            # is in memory go over gloo: over NCCL they would go through the devices, and wait for all their work.
            options: dict[str, Any] = {"backend": "gloo" if on_cpu else "cpu:gloo,cuda:nccl"}
            handlers = [
                InitProcessGroupKwargs(timeout=timedelta(seconds=distributed.timeout), **options),
                DistributedDataParallelKwargs(broadcast_buffers=False),  # nothing is exchanged in a forward pass
            ]
        forget_accelerator()
        try:
            with self.peers():
                self.accelerator = Accelerator(
                    mixed_precision="fp16" if mixed_precision == "fp16" else "no",  # for the scaler of its losses
                    cpu=on_cpu,
                    step_scheduler_with_optimizer=False,
                    kwargs_handlers=handlers,
                )
        except ValueError as error:
            raise ConfigError(f"training.mixed_precision={mixed_precision!r}: {error}") from error
        self.rank = int(self.accelerator.process_index)
        self.world = int(self.accelerator.num_processes)
        self.device: torch.device = self.accelerator.device
        if self.world != asked:
            raise AlignlabError(f"started as one of {asked} processes, but Accelerate sees {self.world}")
        if torch.distributed.is_initialized():
            atexit.register(leave)

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def gather(self, value: T) -> list[T]:
        """The value of every process, in order of rank, on every process."""
        if self.world == 1:
            return [value]
        found: list[Any] = [None] * self.world
        with self._meeting():
            torch.distributed.all_gather_object(found, value)
        return found

    def barrier(self) -> None:
        if self.world > 1:
            with self._meeting():
                torch.distributed.barrier()

    def mean(self, tensor: Tensor) -> None:
        """Make a tensor the mean of all processes' tensors, in place."""
        if self.world > 1:
            with self._meeting():
                torch.distributed.all_reduce(tensor.div_(self.world))

    def same_timeout(self) -> None:
        """Have the groups that libraries made for themselves time out as ours does, not after half an hour."""
        if self.world > 1:
            same_timeout(self.timeout)

    def watch(self, folder: Path) -> None:
        """From now on: where the processes no longer come together, each leaves its stack in `folder/rank-N.stack`."""
        if self.world > 1:
            self.watchdog = Watchdog(folder, self.rank, self.timeout)

    def unwatch(self) -> None:
        """All has been done together."""
        if self.watchdog is not None:
            self.watchdog.stop()
            self.watchdog = None

    @contextmanager
    def _meeting(self) -> Iterator[None]:
        if self.watchdog is not None:
            self.watchdog.arm()
        with self.peers():
            yield
        if self.watchdog is not None:
            self.watchdog.arm()

    @contextmanager
    def peers(self) -> Iterator[None]:
        """Say what it means when the others no longer answer: the cause is in what one of them said.

        Raises:
            PeerLost: for errors of PyTorch's process groups.
        """
        try:
            yield
        except RuntimeError as error:
            text = str(error)
            if self.world == 1 or not any(saying in text.lower() for saying in LOST):
                raise
            if "timed out" in text.lower() or "timeout" in text.lower():
                stacks = f"; {self.watchdog.folder / STACKS.format('*')} say where each was" if self.watchdog else ""
                raise PeerLost(
                    f"another process of this run has not answered for {self.timeout:g} s (distributed.timeout){stacks}"
                ) from error
            raise PeerLost("another process of this run has stopped: see its message") from error


def launched(environment: MutableMapping[str, str] = os.environ) -> int | None:
    """How many processes a launcher started, this one among them; None where there was none.

    torchrun, accelerate and deepspeed set RANK, WORLD_SIZE and their like. srun sets others: theirs are set from them.
    """
    if "WORLD_SIZE" not in environment and "SLURM_STEP_NUM_TASKS" in environment:
        count = environment["SLURM_STEP_NUM_TASKS"]
        if int(count) == 1:
            return None
        if "MASTER_ADDR" not in environment:
            environment["MASTER_ADDR"] = _first_node(environment)
        job = int(environment.get("SLURM_JOB_ID", "0"))
        environment.setdefault("MASTER_PORT", str(15000 + job % 20000))
        environment.update(
            WORLD_SIZE=count,
            RANK=environment["SLURM_PROCID"],
            LOCAL_RANK=environment["SLURM_LOCALID"],
            LOCAL_WORLD_SIZE=environment.get("SLURM_STEP_TASKS_PER_NODE", count).split("(")[0].split(",")[0],
        )
    return int(environment["WORLD_SIZE"]) if "WORLD_SIZE" in environment else None


def _first_node(environment: MutableMapping[str, str]) -> str:
    """Where the processes of a Slurm step meet."""
    nodes = environment.get("SLURM_STEP_NODELIST", environment.get("SLURM_NODELIST", ""))
    try:
        found = subprocess.run(["scontrol", "show", "hostnames", nodes], capture_output=True, text=True, check=True)
        return found.stdout.split()[0]
    except (OSError, subprocess.CalledProcessError, IndexError) as error:
        raise AlignlabError(
            f"started by srun on {nodes or 'unknown nodes'}, but `scontrol show hostnames` does not say which is the "
            f"first ({error}): set MASTER_ADDR to its name"
        ) from error


def _check_launch(distributed: DistributedSettings) -> int:
    """How many processes there are, which must be what the settings say."""
    found, mode = launched(), distributed.mode
    if mode == "single":
        if found is not None and found > 1:
            raise ConfigError(f"distributed=single: started as one of {found} processes: choose {SEVERAL}")
        return 1
    for variable, beginning in OTHERS.items():
        # The engine is ours to choose; with these set, Accelerate would put one of its own around ours.
        if os.environ.pop(variable, "false").lower() == "true" and not mode.startswith(beginning):
            raise ConfigError(f"distributed={mode}: accelerate was told {variable}=true: choose one")
    if found is None or (found == 1 and not mode.startswith("zero")):
        raise ConfigError(
            f"distributed={mode}: {'one process was' if found else 'no processes were'} started: use "
            "distributed.processes=N, torchrun, accelerate, deepspeed or srun; or distributed=single"
        )
    if distributed.processes not in (None, found):
        raise ConfigError(f"distributed.processes={distributed.processes}: the launcher started {found}")
    return found


def leave() -> None:
    """Part from the others in order: first what holds on to the process group, then the group itself.

    A reducer of DDP that outlives the group ends its threads while it holds Python's lock, and they may be waiting for
    that: for ever. A group that is still there when the interpreter ends may abort it.
    """
    if not torch.distributed.is_initialized():
        return
    for wrapper in list(WRAPPERS):
        for held in ("reducer", "logger"):
            vars(wrapper).pop(held, None)
    torch.distributed.destroy_process_group()
