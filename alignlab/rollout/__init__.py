"""Rollout: responses from a policy, with the log-probs of the distribution they were drawn from."""

from __future__ import annotations

from typing import Any

from alignlab.build import build
from alignlab.core import ConfigError, Environment, RolloutEngine
from alignlab.rollout.best_of import best_of
from alignlab.rollout.local import LocalRollout
from alignlab.rollout.monte_carlo import MonteCarloLabels
from alignlab.rollout.multi_turn import MultiTurn
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
    "StepSearch",
    "VllmRollout",
    "VllmSettings",
    "best_of",
    "build_engine",
    "build_environment",
    "filtered_log_probs",
]


def build_engine(values: Any) -> RolloutEngine:
    """The engine that the config's section `rollout` names: one of ours or anyone's on the Python path."""
    engine = build(values, "rollout")
    if not isinstance(engine, RolloutEngine):
        needed = ("temperature", "importance_cap", "off_policy", "prefetches", "check", "start", "sampler")
        missing = ", ".join(name for name in needed if not hasattr(engine, name))
        raise ConfigError(
            f"rollout._target_={values['_target_']}: is no rollout engine, it has no {missing}: subclass "
            "alignlab.rollout.BaseRollout"
        )
    return engine


def build_environment(values: Any) -> Environment | None:
    """The environment that the config's section `environment` names; None for null."""
    environment = build(values, "environment")
    if environment is not None and not isinstance(environment, Environment):
        raise ConfigError(
            f"environment._target_={values['_target_']}: an environment has `fills` and `rollout(sampler, groups, n, "
            "seed)`"
        )
    return environment
