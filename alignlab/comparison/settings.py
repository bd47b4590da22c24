"""What a comparison's config says."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from alignlab.core.settings import Settings

Overrides = list[str]
"""Overrides as one writes them after `alignlab train`; `{sft}`, `{pairs}`, … stand for what earlier parts made."""

COSTS = ("seconds", "generated_tokens", "trained_tokens", "peak_memory_mb")
"""What is known of every run, whatever the benchmark measures."""

LONGEST = 100
"""Characters of a name that becomes that of a folder."""

Several = Annotated[int, Field(ge=2)]


class Budget(Settings):
    """What each algorithm may spend after SFT; whatever is given is a limit, and the nearest ends a run."""

    steps: int | None = Field(None, ge=1)
    trained_tokens: int | None = Field(None, ge=1)
    generated_tokens: int | None = Field(None, ge=1)
    seconds: float | None = Field(None, gt=0)

    def overrides(self) -> Overrides:
        limits = {
            "steps": self.steps,
            "max_trained_tokens": self.trained_tokens,
            "max_generated_tokens": self.generated_tokens,
            "max_seconds": self.seconds,
        }
        given = [f"training.{name}={value}" for name, value in limits.items() if value is not None]
        return [*given, *(["training.epochs=null"] if given else [])]


class Pairs(Settings):
    """Preference pairs sampled from the SFT policy and labelled by the true reward with Bradley-Terry noise."""

    rounds: int = Field(1, ge=1)
    group_size: int = Field(2, ge=2)
    temperature: float = Field(1.0, gt=0)
    certain: bool = True
    seed: int = Field(0, ge=0)


class ComparisonSettings(Settings):
    """What is compared, and how."""

    seeds: list[Annotated[int, Field(ge=0, lt=2**31)]] = Field(min_length=1)
    budget: Budget
    common: Overrides
    sft: Overrides | None
    pairs: Pairs | None
    reward_model: Overrides | None
    models: dict[Annotated[str, Field(pattern=r"^\w+$", max_length=LONGEST)], Overrides] = Field(default_factory=dict)
    best_of: Several | list[Several] | None = None
    algorithms: dict[Annotated[str, Field(pattern=r"^[\w.+-]+$", max_length=LONGEST)], Overrides] = Field(min_length=1)
    workers: int = Field(ge=1)
    threads: int | None = Field(ge=1, le=1024)
    sort_by: str | None
    baseline: Literal["sft"] | None = "sft"

    @property
    def best_ofs(self) -> list[int]:
        """How many samples each of the best-of-N rows draws per answer."""
        return self.best_of if isinstance(self.best_of, list) else [self.best_of] if self.best_of else []
