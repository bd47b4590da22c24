"""The exact benchmark: a language small enough that policies, divergences and optima are computed, not estimated."""

from alignlab.benchmarks.exact.enumeration import completion_log_probs
from alignlab.benchmarks.exact.language import ExactReward, ExactWorld, ExactWorldSettings
from alignlab.benchmarks.exact.metrics import policy_metrics
from alignlab.benchmarks.exact.process import demonstration_log_probs, demonstrations, process_log_probs

__all__ = [
    "ExactReward",
    "ExactWorld",
    "ExactWorldSettings",
    "completion_log_probs",
    "demonstration_log_probs",
    "demonstrations",
    "policy_metrics",
    "process_log_probs",
]
