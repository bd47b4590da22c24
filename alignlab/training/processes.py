"""The processes of a run: one, or several that torchrun, accelerate or Slurm started."""

from __future__ import annotations

import atexit
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch

from alignlab.core import AlignlabError, ConfigError

T = TypeVar("T")


class Processes:
    """Accelerate's view of the run's processes.

    Attributes:
        accelerator: the `accelerate.Accelerator`.
        rank, world: this process and how many there are.
        device: where this process computes.
    """

    def __init__(self, mixed_precision: str = "no") -> None:
        import os

        from accelerate import Accelerator
        from accelerate.state import AcceleratorState
        from accelerate.utils import InitProcessGroupKwargs

        on_cpu = not torch.cuda.is_available()
        asked = int(os.environ.get("WORLD_SIZE", "1"))
        # Without a backend named, Accelerate on CPU takes every process for rank 0 of 1.
        handlers = [InitProcessGroupKwargs(backend="gloo")] if on_cpu and asked > 1 else []
        AcceleratorState._reset_state()  # of an earlier run in this process, perhaps in another precision
        try:
            self.accelerator = Accelerator(
                mixed_precision=mixed_precision,
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
        if self.world > 1:
            atexit.register(_leave)

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def gather(self, value: T) -> list[T]:
        """The value of every process, in order of rank, on every process."""
        if self.world == 1:
            return [value]
        found: list[Any] = [None] * self.world
        with _peers():
            torch.distributed.all_gather_object(found, value)
        return found

    def barrier(self) -> None:
        if self.world > 1:
            with _peers():
                torch.distributed.barrier()

    @property
    def engine(self) -> str:
        """What distributes the training, as Accelerate reports it."""
        return str(self.accelerator.distributed_type).rsplit(".", 1)[-1]


@contextmanager
def _peers() -> Iterator[None]:
    """Say what it means when the others no longer answer: the cause is in what one of them said."""
    try:
        yield
    except RuntimeError as error:
        raise AlignlabError(f"another process of this run has stopped: see its message ({error})") from error


def _leave() -> None:
    """Part from the others in order: a group that is still there when the interpreter ends may abort it."""
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
