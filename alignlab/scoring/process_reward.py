"""Rewards from a process reward model: a score for the solution, and one for each of its steps."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Literal

import numpy as np

from alignlab.core import AlignlabError, Group, Response
from alignlab.core.group import numbers
from alignlab.data import DataSettings
from alignlab.data.encode import Encoder
from alignlab.data.steps import Steps
from alignlab.models.files import ADAPTER_WEIGHTS, KEY, check_folder, header, naming, read_config, saved_adapter
from alignlab.scoring.reward_model import ScoreModel

HEADS = ("score.weight", "classifier.weight")
"""How the names of a step head's weights end."""

Aggregate = Literal["product", "minimum", "last", "mean"]


def solution_score(right: Sequence[float], aggregate: Aggregate) -> float:
    """One number from P(right) of each step, in [0, 1].

    "product" is the probability that all are right, were they independent (Lightman et al. 2023, arXiv:2305.20050,
    section 2.6); "minimum" that of the worst (Math-Shepherd, arXiv:2312.08935, section 3.4); "last" suits labels that
    say whether all is right so far. The product of more steps is smaller.
    """
    if aggregate == "product":
        return math.prod(right)
    if aggregate == "minimum":
        return min(right)
    return right[-1] if aggregate == "last" else math.fsum(right) / len(right)


def spread(response: Response, ends: Sequence[int], values: Sequence[float]) -> np.ndarray:
    """The values of steps as a column: at the step's last loss-bearing token, 0 at all others."""
    predicted = response.predicted
    column = [0.0] * len(predicted)
    for end, value in zip(ends, values, strict=True):
        column[max(bisect_right(predicted, end) - 1, 0)] += value
    return numbers(column)


class ProcessRewardScorer(ScoreModel):
    """Fills `reward` with the score of the solution and `step_reward` with P(right) at the ends of steps, 0 elsewhere.

    P(right) is the probability of the last of the model's labels. An algorithm that adds up `step_reward` rewards long
    solutions; one that reads `reward` alone does not.

    Args:
        path: Hub id or folder of a token classifier, e.g. the `model/` folder of a run.
        aggregate: how the steps make the solution's score, see `solution_score`.
        step_separator: text that parts the steps, as in the data it was trained on.
        step_token: the token at which it was trained to judge, as in that data. It is put after each step of a
            response that has none; null: the end of the step itself.
        max_tokens_per_microbatch: tokens per forward pass.
        dtype: as in the model settings.
        device: where to put it; by default a GPU where there is one.
    """

    kind = "step"
    fills = ("reward", "step_reward")

    def __init__(
        self,
        path: str,
        aggregate: Aggregate = "product",
        step_separator: str = "\n",
        step_token: str | None = None,
        max_tokens_per_microbatch: int = 16384,
        dtype: str = "auto",
        device: str | None = None,
    ) -> None:
        super().__init__(path, max_tokens_per_microbatch, dtype, device)
        self.aggregate = aggregate
        self.step_separator, self.step_token = step_separator, step_token

    @property
    def labels(self) -> int:
        return count_labels(self.settings.path)

    @cached_property
    def steps(self) -> Steps:
        return Steps(self.model.tokenizer, self.step_separator, self.step_token)

    @cached_property
    def _unmarked(self) -> Steps:
        return Steps(self.model.tokenizer, self.step_separator)

    def score(self, groups: Sequence[Group]) -> None:
        for group, judged in zip(groups, self.judge(groups), strict=True):
            for response, (ends, right) in zip(group.responses, judged, strict=True):
                response.columns["reward"] = solution_score(right, self.aggregate)
                response.columns["step_reward"] = spread(response, ends, right)

    def judge(self, groups: Sequence[Group]) -> list[list[tuple[list[int], list[float]]]]:
        """For each response of each group, the ends of its steps and P(right) of each.

        Raises:
            AlignlabError: a token is outside the model's vocabulary.
        """
        ends, views = [], []
        for group in groups:
            found = [self._view(r, group.origin) for r in group.responses]
            ends.append([e for e, _ in found])
            views.append(group.with_responses([view for _, view in found]))
        self.check_tokens(views)
        if not any(ends):
            return [[] for _ in groups]
        logits = iter(self.model.outputs(views, ("step",), self.max_tokens_per_microbatch)["step"])
        return [[(e, _probability(next(logits))) for e in some] for some in ends]

    def _view(self, response: Response, origin: str) -> tuple[list[int], Response]:
        """The ends of its steps, and what the model reads: the response, with step tokens if it was trained so."""
        if self.steps.token_id is None or self.steps.by_token(response):
            ends = self.steps.ends(response.token_ids)
            return ends, self._at(response, response.token_ids, ends)
        ends = self._unmarked.ends(response.token_ids)
        text = self.steps.join(self._unmarked.split(response.token_ids))
        ids = self._encoder.continuations([text])[0]
        marks = self.steps.ends(ids)
        if len(marks) != len(ends):
            raise AlignlabError(
                f"{origin or 'a group'}: scoring.step_token={self.step_token!r} is not found after each of "
                f"{len(ends)} steps of a response: does the tokenizer merge it with the text?"
            )
        return ends, self._at(response, ids, marks)

    @staticmethod
    def _at(response: Response, ids: list[int], ends: Sequence[int]) -> Response:
        chosen = set(ends)
        return replace(response, token_ids=ids, loss_mask=[i in chosen for i in range(len(ids))], columns={})

    @cached_property
    def _encoder(self) -> Encoder:
        return Encoder(self.model.tokenizer, DataSettings())


def _probability(logits_SL: object) -> list[float]:
    """P(right) of each step from the logits of its labels: that of the last label, or the sigmoid of the only one."""
    from torch import Tensor

    assert isinstance(logits_SL, Tensor)
    logits = logits_SL.double()
    right = logits.sigmoid()[:, 0] if logits.shape[-1] == 1 else logits.softmax(-1)[:, -1]
    return [float(p) for p in right]


def count_labels(path: str) -> int:
    """Outputs of a saved token classifier; of an adapter, by the head that was saved with it."""
    with naming("scoring.path"):
        check_folder(path)
        weights = Path(path) / ADAPTER_WEIGHTS
        if not weights.is_file():
            return 2 if saved_adapter(path) else int(read_config(path).num_labels)
        heads = [shape for name, (_, shape) in header(weights, f"{KEY}={path!r}").items() if name.endswith(HEADS)]
        return heads[0][0] if heads else 2
