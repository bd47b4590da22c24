"""Off-policy correction: how far the policy that sampled is from the one that is trained, and what is done about it."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from alignlab.algorithms.importance import importance
from alignlab.algorithms.policy_gradient import kl_estimate
from alignlab.core import Group, Response
from alignlab.core.group import is_per_token

log = logging.getLogger(__name__)

SUSPICIOUS = 0.2
"""Mean absolute difference of log-probs, in nats per token, that rounding does not explain: bfloat16's is some 0.02."""


def compare(groups: Sequence[Group], cap: float | None) -> dict[str, float]:
    """Metrics of the sampled responses of an iteration, from their `behaviour_logp` and the trainer's own `old_logp`,
    by token and in nats: `rollout_logp_difference` and its `_max`, the mean and largest absolute difference;
    `rollout_kl`, KL(π_b‖π_old) estimated by k3.

    Args:
        cap: fill `importance` with truncated weights, 1 for responses that were not sampled, and report their mean,
            `rollout_importance`; None: do not.
    """
    old_T, behaviour_T = [], []
    for response in (r for g in groups for r in g.responses):
        if cap is not None and "old_logp" in response.columns:
            response.columns["importance"] = np.ones(response.loss_tokens)
        if (pair := _pair(response)) is None:
            continue
        old_T.append(pair[0])
        behaviour_T.append(pair[1])
        if cap is not None:
            response.columns["importance"] = importance(*pair, cap).numpy()
    if not old_T:
        return {}
    old, behaviour = torch.cat(old_T), torch.cat(behaviour_T)
    difference = (old - behaviour).abs()
    found = {
        "rollout_logp_difference": float(difference.mean()),
        "rollout_logp_difference_max": float(difference.max()),
        "rollout_kl": float(kl_estimate(behaviour, old, "k3").mean()),
    }
    return found if cap is None else found | {"rollout_importance": float(importance(old, behaviour, cap).mean())}


def warn(report: dict[str, float]) -> None:
    """Say so where samples of the policy as it is do not look like it."""
    difference = report.get("rollout_logp_difference", 0.0)
    if difference > SUSPICIOUS:
        log.warning(
            "rollout.vllm: the server's log-probs are %.2g nats per token from the trainer's own. Has it the same "
            "base, in the same precision? Filters (top_k, top_p, min_p, suppress_tokens) count, too",
            difference,
        )


def _pair(response: Response) -> tuple[Tensor, Tensor] | None:
    """old_logp and behaviour_logp of a response, float64, where it has both and still has the tokens drawn."""
    old, behaviour = (response.columns.get(name) for name in ("old_logp", "behaviour_logp"))
    if (
        old is None
        or behaviour is None
        or not is_per_token(old)
        or np.shape(old) != np.shape(behaviour)
        or not np.size(old)
    ):
        return None
    return torch.tensor(old, dtype=torch.float64), torch.tensor(behaviour, dtype=torch.float64)
