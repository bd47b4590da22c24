"""Rewards from a trained reward model."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import ClassVar, Literal

from alignlab.core import AlignlabError, Group
from alignlab.models import ModelSettings, PackedModel, load_model


class ScoreModel:
    """A trained model that judges responses, loaded when it is first needed.

    Args:
        path: Hub id or folder of the model, e.g. the `model/` folder of a run.
        max_tokens_per_microbatch: tokens per forward pass.
        dtype: as in the model settings.
        device: where to put it; by default a GPU where there is one.
    """

    kind: ClassVar[Literal["score", "step"]] = "score"
    """A sequence classifier with one output, or a token classifier."""

    def __init__(
        self, path: str, max_tokens_per_microbatch: int = 16384, dtype: str = "auto", device: str | None = None
    ) -> None:
        self.settings = ModelSettings(path=path, dtype=dtype)  # type: ignore[arg-type]
        self.max_tokens_per_microbatch, self.device = max_tokens_per_microbatch, device

    @property
    def labels(self) -> int:
        """Outputs of the model."""
        return 1

    @cached_property
    def model(self) -> PackedModel:
        import torch

        device = self.device or ("cuda" if torch.cuda.is_available() else "cpu")
        return load_model(self.settings, kind=self.kind, labels=self.labels, trainable=False, device=device)

    def check_tokens(self, groups: Sequence[Group]) -> None:
        """Raise AlignlabError for a token outside the model's vocabulary."""
        vocabulary = int(self.model.config.vocab_size)
        for group in groups:
            top = max(group.prompt_ids + [t for r in group.responses for t in r.token_ids], default=0)
            if top >= vocabulary:
                raise AlignlabError(
                    f"scoring.path={self.settings.path!r}: token {top} is outside its vocabulary of {vocabulary}: "
                    "it must share the policy's tokenizer"
                )

    def scores(self, groups: Sequence[Group]) -> list[float]:
        """One for each response, in the order of the groups.

        Raises:
            AlignlabError: a token is outside the model's vocabulary.
        """
        self.check_tokens(groups)
        found = self.model.outputs(groups, ("score",), self.max_tokens_per_microbatch)
        return [float(s) for s in found.get("score", [])]


class RewardModelScorer(ScoreModel):
    """Fills `reward` with the score of a sequence classifier with one output; arguments as those of `ScoreModel`."""

    fills = ("reward",)

    def score(self, groups: Sequence[Group]) -> None:
        scores = self.scores(groups)
        for response, score in zip((r for g in groups for r in g.responses), scores, strict=True):
            response.columns["reward"] = score
