"""Scoring: what fills columns of groups."""

from __future__ import annotations

from typing import Any

from alignlab.build import build
from alignlab.core import ConfigError, Scorer
from alignlab.scoring.combined import CombinedScorer
from alignlab.scoring.endpoint import Endpoint
from alignlab.scoring.function import FunctionScorer
from alignlab.scoring.judge import JudgePairs, JudgeScores
from alignlab.scoring.labels import BradleyTerryLabels
from alignlab.scoring.log_probs import fill_log_probs, fill_outputs
from alignlab.scoring.pairwise import PairwiseScorer
from alignlab.scoring.process_reward import ProcessRewardScorer
from alignlab.scoring.reward_model import RewardModelScorer
from alignlab.scoring.step_check import StepCheckScorer

__all__ = [
    "BradleyTerryLabels",
    "CombinedScorer",
    "Endpoint",
    "FunctionScorer",
    "JudgePairs",
    "JudgeScores",
    "PairwiseScorer",
    "ProcessRewardScorer",
    "RewardModelScorer",
    "StepCheckScorer",
    "build_scorers",
    "fill_log_probs",
    "fill_outputs",
]


def build_scorers(values: Any) -> list[Scorer]:
    """The scorers that the config's section `scoring` names: one, a list of them, which score one after the other, or
    none."""
    entries = values if isinstance(values, list) else [values] if values else []
    scorers = [build(entry, f"scoring.{i}" if len(entries) > 1 else "scoring") for i, entry in enumerate(entries)]
    for entry, scorer in zip(entries, scorers, strict=True):
        if not isinstance(scorer, Scorer):
            raise ConfigError(f"scoring._target_={entry['_target_']}: a scorer has `fills` and `score(groups)`")
    return scorers
