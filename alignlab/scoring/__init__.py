"""Scoring: what fills columns of groups."""

from __future__ import annotations

from typing import Any

from alignlab.build import build_type
from alignlab.core import Scorer
from alignlab.core.parts import check_columns
from alignlab.scoring.combined import CombinedScorer, SeveralScorers
from alignlab.scoring.endpoint import Endpoint
from alignlab.scoring.judge import JudgePairs, JudgeScores
from alignlab.scoring.labels import BradleyTerryLabels
from alignlab.scoring.log_probs import fill_log_probs, fill_outputs
from alignlab.scoring.pairwise import PairwiseScorer
from alignlab.scoring.process_reward import ProcessRewardScorer
from alignlab.scoring.reward_model import RewardModelScorer
from alignlab.scoring.rules import FunctionScorer, StepCheckScorer

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
    "SeveralScorers",
    "StepCheckScorer",
    "build_scorers",
    "fill_log_probs",
    "fill_outputs",
]


def build_scorers(values: Any) -> list[Scorer]:
    """The scorers of the config's section `scoring`, which score one after the other: one with a `_target_`, a list of
    them, or several by name. None for null.

    Raises:
        ConfigError: one is no scorer, or cannot be made; two fill the same column.
    """
    if not values or (isinstance(values, dict) and "_target_" in values):
        named = {"scoring": values} if values else {}
    else:
        entries = values.items() if isinstance(values, dict) else enumerate(values)
        named = {f"scoring.{name}": entry for name, entry in entries}
    made: dict[str, Scorer] = {key: build_type(Scorer, entry, key) for key, entry in named.items()}
    check_columns(made)
    return list(made.values())
