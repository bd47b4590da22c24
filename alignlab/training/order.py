"""Where an iteration's groups come from: records in a seeded order, or responses sampled for their prompts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache

import numpy as np

from alignlab.core import AlignlabError, Group


class Order:
    """A seeded order over records, in batches: batch i is the same whoever asks, whenever.

    Each epoch is a fresh permutation; its last batch may be smaller, so every record comes exactly once an epoch.
    """

    def __init__(self, count: int, batch_size: int, seed: int) -> None:
        if count == 0:
            raise AlignlabError("there are no records to train on")
        self.count, self.batch_size, self.seed = count, batch_size, seed
        self.batches_per_epoch = math.ceil(count / batch_size)
        self._epoch = lru_cache(maxsize=1)(self._permuted)

    def batch(self, index: int) -> list[int]:
        """Indices of the records of batch `index`, counted over all epochs."""
        epoch, place = divmod(index, self.batches_per_epoch)
        return self._epoch(epoch)[place * self.batch_size : (place + 1) * self.batch_size].tolist()

    def _permuted(self, epoch: int) -> np.ndarray:
        return np.random.default_rng([self.seed, epoch]).permutation(self.count)


def shares(groups: Sequence[Group], world_size: int) -> list[list[int]]:
    """Divide groups among processes, each index once, the longest first to whoever has least: near equal tokens."""
    load = [0] * world_size
    share: list[list[int]] = [[] for _ in range(world_size)]
    for i in sorted(range(len(groups)), key=lambda i: (-groups[i].packed_length, i)):
        rank = min(range(world_size), key=lambda r: (load[r], r))
        share[rank].append(i)
        load[rank] += groups[i].packed_length
    return [sorted(s) for s in share]


def iteration_seed(seed: int, iteration: int) -> int:
    """A seed of its own for each iteration."""
    return int(np.random.SeedSequence([seed, iteration]).generate_state(1, np.uint64)[0] >> 1)
