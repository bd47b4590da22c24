"""The vocabulary: groups, batches, ragged operations, the interfaces. Imports torch and nothing else of ours."""

from alignlab.core.algorithm import Algorithm, Metrics, ModelKind, Outputs, aggregate
from alignlab.core.batch import Batch, Pairs, Unit
from alignlab.core.errors import (
    AlignlabError,
    ConfigError,
    DataError,
    Interrupted,
    NonFiniteError,
    PeerLost,
    StartAgain,
    did_you_mean,
    require,
)
from alignlab.core.group import Group, Response
from alignlab.core.interfaces import Benchmark, Sampler, Scorer
from alignlab.core.ragged import (
    segment_count,
    segment_max,
    segment_mean,
    segment_std,
    segment_sum,
    segments,
    split_segments,
)

__all__ = [
    "Algorithm",
    "AlignlabError",
    "Batch",
    "Benchmark",
    "ConfigError",
    "DataError",
    "Group",
    "Interrupted",
    "Metrics",
    "ModelKind",
    "NonFiniteError",
    "Outputs",
    "Pairs",
    "PeerLost",
    "Response",
    "Sampler",
    "Scorer",
    "StartAgain",
    "Unit",
    "aggregate",
    "did_you_mean",
    "require",
    "segment_count",
    "segment_max",
    "segment_mean",
    "segment_std",
    "segment_sum",
    "segments",
    "split_segments",
]
