"""In each process of a vLLM server that has this folder on its path: files stand for what GPUs would carry.

vLLM's build for CPUs has all of its weight transfer but these functions of CUDA: the protocol tested is its own.
"""

import os
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any


class Files:
    """An end of a communicator: what is broadcast lies in files, in order."""

    def __init__(self, key: bytes, rank: int, world_size: int, device: Any) -> None:
        self.next = 0

    def broadcast(self, tensor: Any, src: int, stream: Any) -> None:
        path = Path(os.environ["IMITATED_NCCL"]) / f"{self.next}.pt"
        self.next += 1
        while not path.exists():
            time.sleep(0.01)
        tensor.copy_(torch.load(path))


def first_device() -> int:
    """Asked for right before a worker joins a communicator."""
    from vllm.distributed.device_communicators.pynccl import PyNcclCommunicator

    PyNcclCommunicator.from_unique_id_bytes = Files
    return 0


try:
    import torch
    from torch.multiprocessing import reductions
except ImportError:  # a Python without it, such as the shell's
    pass
else:
    torch.cuda.get_device_properties = lambda device=None: SimpleNamespace(uuid="imitated")  # type: ignore[assignment]
    torch.cuda.current_stream = lambda device=None: None  # type: ignore[assignment, return-value]
    torch.accelerator.synchronize = lambda device=None: None
    torch.accelerator.current_device_index = first_device
    reductions.rebuild_cuda_tensor = lambda path, *rest: torch.load(path)  # type: ignore[assignment]
