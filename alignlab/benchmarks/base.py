"""What a benchmark is: the data it trains on, the reward it holds to be true, and how it measures a policy."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from alignlab.core import Sampler, Scorer
from alignlab.models import PackedModel


@dataclass
class Subject:
    """What is measured, and beside what.

    Attributes:
        policy: the model being measured.
        reference: what its KL and win rate are measured against; a context, since it may be the policy with its
            adapter off.
        base: the base model, as the judge of fluency, where there is one.
        proxy: the scorer it was trained with, where there was one: what it may have learnt to exploit.
        sampler: draws responses from a model as the run's rollout settings say.
        token_budget: tokens per forward pass.
        seed: of sampling.
    """

    policy: PackedModel
    reference: Callable[[], AbstractContextManager[PackedModel]]
    sampler: Callable[[PackedModel], Sampler]
    base: Callable[[], PackedModel] | None = None
    proxy: Scorer | None = None
    token_budget: int = 16384
    seed: int = 0


class Benchmark:
    """A task with a reward that is true by definition."""

    name: ClassVar[str]

    def base_model(self) -> str | None:
        """The folder of the base model it brings along, or None where the user names one."""
        return None

    def write_data(self, folder: Path, model: str) -> None:
        """Write `demonstrations.jsonl` ({"prompt", "completion"}) and `prompts.jsonl` ({"prompt"}) for training.

        Args:
            model: the base model's path, for its tokenizer.
        """
        raise NotImplementedError(f"{type(self).__name__} does not define write_data")

    def gold(self) -> Scorer:
        """The true reward."""
        raise NotImplementedError(f"{type(self).__name__} does not define gold")

    def evaluate(self, subject: Subject) -> dict[str, Any]:
        """Figures of merit: numbers by name, `reward`, `kl` (nats per response, to the reference) and `win_rate`
        (against the reference) among them; `reward_per_prompt`, a list, where prompts are held out; `samples` and
        `frontier` for the report."""
        raise NotImplementedError(f"{type(self).__name__} does not define evaluate")
