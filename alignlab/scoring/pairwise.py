"""Preferences from a model that reads two responses at once: of pairs, by knock-out, or all against all."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Literal

from alignlab.algorithms.pairwise_model import KEY, Rendering, rendering_of
from alignlab.core import ConfigError, Group, require
from alignlab.scoring.reward_model import ScoreModel

Match = tuple[int, int, int]
"""Group, first response, second response, as indices."""

Compare = Callable[[Sequence[Match]], list[float]]
"""The probability that the first response is the better one, for each match."""


def knock_out(sizes: Sequence[int], compare: Compare) -> list[list[int]]:
    """Tournaments in groups of these sizes: the response that each one lost to, or -1 for the champion.

    Neighbours meet; winners of a round meet in the next (Zhao et al. 2023, arXiv:2305.10425, section 2.3): m responses
    take m − 1 matches, each of which makes a pair of winner and loser. Where one is left over it sits out the round and
    plays first in the next. Of equals the earlier one wins. The groups' rounds are played together, so that a model
    is called ⌈log₂ m⌉ times.
    """
    lost = [[-1] * size for size in sizes]
    standing = [list(range(size)) for size in sizes]
    while any(len(left) > 1 for left in standing):
        matches = [(g, left[k], left[k + 1]) for g, left in enumerate(standing) for k in range(0, len(left) - 1, 2)]
        standing = [left[len(left) - len(left) % 2 :] for left in standing]
        for (g, i, j), chance in zip(matches, compare(matches), strict=True):
            winner, loser = (i, j) if chance >= 0.5 else (j, i)
            lost[g][loser] = winner
            standing[g].append(winner)
    return lost


def round_robin(sizes: Sequence[int], compare: Compare) -> list[list[float]]:
    """Mean probability of winning against each of the others, in [0, 1]; 1/2 for a response that has none."""
    matches = [(g, i, j) for g, size in enumerate(sizes) for i in range(size) for j in range(i + 1, size)]
    won = [[0.0] * size for size in sizes]
    for (g, i, j), chance in zip(matches, compare(matches), strict=True):
        won[g][i] += chance
        won[g][j] += 1 - chance
    return [[w / (len(group) - 1) if len(group) > 1 else 0.5 for w in group] for group in won]


class PairwiseScorer(ScoreModel):
    """Orders the responses of a group by a model trained with `algorithm=pairwise_model`.

    Each pair is read in both orders, and the two probabilities are averaged: the place has no say. How a pair is
    written, the model's tokenizer says, where training left it.

    Args:
        path: Hub id or folder of the model, e.g. the `model/` folder of a run.
        how: "tournament" fills `preference` in groups of two and `lost_to` in others, by a knock-out tournament with
            one comparison less than there are responses; "round_robin" compares all pairs and fills `score` with the
            mean probability of winning.
        max_tokens_per_microbatch: tokens per forward pass.
        dtype: as in the model settings.
        device: where to put it; by default a GPU where there is one.
    """

    def __init__(
        self,
        path: str,
        how: Literal["tournament", "round_robin"] = "tournament",
        max_tokens_per_microbatch: int = 16384,
        dtype: str = "auto",
        device: str | None = None,
    ) -> None:
        super().__init__(path, max_tokens_per_microbatch, dtype, device)
        require(how in ("tournament", "round_robin"), "scoring.how", how, "must be tournament or round_robin")
        self.how = how
        self.fills = ("score",) if how == "round_robin" else ("preference", "lost_to")

    @property
    def rendering(self) -> Rendering:
        """As in training.

        Raises:
            ConfigError: the model was not trained to compare.
        """
        found = self.model.tokenizer.init_kwargs.get(KEY)
        if not found:
            raise ConfigError(
                f"scoring.path={self.settings.path!r}: not a pairwise model: train one with algorithm=pairwise_model, "
                "or use scoring=reward_model"
            )
        return rendering_of(self.model.tokenizer, str(found["separator"]), found["max_length"])

    def score(self, groups: Sequence[Group]) -> None:
        rendering = self.rendering

        def compare(matches: Sequence[Match]) -> list[float]:
            pairs = [rendering.pair(groups[g], i, j) for g, i, j in matches]
            scores = self.scores(pairs)
            return [(_sigmoid(s) + _sigmoid(-t)) / 2 for s, t in zip(scores[::2], scores[1::2], strict=True)]

        if self.how == "round_robin":
            ranks = round_robin([len(g.responses) for g in groups], compare)
            for group, values in zip(groups, ranks, strict=True):
                _fill(group, "score", values)
            return
        pairs = [g for g, group in enumerate(groups) if len(group.responses) == 2]
        for g, chance in zip(pairs, compare([(g, 0, 1) for g in pairs]), strict=True):
            _fill(groups[g], "preference", [chance, 1 - chance])
        sizes = [0 if len(g.responses) == 2 else len(g.responses) for g in groups]
        for group, lost in zip(groups, knock_out(sizes, compare), strict=True):
            if lost:
                _fill(group, "lost_to", lost)


def _fill(group: Group, column: str, values: Sequence[float]) -> None:
    for response, value in zip(group.responses, values, strict=True):
        response.columns[column] = float(value)


def _sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x)) if x >= 0 else math.exp(x) / (1 + math.exp(x))
