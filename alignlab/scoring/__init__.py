"""Scoring: what fills columns of groups."""

from alignlab.scoring.function import FunctionScorer
from alignlab.scoring.labels import BradleyTerryLabels
from alignlab.scoring.log_probs import fill_log_probs, fill_outputs
from alignlab.scoring.reward_model import RewardModelScorer

__all__ = ["BradleyTerryLabels", "FunctionScorer", "RewardModelScorer", "fill_log_probs", "fill_outputs"]
