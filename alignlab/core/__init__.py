"""The vocabulary: groups, batches, ragged operations, the Protocols. It imports nothing else of this package.

torch is imported when a name that needs it is first used, so that commands which compute nothing start quickly.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from alignlab.core.errors import (
    AlignlabError,
    ConfigError,
    DataError,
    Interrupted,
    NonFiniteError,
    PeerLost,
    SamplerLost,
    StartAgain,
    did_you_mean,
    require,
    require_choice,
)
from alignlab.core.example import BadRecord, Example
from alignlab.core.group import Group, Response
from alignlab.core.interfaces import (
    AdapterKind,
    Benchmark,
    Callback,
    DataOrder,
    HasBaseModel,
    HasReward,
    MeasuresBestOf,
    NeedsPolicy,
    NeedsSampler,
    Parser,
    Reports,
    Schedule,
    Scorer,
    Tracker,
    TrainingBenchmark,
)
from alignlab.core.sampling import (
    Environment,
    ExactSampler,
    GatheringEngine,
    PrefetchingSampler,
    RestingSampler,
    RolloutContext,
    RolloutEngine,
    Sampler,
)

if TYPE_CHECKING:
    from alignlab.core.algorithm import Algorithm, Metrics, ModelKind, Outputs, aggregate
    from alignlab.core.batch import Batch, Pairs, Unit
    from alignlab.core.ragged import (
        segment_count,
        segment_max,
        segment_mean,
        segment_std,
        segment_sum,
        segments,
    )

__all__ = [
    "AdapterKind",
    "Algorithm",
    "AlignlabError",
    "BadRecord",
    "Batch",
    "Benchmark",
    "Callback",
    "ConfigError",
    "DataError",
    "DataOrder",
    "Environment",
    "ExactSampler",
    "Example",
    "GatheringEngine",
    "Group",
    "HasBaseModel",
    "HasReward",
    "Interrupted",
    "MeasuresBestOf",
    "Metrics",
    "ModelKind",
    "NeedsPolicy",
    "NeedsSampler",
    "NonFiniteError",
    "Outputs",
    "Pairs",
    "Parser",
    "PeerLost",
    "PrefetchingSampler",
    "Reports",
    "Response",
    "RestingSampler",
    "RolloutContext",
    "RolloutEngine",
    "Sampler",
    "SamplerLost",
    "Schedule",
    "Scorer",
    "StartAgain",
    "Tracker",
    "TrainingBenchmark",
    "Unit",
    "aggregate",
    "did_you_mean",
    "require",
    "require_choice",
    "segment_count",
    "segment_max",
    "segment_mean",
    "segment_std",
    "segment_sum",
    "segments",
]

WITH_TORCH = ("algorithm", "batch", "ragged")
"""Modules that import torch: imported when one of their names is first used."""


def __getattr__(name: str) -> Any:
    if name in __all__:
        for module in map(import_module, (f"{__name__}.{m}" for m in WITH_TORCH)):
            if hasattr(module, name):
                return globals().setdefault(name, getattr(module, name))
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
