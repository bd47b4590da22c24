"""A ranking model that reads two responses at once, as in SLiC-HF (Zhao et al. 2023, arXiv:2305.10425, section 2.3).

It is a sequence classifier. It reads prompt · first response · separator · second response; its score is the log-odds
that the first response is better. Each pair is read in both orders, so that neither position has an advantage.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from alignlab.algorithms.reward_model import bradley_terry_loss, calibration, calibration_error
from alignlab.core import Algorithm, Batch, Group, Metrics, Outputs, Response
from alignlab.core.errors import AlignlabError, ConfigError, DataError, require
from alignlab.core.order import compared

KEY = "pairwise"
"""Key in the tokenizer's config that holds the rendering: it is saved and loaded with the model."""


@dataclass(frozen=True)
class Rendering:
    """How two responses to a prompt become one text; the same in training and in scoring.

    Attributes:
        separator_ids: tokens between the two responses.
        limit: largest number of tokens of prompt, separator and both responses; None: no limit.
    """

    separator_ids: tuple[int, ...]
    limit: int | None = None

    def problem(self, group: Group) -> str | None:
        """Why the prompt is too long for two responses after it, or None."""
        if self.limit is None or len(group.prompt_ids) + len(self.separator_ids) + 2 <= self.limit:
            return None
        return (
            f"its prompt of {len(group.prompt_ids)} tokens leaves no room for two responses in the {self.limit} that "
            "a pairwise model reads (algorithm.max_length): see data.max_prompt_length"
        )

    def pair(self, group: Group, i: int, j: int) -> Group:
        """Responses i and j of a group as a group of two texts: (i, j), then (j, i).

        All tokens stay, also an end token in the middle: it shows that the first response ended by itself. If a text
        is over the limit, the end of the longer response is cut off, then that of both; the same in both orders.

        Raises:
            DataError: the prompt leaves no room for responses.
        """
        if problem := self.problem(group):
            raise DataError(f"{group.place}: {problem}")
        a, b = group.responses[i], group.responses[j]
        keep_a, keep_b = len(a.token_ids), len(b.token_ids)
        if self.limit is not None:
            room = self.limit - len(group.prompt_ids) - len(self.separator_ids)
            keep_a, keep_b = min(keep_a, max(room // 2, room - keep_b)), min(keep_b, max(room // 2, room - keep_a))
        return group.with_responses([self._joined(a, keep_a, b, keep_b), self._joined(b, keep_b, a, keep_a)])

    def _joined(self, first: Response, keep_first: int, second: Response, keep_second: int) -> Response:
        ids = [*first.token_ids[:keep_first], *self.separator_ids, *second.token_ids[:keep_second]]
        whole = second.finished and keep_second == len(second.token_ids)
        return Response(ids, finished=whole, text=f"{first.text}\n~\n{second.text}", source=first.source)


def rendering_of(tokenizer: Any, separator: str, max_length: int | None = None) -> Rendering:
    """The rendering for a tokenizer.

    Args:
        max_length: limit in tokens; None: the tokenizer's `model_max_length`, if it has one.

    Raises:
        ConfigError: the tokenizer has no tokens for the separator.
    """
    try:
        ids = list(tokenizer(separator, add_special_tokens=False)["input_ids"])
    except Exception as error:  # without an unknown token a tokenizer may raise any kind of error
        raise ConfigError(
            f"algorithm.separator={separator!r}: the tokenizer cannot encode it ({error}): choose words that it knows, "
            "or its end token"
        ) from error
    require(bool(ids), "algorithm.separator", separator, "has no tokens: choose a text that the tokenizer knows")
    own = int(getattr(tokenizer, "model_max_length", 0) or 0)
    return Rendering(tuple(ids), max_length or (own if 0 < own < 1 << 30 else None))


class PairwiseModel(Algorithm):
    """Learns P(first ≻ second) from preferences: cross-entropy, in nats, a mean over both orders of each pair.

    Args:
        separator: text between the two responses, of at least one token.
        max_length: limit for prompt, separator and both responses, in tokens, >= 4; None: the tokenizer's own limit.

    Raises:
        ConfigError: max_length is below 4.
    """

    unit = "pair"
    min_responses = 2
    model = "score"
    reads = frozenset({"score"})

    def __init__(self, separator: str = "\n\nAnother answer:\n\n", max_length: int | None = None) -> None:
        require(max_length is None or max_length >= 4, "algorithm.max_length", max_length, "must be at least 4")
        self.separator, self.max_length = separator, max_length
        self.rendering: Rendering | None = None

    def setup(self, tokenizer: Any) -> None:
        self.rendering = rendering_of(tokenizer, self.separator, self.max_length)
        tokenizer.init_kwargs[KEY] = {"separator": self.separator, "max_length": self.rendering.limit}

    def check(self, group: Group) -> str | None:
        return super().check(group) or self._rendering.problem(group)

    @property
    def _rendering(self) -> Rendering:
        if self.rendering is None:
            raise AlignlabError("PairwiseModel has no tokenizer yet: call setup(tokenizer) first")
        return self.rendering

    def arrange(self, groups: Sequence[Group]) -> list[Group]:
        """A group of two texts for each pair, in both orders; `preference`: P(the first response is preferred)."""
        found = []
        for group in groups:
            for winner, loser, probability, _ in compared(group):
                pair = self._rendering.pair(group, winner, loser)
                for response, chance in zip(pair.responses, (probability, 1 - probability), strict=True):
                    response.columns["preference"] = chance
                found.append(pair)
        return found

    def loss(self, outputs: Outputs, batch: Batch) -> tuple[Tensor, Metrics]:
        pairs = batch.pairs  # "winner": the text in which the better response comes first
        better_P, worse_P = outputs.score_N[pairs.winner_P], outputs.score_N[pairs.loser_P]
        sure_P = pairs.probability_P
        loss_P = (bradley_terry_loss(better_P, sure_P) + bradley_terry_loss(-worse_P, sure_P)) / 2
        margin_P = (better_P - worse_P) / 2
        return loss_P, {
            "accuracy": (margin_P > 0).float(),
            "margin": margin_P,
            "position_bias": (better_P + worse_P) / 2,
            **calibration(margin_P, sure_P),
        }

    def derive(self, means: Mapping[str, float]) -> dict[str, float]:
        return calibration_error(means)
