"""Rollout: responses from a policy, with the log-probs of the distribution they were drawn from."""

from __future__ import annotations

from typing import Any

from alignlab.build import build_type
from alignlab.core import Environment, RolloutEngine
from alignlab.rollout.local import LocalRollout
from alignlab.rollout.monte_carlo import MonteCarloLabels
from alignlab.rollout.multi_turn import MultiTurn
from alignlab.rollout.sampler import StepSampler, best_of, check_samples
from alignlab.rollout.sampling import filtered_log_probs
from alignlab.rollout.settings import BaseRollout, RolloutSettings, VllmSettings
from alignlab.rollout.step_search import StepSearch
from alignlab.rollout.vllm.client import ServerLost
from alignlab.rollout.vllm.engine import VllmRollout

__all__ = [
    "BaseRollout",
    "LocalRollout",
    "MonteCarloLabels",
    "MultiTurn",
    "RolloutSettings",
    "ServerLost",
    "StepSampler",
    "StepSearch",
    "VllmRollout",
    "VllmSettings",
    "best_of",
    "build_engine",
    "build_environment",
    "check_samples",
    "filtered_log_probs",
]


def build_engine(values: Any) -> RolloutEngine:
    """The engine of the config's section `rollout`: one of ours or anyone's on the Python path."""
    engine: RolloutEngine = build_type(RolloutEngine, values, "rollout")
    return engine


def build_environment(values: Any) -> Environment | None:
    """The environment of the config's section `environment`; None for null."""
    return None if values is None else build_type(Environment, values, "environment")
