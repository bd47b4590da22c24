"""The exact benchmark: a language small enough that policies, divergences and optima are computed, not estimated."""

from alignlab.benchmarks.exact.enumeration import completion_log_probs
from alignlab.benchmarks.exact.evaluation import evaluate_exact, figures
from alignlab.benchmarks.exact.language import ExactWorld, ExactWorldSettings
from alignlab.benchmarks.exact.process import demonstration_log_probs, demonstrations, process_log_probs
from alignlab.benchmarks.exact.scorer import ExactReward

__all__ = [
    "ExactReward",
    "ExactWorld",
    "ExactWorldSettings",
    "completion_log_probs",
    "demonstration_log_probs",
    "demonstrations",
    "evaluate_exact",
    "figures",
    "process_log_probs",
]
