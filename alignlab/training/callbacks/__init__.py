"""Callbacks: what happens beside the steps of a run."""

from alignlab.core import Callback
from alignlab.training.callbacks.callback import CheckpointEvery, Evaluation, Samples

__all__ = ["Callback", "CheckpointEvery", "Evaluation", "Samples"]
