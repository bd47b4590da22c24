"""Where the language's sentences come from: a known process for the base model, a better one for demonstrations."""

from __future__ import annotations

import torch
from torch import Tensor

from alignlab.benchmarks.exact.enumeration import chain
from alignlab.benchmarks.exact.language import ExactWorld

END_PROBABILITY = (0.01, 0.06, 0.15, 0.3)
"""Probability that a sentence ends after 0, 1, 2, 3 … words; the last entry holds for all further lengths."""
SPREAD = 1.75
"""Half the width of the uniform distribution of the word scores, in nats. Larger means less entropy."""
DEMONSTRATION_BETA = 0.2
"""How far demonstrations lean towards the reward. Smaller is further."""


def process_log_probs(world: ExactWorld) -> Tensor:
    """log p(y|x) of the process that the base model learns, in nats, float64, shape (X, Y).

    A sentence continues its prompt word by word. Before each word it ends with a probability that depends on the
    number of words alone (`END_PROBABILITY`); else word v comes with probability ∝ exp(follow[previous, v] +
    topic[x, v]), whose scores are uniform in ±`SPREAD` and drawn from the world's seed. The reward plays no part.
    """
    follow_VV = _scores(world, "follow", world.V)
    topic_XV = _scores(world, "topic", world.X)
    word_XVV = (follow_VV[None] + topic_XV[:, None]).log_softmax(-1)
    last_X = torch.tensor([ids[-1] for ids in world.prompt_ids])

    steps = []
    for k in range(world.L):
        if k == 0:
            word = word_XVV[torch.arange(world.X), last_X][:, None]
        else:  # the last of k words varies fastest
            word = word_XVV.repeat(1, world.V ** (k - 1), 1)
        end = torch.tensor(END_PROBABILITY[min(k, len(END_PROBABILITY) - 1)], dtype=torch.float64)
        ending = end.log().expand(*word.shape[:-1], 1)
        steps.append(torch.cat([word + (1 - end).log(), ending], dim=-1))
    return chain(steps)


def demonstration_log_probs(world: ExactWorld) -> Tensor:
    """log p(y|x) of the demonstrations, in nats, float64, shape (X, Y): the process tilted mildly by the reward.

    p(y|x) ∝ process(y|x) · exp(r(x, y) / `DEMONSTRATION_BETA`), without the empty completion (-inf), which nobody would
    write down and which text data cannot hold.
    """
    tilted = process_log_probs(world) + world.reward_XY / DEMONSTRATION_BETA
    tilted[:, world.length_Y == 0] = float("-inf")
    return tilted.log_softmax(-1)


def demonstrations(world: ExactWorld, n: int, seed: int) -> list[dict[str, str]]:
    """n demonstrations as records `{"prompt", "completion"}`, in random order, the prompts in equal shares.

    A completion begins with a space, so that the two may be joined; the same `seed` gives the same records.
    """
    generator = torch.Generator().manual_seed(seed)
    prompt_N = torch.arange(n)[torch.randperm(n, generator=generator)] % world.X
    completion_N = sample(demonstration_log_probs(world), prompt_N, generator)
    texts = world.prompt_texts
    return [
        {"prompt": texts[x], "completion": " " + world.text(world.token_ids(y))}
        for x, y in zip(prompt_N.tolist(), completion_N.tolist(), strict=True)
    ]


def sample(logp_XY: Tensor, prompt_N: Tensor, generator: torch.Generator) -> Tensor:
    """A completion number for each prompt number, drawn from the prompt's row of log-probs, int64, shape (N,)."""
    cumulative_XY = logp_XY.exp().cumsum(-1)
    draw_N = torch.rand(len(prompt_N), dtype=torch.float64, generator=generator) * cumulative_XY[prompt_N, -1]
    y_N = torch.empty_like(prompt_N)
    for x, cumulative_Y in enumerate(cumulative_XY):
        y_N[prompt_N == x] = torch.searchsorted(cumulative_Y, draw_N[prompt_N == x], right=True)
    return y_N.clamp(max=logp_XY.shape[1] - 1)


def _scores(world: ExactWorld, purpose: str, rows: int) -> Tensor:
    rng = world.random(purpose)
    values = [[SPREAD * (2 * rng.random() - 1) for _ in range(world.V)] for _ in range(rows)]
    return torch.tensor(values, dtype=torch.float64)
