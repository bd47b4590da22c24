"""Where the expected gradients of RLOO and Dr. GRPO vanish, in closed form: `python limits.py runs/exact_rl`.

At a prefix, with Q(v) the worth of choosing v there and c the weight of the reward, a token's probability at rest is

    soft (RLOO)   π(v) ∝ π_ref(v)·exp(c·Q(v)/β), the penalties to come counted in Q: the optimum, for c = 1
    k2 in the loss, token by token: the same, but Q is of rewards alone
    k3 in the loss, token by token: π(v) = β·π_ref(v) / (λ - c·Q(v)), since its gradient is that of KL(π_ref‖π); λ such
    that they sum to 1

from the last token back to the first. c is 1 for a leave-one-out baseline and (K-1)/K where a group's mean includes the
response itself.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import yaml
from torch import Tensor
from transformers import AutoModelForCausalLM

from alignlab.benchmarks.evaluate import build_benchmark
from alignlab.benchmarks.exact import ExactWorld, completion_log_probs, policy_metrics
from alignlab.benchmarks.exact.enumeration import chain


def levels(values_XY: Tensor, world: ExactWorld) -> list[Tensor]:
    """Values of completions, parted by their number of words: shapes (X, V^k), k = 0 … L."""
    return list(values_XY.split([world.V**k for k in range(world.L + 1)], dim=1))


def next_token(logp_XY: Tensor, world: ExactWorld) -> list[Tensor]:
    """The inverse of `chain`: log-probs of the next token after each prefix, shapes (X, V^k, V + 1)."""
    parts, steps = levels(logp_XY, world), []
    reached = parts[-1]
    for k in reversed(range(world.L)):
        each = torch.cat([reached.reshape(world.X, -1, world.V), parts[k][..., None]], dim=-1)
        reached = each.logsumexp(-1)
        steps.append(each - reached[..., None])
    return steps[::-1]


def at_rest(ref: list[Tensor], reward_XY: Tensor, world: ExactWorld, kind: str, beta: float, c: float) -> Tensor:
    """Log-probs of all completions under the policy at which the gradient vanishes."""
    rewards, steps = levels(reward_XY, world), []
    worth = rewards[-1]
    for k in reversed(range(world.L)):
        q = torch.cat([worth.reshape(world.X, -1, world.V), rewards[k][..., None]], dim=-1)
        if kind == "k3":
            low = c * q.amax(-1, keepdim=True)
            high = low + beta
            for _ in range(200):
                middle = (low + high) / 2
                over = (beta * ref[k].exp() / (middle - c * q)).sum(-1, keepdim=True) > 1
                low, high = torch.where(over, middle, low), torch.where(over, high, middle)
            logp = (ref[k] - (high - c * q).log()).log_softmax(-1)
        else:
            logp = (ref[k] + c * q / beta).log_softmax(-1)
        worth = (logp.exp() * q).sum(-1)
        if kind == "soft":
            worth = beta / c * (ref[k] + c * q / beta).logsumexp(-1)
        steps.append(logp)
    return chain(steps[::-1])


def main(folder: Path, samples: int = 8) -> None:
    config = yaml.safe_load((folder / "config.yaml").read_text())
    benchmark = build_benchmark(config["benchmark"])
    world, beta = benchmark.world, benchmark.beta
    ref_logp_XY = completion_log_probs(AutoModelForCausalLM.from_pretrained(folder / "sft/model"), world)
    ref = next_token(ref_logp_XY, world)
    own = (samples - 1) / samples
    for name, kind, c in (("rloo", "soft", 1.0), ("dr_grpo_k2", "k2", own), ("dr_grpo", "k3", own)):
        found = policy_metrics(at_rest(ref, world.reward_XY, world, kind, beta, c), ref_logp_XY, world.reward_XY, beta)
        shown = ("objective_score", "frontier_efficiency", "reward", "kl")
        print(f"{name:12}", "  ".join(f"{k} {found[k]:.3f}" for k in shown))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
