"""Learning-rate schedules: functions of how much of the run is done, whatever limits it: steps, epochs, tokens or time.

The config group `schedule` names one by `_target_`; any callable from the share done to a factor will do (`Schedule`).
"""

from __future__ import annotations

import math

from pydantic import Field

from alignlab.core.settings import Settings


class Constant(Settings):
    """Rises linearly from 0 over `warmup`, a share of the run, and stays at the peak.

    Args:
        warmup: in [0, 1].
    """

    warmup: float = Field(0.0, ge=0, le=1)

    def __call__(self, done: float) -> float:
        """Factor on the peak learning rate when a share `done` in [0, 1] of the run is over."""
        done = min(max(done, 0.0), 1.0)
        if done < self.warmup:
            return done / self.warmup
        return self.after_warmup((done - self.warmup) / (1 - self.warmup) if self.warmup < 1 else 1.0)

    def after_warmup(self, done: float) -> float:
        """The factor when a share `done` in [0, 1] of what follows the warm-up is over."""
        return 1.0


class Linear(Constant):
    """Then falls linearly to `min_lr`.

    Args:
        min_lr: as a share of the peak, in [0, 1].
    """

    min_lr: float = Field(0.0, ge=0, le=1)

    def after_warmup(self, done: float) -> float:
        return self.min_lr + (1 - self.min_lr) * self.fall(done)

    def fall(self, done: float) -> float:
        """From 1 to 0."""
        return 1 - done


class Cosine(Linear):
    """Then falls to `min_lr` along half a cosine (Loshchilov & Hutter 2017, arXiv:1608.03983, equation 5)."""

    def fall(self, done: float) -> float:
        return (1 + math.cos(math.pi * done)) / 2
