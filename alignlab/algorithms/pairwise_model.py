"""A ranking model that reads both responses, as that of SLiC-HF (Zhao et al. 2023, arXiv:2305.10425, section 2.3).

It is a sequence classifier of prompt · first response · separator · second response, whose score is the log-odds that
the first is better. Each pair is read in both orders, so that neither place is favoured.
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
"""Under which a tokenizer's config keeps the rendering: so it goes wherever the model goes."""


@dataclass(frozen=True)
class Rendering:
    """How two responses to a prompt become one text; the same in training and in scoring.

    Attributes:
        separator_ids: what stands between them.
        limit: most tokens of prompt, both responses and separator; None where there is no limit.
    """

    separator_ids: tuple[int, ...]
    limit: int | None = None

    def problem(self, group: Group) -> str | None:
        """Why no two responses to a prompt can be read, or None."""
        if self.limit is None or len(group.prompt_ids) + len(self.separator_ids) + 2 <= self.limit:
            return None
        return (
            f"its prompt of {len(group.prompt_ids)} tokens leaves no room for two responses in the {self.limit} that "
            "a pairwise model reads (algorithm.max_length): see data.max_prompt_length"
        )

    def pair(self, group: Group, i: int, j: int) -> Group:
        """Responses i and j of a group in both orders, (i, j) first, as a group of two.

        All tokens stay, an end token in the middle too: whether the first response ended by itself is part of what
        is compared. Over the limit the longer response loses its end, then both, alike in both orders.

        Raises:
            DataError: the prompt alone is over the limit.
        """
        problem = self.problem(group)
        if problem:
            raise DataError(f"{group.origin or 'a group'}: {problem}")
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
    """The rendering with a tokenizer's ids. Without a `max_length` the tokenizer's own limit counts, if it has one.

    Raises:
        ConfigError: the tokenizer has no tokens for the separator.
    """
    try:
        ids = list(tokenizer(separator, add_special_tokens=False)["input_ids"])
    except Exception as error:  # tokenizers without an unknown token raise what they like
        raise ConfigError(
            f"algorithm.separator={separator!r}: the tokenizer cannot write it ({error}): choose words that it knows, "
            "or its end token"
        ) from error
    require(bool(ids), "algorithm.separator", separator, "has no tokens: choose a text that the tokenizer knows")
    own = int(getattr(tokenizer, "model_max_length", 0) or 0)
    return Rendering(tuple(ids), max_length or (own if 0 < own < 1 << 30 else None))


class PairwiseModel(Algorithm):
    """Learns P(first ≻ second) from preferences, as a cross-entropy over both orders of each pair, in nats.

    Args:
        separator: text between the two responses; must have tokens.
        max_length: tokens of prompt, both responses and separator at most, over which responses lose their ends;
            None: the tokenizer's own limit.
    """

    unit = "pair"
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
        if len(group.responses) < 2:
            return "a pairwise model needs at least two responses to compare"
        return self._rendering.problem(group)

    @property
    def _rendering(self) -> Rendering:
        if self.rendering is None:
            raise AlignlabError("a pairwise model needs setup(tokenizer) before it reads anything")
        return self.rendering

    def arrange(self, groups: Sequence[Group]) -> list[Group]:
        """A group for each pair: better response first, then worse first, with the `preference` for the one that
        comes first."""
        found = []
        for group in groups:
            for winner, loser, probability, _ in compared(group):
                pair = self._rendering.pair(group, winner, loser)
                for response, chance in zip(pair.responses, (probability, 1 - probability), strict=True):
                    response.columns["preference"] = chance
                found.append(pair)
        return found

    def loss(self, outputs: Outputs, batch: Batch) -> tuple[Tensor, Metrics]:
        pairs = batch.pairs  # the "winner" is the order in which the better response comes first
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
