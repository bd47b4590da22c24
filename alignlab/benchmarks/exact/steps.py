"""What each word of a completion is worth, computed: the truth for a process reward model, whose steps are words."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from alignlab.benchmarks.exact.language import WORDS, ExactWorld
from alignlab.benchmarks.exact.process import demonstration_log_probs, sample


def prefix_values(world: ExactWorld, logp_XY: Tensor, value_XY: Tensor) -> Tensor:
    """E_{y'~π}[value(x, y') | y' begins with the words of y], for every completion y read as a prefix, shape (X, Y).

    The words of y may be all of y' or be followed by more, so of y = "" it is the mean over all completions, and of L
    words the completion's own value.

    Args:
        logp_XY: log π(y|x), normalised, shape (X, Y); a prefix that π never begins with has no value, nan.
        value_XY: what each completion is worth, float64, shape (X, Y).
    """
    levels = [world.V**k for k in range(world.L + 1)]  # completions of k words, in lexicographic order
    mass = list(logp_XY.exp().split(levels, dim=1))
    worth = [m * v for m, v in zip(mass, value_XY.split(levels, dim=1), strict=True)]
    for k in reversed(range(world.L)):  # those that go on with another word follow one another
        for total in (mass, worth):
            total[k] = total[k] + total[k + 1].unflatten(1, (levels[k], world.V)).sum(-1)
    return torch.cat(worth, dim=1) / torch.cat(mass, dim=1)


def successes(world: ExactWorld, logp_XY: Tensor) -> Tensor:
    """1.0 for completions whose reward is above their prompt's median under `logp_XY`, else 0.0, shape (X, Y).

    The median is the smallest reward that half of the probability does not exceed.
    """
    reward_XY, order_XY = world.reward_XY.sort(-1)
    cumulative_XY = logp_XY.exp().gather(-1, order_XY).cumsum(-1)
    place_X1 = (cumulative_XY < 0.5).sum(-1, keepdim=True)
    return (world.reward_XY > reward_XY.gather(-1, place_X1)).double()


def step_values(world: ExactWorld) -> Tensor:
    """The soft label of Math-Shepherd (Wang et al. 2023, arXiv:2312.08935, "soft estimation") without its sampling: the
    probability that a completion which begins with these words ends in success, in [0, 1], shape (X, Y).

    The completer is the distribution of the demonstrations, which the SFT policy learns; success is `successes`.
    """
    logp_XY = demonstration_log_probs(world)
    return prefix_values(world, logp_XY, successes(world, logp_XY))


def labelled_steps(world: ExactWorld, n: int, seed: int) -> list[dict[str, Any]]:
    """n completions as records `{"prompt", "steps": [" word", …], "soft_labels": [p, …]}`, the prompts in equal shares.

    Drawn from the distribution of the demonstrations, independently of these. The prompt and the steps joined without
    anything between them are the text, to be read with `data=steps data.step_separator=""`. The label of a step is
    `step_values` of the words up to it, rounded to six decimals; the last one does not know that no word follows, as a
    model that has read the words does not either.
    """
    generator = torch.Generator().manual_seed(seed + 1)
    value_XY = step_values(world)
    prompt_N = torch.arange(n)[torch.randperm(n, generator=generator)] % world.X
    completion_N = sample(demonstration_log_probs(world), prompt_N, generator)
    texts, records = world.prompt_texts, []
    for x, y in zip(prompt_N.tolist(), completion_N.tolist(), strict=True):
        words = world.words_of(world.token_ids(y))
        prefixes = [world.index([*words[: k + 1], world.end_id]) for k in range(len(words))]
        steps = [f" {WORDS[w]}" for w in words]
        labels = [round(value_XY[x, p].item(), 6) for p in prefixes]
        records.append({"prompt": texts[x], "steps": steps, "soft_labels": labels})
    return records
