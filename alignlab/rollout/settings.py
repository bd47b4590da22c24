"""The `rollout` section of the config: what is sampled, when it ends, how much at a time."""

from __future__ import annotations

from typing import Annotated, Self

from pydantic import Field, StringConstraints, model_validator

from alignlab.core.settings import Settings
from alignlab.rollout.vllm.settings import VllmSettings


class RolloutSettings(Settings):
    """How responses are drawn. The filters apply in the order temperature, top_k, top_p, min_p.

    Tokens in `stop_tokens` and `suppress_tokens` are ids, or entries of the tokenizer's vocabulary as text.
    """

    temperature: float = Field(1.0, ge=0, allow_inf_nan=False)
    top_k: int = Field(0, ge=0)
    top_p: float = Field(1.0, gt=0, le=1)
    min_p: float = Field(0.0, ge=0, le=1)
    max_new_tokens: int = Field(128, ge=1)
    min_new_tokens: int = Field(0, ge=0)
    stop: list[Annotated[str, StringConstraints(min_length=1)]] = Field(default_factory=list)
    stop_tokens: list[int | str] = Field(default_factory=list)
    suppress_tokens: list[int | str] = Field(default_factory=list)
    max_batch_tokens: int = Field(16384, ge=1)
    compile: bool = False
    vllm: VllmSettings | None = None

    @model_validator(mode="after")
    def _lengths(self) -> Self:
        if self.min_new_tokens > self.max_new_tokens:
            raise ValueError(f"min_new_tokens={self.min_new_tokens} exceeds max_new_tokens={self.max_new_tokens}")
        return self

    @property
    def unfiltered(self) -> bool:
        """Whether responses are drawn from the model's own distribution, at the temperature, whatever the tokens, and
        by the very network that is trained."""
        filters = self.top_k or self.top_p < 1 or self.min_p or self.vllm is not None
        return not (filters or self.min_new_tokens or self.suppress_tokens or self.temperature == 0)
