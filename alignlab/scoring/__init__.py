"""Scoring: what fills columns of groups."""

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
    "fill_log_probs",
    "fill_outputs",
]
