"""The `rollout.vllm` section of the config."""

from __future__ import annotations

from pydantic import Field

from alignlab.core.settings import Settings


class VllmSettings(Settings):
    """Which server samples, how it is started, and what is done about its not being the trainer.

    Attributes:
        importance_cap: C of truncated importance weights min(π_old/π_behaviour, C); None: no weights.
        asynchronous: whether an iteration's responses are drawn while the one before it trains.
    """

    url: str | None = Field(None, pattern=r"^https?://[^/\s]+/?$")
    shared_dir: str | None = None
    python: str | None = None
    port: int | None = Field(None, ge=1, le=65535)
    devices: str | None = None
    memory: float = Field(0.3, gt=0, lt=1)
    arguments: list[str] = Field(default_factory=list)
    start_timeout: float = Field(600.0, gt=0)
    timeout: float = Field(600.0, gt=0)
    importance_cap: float | None = Field(None, gt=0)
    asynchronous: bool = False
