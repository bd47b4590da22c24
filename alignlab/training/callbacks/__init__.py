"""Callbacks: what happens beside the steps of a run."""

from alignlab.training.callbacks.callback import Callback, CheckpointEvery, Evaluation, Samples

__all__ = ["Callback", "CheckpointEvery", "Evaluation", "Samples"]
