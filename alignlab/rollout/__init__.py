"""Rollout: responses from a policy, with the log-probs of the distribution they were drawn from."""

from alignlab.rollout.best_of import best_of
from alignlab.rollout.local import LocalEngine
from alignlab.rollout.sampling import filtered_log_probs
from alignlab.rollout.settings import RolloutSettings

__all__ = ["LocalEngine", "RolloutSettings", "best_of", "filtered_log_probs"]
