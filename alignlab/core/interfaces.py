"""The seams between the layers: what fills columns, what samples responses, what measures a policy."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

from alignlab.core.group import Group


@runtime_checkable
class Scorer(Protocol):
    """Fills in columns of groups: rewards, labels, log-probs of another model."""

    @property
    def fills(self) -> tuple[str, ...]:
        """Names of the columns it fills, without axis suffix."""
        ...

    def score(self, groups: Sequence[Group]) -> None:
        """Set `response.columns[name]` for every name in `fills` and every response. In place."""
        ...


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


class Benchmark(Protocol):
    """What policies are measured on."""

    name: str

    def evaluate(self, policy: Any, reference: Any, seed: int) -> dict[str, float]:
        """Figures of merit by name; `reward` and `kl` (nats per response, to the reference) among them."""
        ...
