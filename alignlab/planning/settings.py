"""The keys of `configs/plan.yaml` beside those of a run."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from alignlab.core.settings import Settings


class PlanSettings(Settings):
    """On what, for data of what lengths, shown how."""

    gpu: str | float | None = None
    gpus: int | None = Field(None, ge=1)
    prompt_tokens: int = Field(256, ge=1)
    response_tokens: int = Field(256, ge=1)
    responses: int | None = Field(None, ge=1)
    peak_tflops: float | None = Field(None, gt=0)
    share_of_peak: float = Field(0.4, gt=0, le=1)
    format: Literal["table", "json"] = "table"
