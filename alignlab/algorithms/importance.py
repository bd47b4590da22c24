"""Samples from a policy that is not quite the one trained: truncated importance weights.

Where another program samples, or older weights did, the tokens come from π_b and not from π_old. Counting each by
min(π_old/π_b, C) corrects that, and the cap keeps the variance finite (Ionides 2008; for language models Yao et al.
2025, "Your Efficient RL Framework Secretly Brings You Off-Policy RL Training"). The clipped ratio π/π_old stays as it
is, so with older weights this is the decoupled objective of Hilton et al. (2022, arXiv:2110.00641, equation 7), its
weight truncated.
"""

from __future__ import annotations

from torch import Tensor

from alignlab.core import Algorithm, Batch


class PolicyGradient(Algorithm):
    """What weighs its policy loss by the column `importance`, one number per token, where responses have it."""


def weighted(policy_T: Tensor, batch: Batch) -> Tensor:
    """A policy-gradient loss (or whatever is linear in it) by token, times the tokens' importance weights, if any;
    the weights bear no gradient. Shape (T,)."""
    return policy_T * batch["importance_T"] if "importance_T" in batch else policy_T


def importance(old_logp_T: Tensor, behaviour_logp_T: Tensor, cap: float) -> Tensor:
    """min(π_old/π_b, cap), elementwise, from log-probs in nats.

    Args:
        old_logp_T: of the policy that is trained, before its first update on the samples.
        behaviour_logp_T: of the distribution that they were drawn from.
        cap: > 0.
    """
    return (old_logp_T - behaviour_logp_T).exp().clamp(max=cap)
