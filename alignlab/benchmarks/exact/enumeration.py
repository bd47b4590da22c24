"""The exact probability of every completion, from a causal language model's logits at every prefix."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from alignlab.benchmarks.exact.language import ExactWorld
from alignlab.core.errors import AlignlabError, require
from alignlab.models import evaluating

ROWS = 4096
"""Run at once; bounds memory, does not change the result."""


def chain(step_logp: Sequence[Tensor]) -> Tensor:
    """Log-probs of all completions from those of each next token, in the order of `ExactWorld.words_YL`.

    Args:
        step_logp: for k = 0 … L - 1, log-probs of the next token after each of the V^k sequences of k words in
            lexicographic order, shape (X, V^k, V + 1); the last entry is the end token's.

    Returns:
        Shape (X, Y), in nats.
    """
    prompts = len(step_logp[0])
    reached = step_logp[0].new_zeros(prompts, 1)
    levels = []
    for logp in step_logp:
        levels.append(reached + logp[..., -1])
        reached = (reached[..., None] + logp[..., :-1]).reshape(prompts, -1)
    return torch.cat([*levels, reached], dim=1)


def completion_log_probs(network: nn.Module, world: ExactWorld, temperature: float = 1.0) -> Tensor:
    """log π(y|x) of every completion of every prompt, in nats, float64 on the CPU, shape (X, Y).

    The V^(L-1) longest prefixes of a prompt are run as plain rows of equal length, so there is neither padding nor a
    mask to get wrong; the logits of the shorter prefixes are read from the first row that begins with them. Log-probs
    are normalised in float64, so each prompt's probabilities sum to 1 to about 1e-14 whatever the network's precision.

    The network runs in evaluation mode and without gradient; afterwards it is in the mode that it had.

    Args:
        network: a causal language model: `network(input_ids=…, attention_mask=…, use_cache=False).logits`.
        world: the language; the network must have its vocabulary of V + 1 tokens.
        temperature: divides the logits, > 0; 1 is the model's own distribution.
    """
    require(temperature > 0, "temperature", temperature, "must be > 0")
    device = next(network.parameters()).device
    prefix_RL = world.words_YL[world.length_Y == world.L - 1, : world.L - 1]
    of_prompts = []
    with evaluating(network), torch.no_grad():
        for prompt_ids in world.prompt_ids:
            row = torch.tensor(prompt_ids).expand(len(prefix_RL), -1)
            rows = torch.cat([row, prefix_RL], dim=1).to(device)
            parts = [_next_token_logits(network, part, world) for part in rows.split(ROWS)]
            logp_RLV = (torch.cat(parts) / temperature).log_softmax(-1)
            # Sequences of k words: every V^(L-1-k)-th row is the first to begin with the next one of them.
            of_prompts.append([logp_RLV[:: world.V ** (world.L - 1 - k), k] for k in range(world.L)])
    return chain([torch.stack(level) for level in zip(*of_prompts, strict=True)])


def _next_token_logits(network: nn.Module, rows: Tensor, world: ExactWorld) -> Tensor:
    """Logits at the last L positions of each row, float64 on the CPU, shape (rows, L, V + 1)."""
    logits = network(input_ids=rows, attention_mask=torch.ones_like(rows), use_cache=False).logits
    if logits.shape[-1] != world.V + 1:
        raise AlignlabError(
            f"the model has a vocabulary of {logits.shape[-1]} tokens, the exact benchmark one of {world.V + 1}: "
            "evaluate models trained from the benchmark's own base model, with the same `words`"
        )
    return logits[:, -world.L :].cpu().double()
