"""Rewards from a trained reward model."""

from __future__ import annotations

from collections.abc import Sequence

from alignlab.core import AlignlabError, Group
from alignlab.models import ModelSettings, PackedModel, load_model


class RewardModelScorer:
    """Fills `reward` with the score of a sequence classifier with one output.

    Args:
        path: Hub id or folder of the reward model, e.g. the `model/` folder of a run.
        token_budget: tokens per forward pass.
        dtype: as in the model settings.
        device: where to put it; by default a GPU where there is one.
    """

    fills = ("reward",)

    def __init__(self, path: str, token_budget: int = 16384, dtype: str = "auto", device: str | None = None) -> None:
        self.settings = ModelSettings(path=path, dtype=dtype)  # type: ignore[arg-type]
        self.token_budget = token_budget
        self.device = device
        self._model: PackedModel | None = None

    @property
    def model(self) -> PackedModel:
        """The reward model, loaded when first needed."""
        if self._model is None:
            import torch

            device = self.device or ("cuda" if torch.cuda.is_available() else "cpu")
            self._model = load_model(self.settings, kind="score", trainable=False, device=device)
        return self._model

    def score(self, groups: Sequence[Group]) -> None:
        vocabulary = int(self.model.config.vocab_size)
        for group in groups:
            top = max(group.prompt_ids + [t for r in group.responses for t in r.token_ids], default=0)
            if top >= vocabulary:
                raise AlignlabError(
                    f"scoring.path={self.settings.path!r}: token {top} is outside its vocabulary of {vocabulary}: "
                    "the reward model must share the policy's tokenizer"
                )
        scores = self.model.outputs(groups, ("score",), self.token_budget)["score"]
        for response, score in zip((r for g in groups for r in g.responses), scores, strict=True):
            response.columns["reward"] = float(score)
