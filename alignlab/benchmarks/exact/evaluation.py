"""All figures of merit of a policy on the exact benchmark."""

from __future__ import annotations

from torch import Tensor, nn

from alignlab.benchmarks.exact import metrics
from alignlab.benchmarks.exact.enumeration import completion_log_probs
from alignlab.benchmarks.exact.language import ExactWorld


def evaluate_exact(
    network: nn.Module, reference_network: nn.Module, world: ExactWorld, beta: float, temperature: float = 1.0
) -> dict[str, float]:
    """The figures of `figures` for two networks.

    Where the reference is the policy with its adapter off, call `completion_log_probs` with it off and on, and give
    the two results to `figures`.

    Args:
        network: the policy, a causal language model as `completion_log_probs` wants it.
        reference_network: what its KL is measured to.
        world: the language.
        beta: the objective's price of a nat of KL, > 0, in units of reward.
        temperature: at which both are sampled, > 0.
    """
    logp_XY = completion_log_probs(network, world, temperature)
    return figures(logp_XY, completion_log_probs(reference_network, world, temperature), world.reward_XY, beta)


def figures(logp_XY: Tensor, ref_logp_XY: Tensor, reward_XY: Tensor, beta: float) -> dict[str, float]:
    """Figures of merit by name.

    `reward`, `kl` and `entropy` (nats per response) and `win_rate` (against the reference) of the policy; `objective`
    J, `objective_score`, `frontier_efficiency` (nan where the policy is the reference); for comparison
    `reference_reward`, `reference_entropy`, and `optimum_reward` and `optimum_kl` of the best policy at this `beta`.
    """
    optimum = metrics.optimum(ref_logp_XY, reward_XY, beta)
    return {
        "reward": metrics.expectation(logp_XY, reward_XY),
        "kl": metrics.kl_divergence(logp_XY, ref_logp_XY),
        "entropy": metrics.entropy(logp_XY),
        "win_rate": metrics.win_rate(logp_XY, ref_logp_XY, reward_XY),
        "objective": metrics.objective(logp_XY, ref_logp_XY, reward_XY, beta),
        "objective_score": metrics.objective_score(logp_XY, ref_logp_XY, reward_XY, beta),
        "frontier_efficiency": metrics.frontier_efficiency(logp_XY, ref_logp_XY, reward_XY),
        "reference_reward": metrics.expectation(ref_logp_XY, reward_XY),
        "reference_entropy": metrics.entropy(ref_logp_XY),
        "optimum_reward": metrics.expectation(optimum, reward_XY),
        "optimum_kl": metrics.kl_divergence(optimum, ref_logp_XY),
    }
