"""Rewards from a trained reward model."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from statistics import fmean, pstdev
from typing import Any, ClassVar, Literal

from alignlab.core import AlignlabError, ConfigError, Group
from alignlab.models import ModelSettings, PackedModel, load_model


class ScoreModel:
    """A trained model that judges responses, loaded when training or a measurement begins.

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
        return load_model(
            self.settings, kind=self.kind, labels=self.labels, trainable=False, device=device, key="scoring.path"
        )

    def bind(self, policy: Any, tokenizer: Any) -> None:
        """Load the model now: one that cannot be loaded is found before responses are drawn for it."""
        _ = self.model

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
    """Fills `reward` with the score s of a sequence classifier with one output, or with gain·s + bias.

    Gain and bias are such that the rewards of a given set of responses have mean 0, and with "std" variance 1, too.
    Ziegler et al. (2019, arXiv:1909.08593, section 2) do that with 256 samples of the reference policy, and Stiennon et
    al. (2020, arXiv:2009.01325, section 3.4) with the mean of the demonstrations. A `kl_coef` and a `missing_eos_score`
    hold for the scale of the rewards that they were chosen for.

    Args:
        path, max_tokens_per_microbatch, dtype, device: as of `ScoreModel`.
        normalize: "mean", "std" or None: the scores as they are.
        normalize_data: those responses: settings of `data` (path, parser, fields, …), prepared with the policy's
            tokenizer. A file that `alignlab sample` wrote, or one of demonstrations.

    Raises:
        ConfigError: one of `normalize` and `normalize_data` is given without the other.
    """

    fills = ("reward",)

    def __init__(
        self,
        path: str,
        max_tokens_per_microbatch: int = 16384,
        dtype: str = "auto",
        device: str | None = None,
        normalize: Literal["mean", "std"] | None = None,
        normalize_data: dict[str, Any] | None = None,
    ) -> None:
        super().__init__(path, max_tokens_per_microbatch, dtype, device)
        if normalize is not None and normalize_data is None:
            raise ConfigError(
                f"scoring.normalize={normalize}: name the responses that are to have mean 0, with "
                "scoring=reward_model_centered or scoring=reward_model_standardized, and "
                "scoring.normalize_data.path=FILE"
            )
        if normalize is None and normalize_data is not None:
            raise ConfigError("scoring.normalize_data: say what for: scoring.normalize=mean or scoring.normalize=std")
        self.normalize, self.normalize_data = normalize, normalize_data or {}
        self.report: dict[str, float] = {}
        self._tokenizer: Any = None

    def bind(self, policy: Any, tokenizer: Any) -> None:
        """The policy's tokenizer prepares the responses that the scores are normalised by."""
        super().bind(policy, tokenizer)
        self._tokenizer = tokenizer

    def score(self, groups: Sequence[Group]) -> None:
        gain, bias = self._line
        scores = self.scores(groups)
        for response, score in zip((r for g in groups for r in g.responses), scores, strict=True):
            response.columns["reward"] = score if self.normalize is None else gain * score + bias

    @cached_property
    def _line(self) -> tuple[float, float]:
        """Gain and bias."""
        if self.normalize is None:
            return 1.0, 0.0
        if self._tokenizer is None:
            raise ConfigError("scoring.normalize: needs the policy's tokenizer: call `bind` before `score`")
        from alignlab.data import DataSettings, load

        splits = load(DataSettings(**self.normalize_data), self._tokenizer)
        groups = [g for g in (*splits.train, *splits.validation, *splits.test) if g.responses]
        scores = self.scores(groups)
        place = f"scoring.normalize_data.path={self.normalize_data.get('path')}"
        if not scores:
            raise ConfigError(f"{place}: there are no responses in it, by whose scores others could be normalised")
        spread = pstdev(scores) if self.normalize == "std" else 1.0
        if not spread > 0:
            raise ConfigError(f"{place}: its {len(scores)} responses have equal scores: there is no scale in them")
        gain = 1 / spread
        self.report = {"reward_gain": gain, "reward_bias": -gain * fmean(scores)}
        return gain, -gain * fmean(scores)
