"""The seams of sampling: engines that draw responses, samplers that they make, environments that ask these.

As in `interfaces`: a class of the user's needs the methods, and what only some have is a small Protocol of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from alignlab.core.group import Group

if TYPE_CHECKING:
    import torch


@runtime_checkable
class Sampler(Protocol):
    """Draws responses from a policy."""

    @property
    def generated_tokens(self) -> int:
        """Response tokens drawn so far, those that were thrown away included."""
        ...

    def sample(self, groups: Sequence[Group], n: int, seed: int) -> list[Group]:
        """For each group, a group with the same prompt and n sampled responses, in order.

        Each response has `behaviour_logp`, its tokens' log-probs under the very distribution it was drawn from. The
        result depends on the prompt, `seed` and the index of the sample alone, not on what else is in the batch.
        """
        ...


@runtime_checkable
class ExactSampler(Protocol):
    """A sampler that knows whether its log-probs can stand for those of a scoring pass."""

    @property
    def exact_logp(self) -> bool:
        """Whether `behaviour_logp` equals what a scoring pass of the same weights at the same temperature gives, to
        float32 rounding: no filters, float32 weights, no quantised base."""
        ...


@runtime_checkable
class PrefetchingSampler(Protocol):
    """A sampler that can draw while something else goes on."""

    def prefetch(self, groups: Sequence[Group], n: int, seed: int) -> Callable[[], list[Group]]:
        """Begin to draw. The result waits for the responses and returns them. Called by all processes alike."""
        ...


@runtime_checkable
class RestingSampler(Protocol):
    """A sampler that holds memory of the device which training could use."""

    def rest(self) -> None:
        """Nothing more is drawn before the engine makes the next sampler. Called by all processes alike."""
        ...


@dataclass(frozen=True)
class RolloutContext:
    """What a rollout engine may need to know of the run that it samples for, before the model is loaded.

    Attributes:
        model_settings: the model that responses are drawn from: path, revision, tokenizer, …
        folder: the run's folder.
        adapter: what of the model is trained (`AdapterKind`); None: nothing is.
        device: where this process computes.
        dtype: what products are made in; None: what the weights are saved in.
        held: bytes that weights and optimiser states will take of the device of this process, about.
        rank: of this process among those of the run, from 0.
        gather: the value of every process, in order of rank, on every process.
        show_progress: whether to show progress.
    """

    model_settings: Any
    folder: Path
    adapter: Any = None
    device: torch.device | str = "cpu"
    dtype: torch.dtype | None = None
    held: float = 0.0
    rank: int = 0
    gather: Callable[[Any], list[Any]] = lambda value: [value]
    show_progress: bool = True

    @property
    def is_main(self) -> bool:
        """Whether this is the run's main process."""
        return self.rank == 0


@runtime_checkable
class RolloutEngine(Protocol):
    """How responses are drawn. Config: `rollout`. One for a run; it makes samplers of the policy as it is now."""

    @property
    def temperature(self) -> float:
        """Log-probs are of softmax(logits / temperature), in sampling and in training."""
        ...

    @property
    def importance_cap(self) -> float | None:
        """Off-policy correction: tokens are weighted by min(π_trainer / π_sampler, this); None: no weights."""
        ...

    @property
    def off_policy(self) -> bool:
        """Whether its samples may come from another policy than the trainer's (another precision, older weights), so
        that the difference is measured and logged."""
        ...

    @property
    def prefetches(self) -> bool:
        """Whether the next iteration's responses are drawn while this one trains. Its samplers are then
        `PrefetchingSampler`s."""
        ...

    def check(self, config: Mapping[str, Any], algorithm: Any) -> None:
        """Raise ConfigError for what it cannot do in this run, before anything is loaded.

        Args:
            config: the run's checked sections by name (`source`, `distributed`, `quantization`, `environment`, …).
            algorithm: None where nothing is trained.
        """
        ...

    def start(self, context: RolloutContext) -> AbstractContextManager[Any]:
        """Whatever must live as long as the run, such as a server. Entered once, before the model is loaded, by what
        samples from one policy: training and `alignlab sample`."""
        ...

    def sampler(self, policy: Any) -> Sampler:
        """A sampler of `policy` with the weights that it has now. Called by all processes alike."""
        ...


@runtime_checkable
class GatheringEngine(Protocol):
    """A rollout engine whose samplers need not have all weights of a policy in this process."""

    @property
    def gathers(self) -> bool:
        """Whether `sampler` gathers weights that are divided among processes by itself, one after the other, by the
        policy's `gathered`. Otherwise they are whole on every process while it samples."""
        ...


@runtime_checkable
class Environment(Protocol):
    """What a policy acts in: several turns, tools, a search over its own steps. Config: `environment`.

    Its responses may hold tokens that the policy did not write (a tool's answer): their `loss_mask` is False there.
    """

    @property
    def fills(self) -> tuple[str, ...]:
        """Names of the columns it fills, such as `reward`; the run needs no scorer for them."""
        ...

    def rollout(self, sampler: Sampler, groups: Sequence[Group], n: int, seed: int) -> list[Group]:
        """For each group, a group with the same prompt and n responses, in order, with `behaviour_logp` for the
        tokens that the policy wrote. Only what `sampler` draws counts as generated."""
        ...
