"""Learning rate as a function of how much of the run is done, whatever limits it: steps, epochs, tokens or time."""

from __future__ import annotations

import math

from alignlab.training.settings import TrainingSettings


def learning_rate_factor(settings: TrainingSettings, done: float) -> float:
    """Factor on the peak learning rate when a share `done` in [0, 1] of the run is over."""
    done = min(max(done, 0.0), 1.0)
    if done < settings.warmup:
        return done / settings.warmup
    if settings.schedule == "constant":
        return 1.0
    rest = (done - settings.warmup) / (1 - settings.warmup) if settings.warmup < 1 else 1.0
    fall = 1 - rest if settings.schedule == "linear" else (1 + math.cos(math.pi * rest)) / 2
    return settings.min_lr + (1 - settings.min_lr) * fall
