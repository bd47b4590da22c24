"""Running out of memory: how to recognise it, what to advise, and how to do the work in smaller portions."""

from __future__ import annotations

import ctypes
import logging
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from functools import cache
from typing import TypeVar

import torch

from alignlab.core.errors import AlignlabError

log = logging.getLogger(__name__)

T = TypeVar("T")
R = TypeVar("R")

OUT_OF_MEMORY = ("out of memory", "t allocate memory", "failed to allocate", "not enough memory", "_alloc_failed")
"""Parts of the messages of PyTorch's CPU allocator, cuBLAS and others, which raise RuntimeErrors."""

ADVICE = (
    "shorten what is read (data.max_length, rollout.max_new_tokens, source.group_size), train less of the model "
    "(adapter=lora, quantization=nf4), keep fewer activations (model.gradient_checkpointing=true), or divide the model "
    "(distributed=zero3)"
)

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
"""glibc's numbers for how many bytes of free memory it keeps, and from how many on it asks the system for a piece."""

TOKENS_ON_CPU, TOKENS_ON_GPU = 2048, 8192
"""Default number of tokens in a micro-batch. A CPU is hardly faster with more: with 32 pairs of 270 tokens and a Llama
of 21 million parameters, 512 took 18 % more time than 2048, and 8192 saved 6 % but needed twice the memory; models of
0.1 and of 100 million parameters gained nothing. A GPU needs more tokens to be busy."""


def usual_tokens(on_cpu: bool) -> int:
    """Default number of tokens in a micro-batch on a CPU or on another device."""
    return TOKENS_ON_CPU if on_cpu else TOKENS_ON_GPU


def is_memory_error(error: BaseException) -> bool:
    """Whether memory ran out, on the device or on the host."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError | OSError) and any(s in str(error).lower() for s in OUT_OF_MEMORY)


def release_memory() -> None:
    """Give back memory that PyTorch's allocator keeps for later. Call it after the `except` block: the exception holds
    frames, and these hold tensors."""
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    if sys.platform == "linux":
        with suppress(AttributeError, OSError):
            ctypes.CDLL(None).malloc_trim(0)


@cache
def keep_freed_memory() -> None:
    """Have the C library keep what is freed for what is made next, instead of giving it back to the system, which fills
    every page with zeros before it lends it again: a tenth of a step's time on CPUs. With glibc alone."""
    if sys.platform == "linux":
        with suppress(AttributeError, OSError):
            library = ctypes.CDLL(None)
            library.mallopt(M_MMAP_THRESHOLD, 1 << 25)  # the most that it takes
            library.mallopt(M_TRIM_THRESHOLD, 1 << 30)


def in_halves(batches: Iterable[list[T]], work: Callable[[list[T]], Iterator[R]], what: str) -> Iterator[R]:
    """Yield the results of `work` on each batch, in order. If memory runs out, the batch is split in halves, and each
    half is tried, down to single items.

    Raises:
        AlignlabError: memory runs out for a single item.
    """
    todo = deque(batches)
    while todo:
        batch = todo.popleft()
        try:
            yield from work(batch)
            continue
        except Exception as error:
            if not is_memory_error(error):
                raise
            problem = said(error)
        release_memory()
        if len(batch) == 1:
            raise AlignlabError(f"out of memory in {what}, with a single item in the batch ({problem}): {ADVICE}")
        log.warning("out of memory in %s with a batch of %d: done in halves", what, len(batch))
        middle = len(batch) // 2
        todo.extendleft((batch[middle:], batch[:middle]))


def said(error: BaseException) -> str:
    """The first line of an error's message; its type if there is none."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
