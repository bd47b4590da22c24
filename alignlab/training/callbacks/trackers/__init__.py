"""Where metrics go besides `metrics.jsonl`: each tracker by its library's own API, named by `tracker._target_`."""

from typing import Any

from alignlab.build import build_type
from alignlab.core import Tracker
from alignlab.training.callbacks.trackers.others import Mlflow, TensorBoard, Trackio
from alignlab.training.callbacks.trackers.wandb import Wandb, how_to_sync, named

__all__ = ["Mlflow", "TensorBoard", "Trackio", "Wandb", "build_tracker", "how_to_sync", "named"]


def build_tracker(values: dict[str, Any] | None) -> Tracker | None:
    """The tracker that a config's section names by `_target_`; None where it names none.

    Raises:
        ConfigError: there is no such tracker, or it refuses its settings.
    """
    if not values or not values.get("_target_"):
        return None
    made: Tracker = build_type(Tracker, values, "tracker")
    return made
