"""Off-policy correction: truncated importance weights for samples of a policy that is not quite the one trained.

If another program samples, or older weights do, tokens come from π_b and not from π_old. Weighing each token by
min(π_old/π_b, C) corrects that; the cap C bounds the variance (Ionides 2008; for language models Yao et al. 2025, "Your
Efficient RL Framework Secretly Brings You Off-Policy RL Training"). The clipped ratio π/π_old does not change. With
older weights this is the decoupled objective of Hilton et al. (2022, arXiv:2110.00641, equation 7), truncated.

An algorithm that uses it sets `off_policy_correction`.
"""

from __future__ import annotations

from torch import Tensor

from alignlab.core import Batch


def importance(old_logp_T: Tensor, behaviour_logp_T: Tensor, cap: float) -> Tensor:
    """min(π_old/π_b, cap), elementwise, shape (T,).

    Args:
        old_logp_T: log-probs under the policy that is trained, before its first update on the samples, in nats.
        behaviour_logp_T: log-probs under the distribution that the tokens were drawn from, in nats.
        cap: the largest weight, > 0.
    """
    return (old_logp_T - behaviour_logp_T).exp().clamp(max=cap)


def weighted(policy_T: Tensor, batch: Batch) -> Tensor:
    """A policy-gradient loss by token, times the column `importance` if the batch has it, shape (T,).

    The weights have no gradient.
    """
    return policy_T * batch["importance_T"] if "importance_T" in batch else policy_T
