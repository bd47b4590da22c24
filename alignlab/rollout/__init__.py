"""Rollout: responses from a policy, with the log-probs of the distribution they were drawn from."""

from alignlab.rollout.best_of import best_of
from alignlab.rollout.local import LocalEngine
from alignlab.rollout.monte_carlo import MonteCarloLabels
from alignlab.rollout.sampling import filtered_log_probs
from alignlab.rollout.settings import RolloutSettings
from alignlab.rollout.step_search import StepSearch

__all__ = ["LocalEngine", "MonteCarloLabels", "RolloutSettings", "StepSearch", "best_of", "filtered_log_probs"]
