"""The language's own reward as a scorer: what a perfect reward model would say."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from alignlab.benchmarks.exact.language import ExactWorld
from alignlab.core.group import Group


class ExactReward:
    """Fills `reward` with the true reward, in [0, 1], from the token ids of prompt and response.

    Raises DataError where a prompt or a response is none of the language's.
    """

    fills: tuple[str, ...] = ("reward",)

    def __init__(self, world: ExactWorld) -> None:
        self.world = world

    def score(self, groups: Sequence[Group]) -> None:
        """Set `response.columns["reward"]` for every response of every group."""
        prompts, rows, responses = [], [], []
        for group in groups:
            x = self.world.prompt_index(group.prompt_ids, group.origin)
            for response in group.responses:
                words = self.world.words_of(response.token_ids, group.origin)
                prompts.append(x)
                rows.append(words + [self.world.end_id] * (self.world.L - len(words)))
                responses.append(response)
        if not responses:
            return
        reward_N = self.world.reward(torch.tensor(prompts), torch.tensor(rows))
        for response, reward in zip(responses, reward_N.tolist(), strict=True):
            response.columns["reward"] = reward
