"""What a benchmark is: the data it trains on, the reward it holds to be true, and how it measures a policy."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from alignlab.core import ConfigError, Group, Sampler, Scorer
from alignlab.models import PackedModel
from alignlab.rollout import best_of


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
        max_tokens_per_microbatch: tokens per forward pass.
        seed: of sampling.
        best_of: answers are the best of this many samples by the proxy's reward, >= 1; 1 is the policy itself.
    """

    policy: PackedModel
    reference: Callable[[], AbstractContextManager[PackedModel]]
    sampler: Callable[[PackedModel], Sampler]
    base: Callable[[], PackedModel] | None = None
    proxy: Scorer | None = None
    max_tokens_per_microbatch: int = 16384
    seed: int = 0
    best_of: int = 1

    def judge(self) -> Scorer:
        """The proxy, which picks the best of several samples.

        Raises:
            ConfigError: there is none.
        """
        if self.proxy is None:
            raise ConfigError(f"best_of={self.best_of}: a reward model picks the best, and none is given")
        return self.proxy

    def answers(self, prompts: Sequence[Group]) -> list[Group]:
        """Each prompt with one answer of the policy: a sample, or the best of `best_of` samples."""
        sampler = self.sampler(self.policy)
        if self.best_of == 1:
            return sampler.sample(prompts, 1, self.seed)
        return best_of(sampler, self.judge(), prompts, self.best_of, self.seed)


class Benchmark:
    """A task with a reward that is true by definition.

    Class attributes:
        name: as leaderboards show it.
        files: the files that `write_data` writes, without `.jsonl`. In a comparison's words `{prompts}` stands for the
            path of `prompts.jsonl`, and so on.
        supports_best_of: whether `evaluate` measures best-of-N sampling where the subject's `best_of` is above 1.
    """

    name: ClassVar[str]
    files: ClassVar[tuple[str, ...]] = ("demonstrations", "prompts")
    supports_best_of: ClassVar[bool] = False

    def base_model(self) -> str | None:
        """The folder of the base model it brings along, made if need be, or None where the user names one."""
        return None

    def base_path(self) -> str | None:
        """Where that folder is or will be, for plans: to be overridden where making the model takes long."""
        return self.base_model()

    def write_data(self, folder: Path, model: str) -> None:
        """Write the `files`: `demonstrations.jsonl` ({"prompt", "completion"}) and `prompts.jsonl` ({"prompt"}) for
        training, and whatever else it can teach.

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
        `frontier` for the report; `note`, a sentence that must stand below the table."""
        raise NotImplementedError(f"{type(self).__name__} does not define evaluate")
