"""In which order records are trained on, and how an iteration is shared out among processes.

The config group `order` names a `DataOrder` by `_target_`. It is told what became of each batch (`observe`), so that a
curriculum can go by the last rewards.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

import numpy as np

from alignlab.core import AlignlabError, Group


class Shuffled:
    """A seeded order over records, in batches: batch i is the same whoever asks, whenever.

    Each epoch is a fresh permutation; its last batch may be smaller, so every record comes exactly once an epoch.

    Args:
        groups: the records.
        batch_size: records in a batch.
        seed: of the permutations.
    """

    def __init__(self, groups: Sequence[Any], batch_size: int, seed: int = 0) -> None:
        if not len(groups):
            raise AlignlabError("there are no records to train on")
        self.count, self.batch_size, self.seed = len(groups), batch_size, seed
        self.batches_per_epoch = math.ceil(self.count / batch_size)
        self._epoch = lru_cache(maxsize=1)(self.epoch)

    def epoch(self, number: int) -> np.ndarray:
        """The order of all records in an epoch, counted from 0."""
        return np.random.default_rng([self.seed, number]).permutation(self.count)

    def batch(self, index: int) -> list[int]:
        """Indices of the records of batch `index`, counted over all epochs."""
        epoch, place = divmod(index, self.batches_per_epoch)
        return [int(i) for i in self._epoch(epoch)[place * self.batch_size : (place + 1) * self.batch_size]]

    def observe(self, index: int, records: Sequence[int], groups: Sequence[Group]) -> None:
        """Nothing: what a batch brought does not change the order."""

    @property
    def state(self) -> Mapping[str, Any]:
        """Nothing: the order follows from the seed."""
        return {}

    @state.setter
    def state(self, state: Mapping[str, Any]) -> None: ...


class Sequential(Shuffled):
    """The records as they stand in the data, epoch after epoch."""

    def epoch(self, number: int) -> np.ndarray:
        return np.arange(self.count)


def shares(groups: Sequence[Group], world_size: int) -> list[list[int]]:
    """Divide groups among processes, each index once: near equal tokens."""
    return balanced([g.packed_length for g in groups], world_size)


def balanced(sizes: Sequence[int], world_size: int) -> list[list[int]]:
    """Divide things of these sizes among processes, each index once, the largest first to whoever has least."""
    load = [0] * world_size
    share: list[list[int]] = [[] for _ in range(world_size)]
    for i in sorted(range(len(sizes)), key=lambda i: (-sizes[i], i)):
        rank = min(range(world_size), key=lambda r: (load[r], r))
        share[rank].append(i)
        load[rank] += sizes[i]
    return [sorted(s) for s in share]


def iteration_seed(seed: int, iteration: int) -> int:
    """A seed of its own for each iteration."""
    return int(np.random.SeedSequence([seed, iteration]).generate_state(1, np.uint64)[0] >> 1)
