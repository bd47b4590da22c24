"""alignlab: which alignment algorithm should I use, and how far is it from the best that is possible?

The public API; see `alignlab.api`. Names are looked up when they are first used, so that `import alignlab` is quick.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from alignlab.algorithms.dpo import DPO
    from alignlab.algorithms.expert_iteration import ExpertIteration
    from alignlab.algorithms.grpo import GRPO
    from alignlab.algorithms.hinge import Hinge
    from alignlab.algorithms.ipo import IPO
    from alignlab.algorithms.kto import KTO
    from alignlab.algorithms.orpo import ORPO
    from alignlab.algorithms.pairwise_model import PairwiseModel
    from alignlab.algorithms.ppo import PPO
    from alignlab.algorithms.process_reward_model import ProcessRewardModel
    from alignlab.algorithms.reinforce_pp import ReinforcePP
    from alignlab.algorithms.rejection_sampling import RejectionSampling
    from alignlab.algorithms.reward_model import RewardModel
    from alignlab.algorithms.rloo import RLOO
    from alignlab.algorithms.rrhf import RRHF
    from alignlab.algorithms.sft import SFT
    from alignlab.algorithms.simpo import SimPO
    from alignlab.algorithms.slic import SLiC
    from alignlab.api import load, prompts, records, score, train
    from alignlab.core import Algorithm, AlignlabError, Batch, Group, Outputs, Response
    from alignlab.rollout.policy import Policy
    from alignlab.training.callbacks import Callback
    from alignlab.training.trainer import Trainer

_MODULES = {
    "api": ("load", "prompts", "records", "score", "train"),
    "core": ("Algorithm", "AlignlabError", "Batch", "Group", "Outputs", "Response"),
    "training.callbacks": ("Callback",),
    "rollout.policy": ("Policy",),
    "training.trainer": ("Trainer",),
    "algorithms.dpo": ("DPO",),
    "algorithms.expert_iteration": ("ExpertIteration",),
    "algorithms.grpo": ("GRPO",),
    "algorithms.hinge": ("Hinge",),
    "algorithms.ipo": ("IPO",),
    "algorithms.kto": ("KTO",),
    "algorithms.orpo": ("ORPO",),
    "algorithms.pairwise_model": ("PairwiseModel",),
    "algorithms.ppo": ("PPO",),
    "algorithms.process_reward_model": ("ProcessRewardModel",),
    "algorithms.reinforce_pp": ("ReinforcePP",),
    "algorithms.rejection_sampling": ("RejectionSampling",),
    "algorithms.reward_model": ("RewardModel",),
    "algorithms.rloo": ("RLOO",),
    "algorithms.rrhf": ("RRHF",),
    "algorithms.sft": ("SFT",),
    "algorithms.simpo": ("SimPO",),
    "algorithms.slic": ("SLiC",),
}
"""Which module of ours has which public names."""

_WHERE = {name: module for module, names in _MODULES.items() for name in names}

__all__ = [
    "DPO",
    "GRPO",
    "IPO",
    "KTO",
    "ORPO",
    "PPO",
    "RLOO",
    "RRHF",
    "SFT",
    "Algorithm",
    "AlignlabError",
    "Batch",
    "Callback",
    "ExpertIteration",
    "Group",
    "Hinge",
    "Outputs",
    "PairwiseModel",
    "Policy",
    "ProcessRewardModel",
    "ReinforcePP",
    "RejectionSampling",
    "Response",
    "RewardModel",
    "SLiC",
    "SimPO",
    "Trainer",
    "load",
    "prompts",
    "records",
    "score",
    "train",
]


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module 'alignlab' has no attribute {name!r}")
    import_module("alignlab.launch").quiet()
    return globals().setdefault(name, getattr(import_module(f"alignlab.{_WHERE[name]}"), name))


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])
