"""What all samplers of ours share: which responses are to be drawn, and what belongs to each."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol, runtime_checkable

import numpy as np

from alignlab.algorithms.rejection_sampling import best
from alignlab.core import AlignlabError, ConfigError, DataError, Environment, Group, RolloutEngine, Sampler, Scorer
from alignlab.core.parts import name_of
from alignlab.models import PackedModel
from alignlab.rollout.batching import Row
from alignlab.rollout.sampling import stream_key
from alignlab.rollout.settings import RolloutSettings
from alignlab.rollout.stopping import Stopping

log = logging.getLogger(__name__)


@runtime_checkable
class StepSampler(Sampler, Protocol):
    """A sampler whose responses can be paused, looked at and continued, as a search over steps needs."""

    @property
    def tokenizer(self) -> Any:
        """The policy's tokenizer."""
        ...

    def rows(self, groups: Sequence[Group], n: int, seed: int) -> list[Row]:
        """n rows for each group, in order, without tokens yet."""
        ...

    def extend(self, rows: Sequence[Row], until: Callable[[Row], bool] | None = None) -> None:
        """Continue rows, in place, each until it ends, or until `until` is true of it after another token.

        Drawn at once or in several calls, a row gets the same tokens.
        """
        ...


@runtime_checkable
class SharedSampler(Protocol):
    """A sampler whose `sample` must be called equally often by all processes of a run."""

    def together(self) -> AbstractContextManager[None]:
        """Entered by all processes alike; within it each may call `sample` as often as it needs to."""
        ...


class RowSampler:
    """Base of the samplers of a `PackedModel`; a subclass draws rows.

    A response depends on the seed, the prompt (its tokens, and the file name and line of its origin) and the index of
    the sample. A group that occurs again in a call, same prompt and origin, continues where the samples of the last
    occurrence end: two occurrences with n samples are one with 2n. (In another process it would start from 0 again, so
    records need origins of their own.)

    Attributes:
        generated_tokens: response tokens drawn so far.
    """

    def __init__(self, model: PackedModel, settings: RolloutSettings, progress: bool = True) -> None:
        if model.kind != "policy":
            raise ConfigError(f"rollout: responses come from a language model, this is a {model.kind} model")
        self.model, self.settings, self.generated_tokens = model, settings, 0
        self._progress, self._stopping = progress, Stopping(model, settings)

    @property
    def tokenizer(self) -> Any:
        """The policy's tokenizer."""
        return self.model.tokenizer

    def draw(self, rows: Sequence[Row], settings: RolloutSettings) -> None:
        """Fill the rows, each until it ends, and count the tokens."""
        raise NotImplementedError

    def sample(self, groups: Sequence[Group], n: int, seed: int) -> list[Group]:
        """For each group, in order, the same prompt with n new responses from the policy.

        Returns:
            Groups whose responses have `behaviour_logp`, one value in nats for each token, under the distribution
            drawn from (after temperature and filters; 0 throughout when greedy); `finished` is False where a limit
            cut the response.

        Raises:
            DataError: for a prompt that leaves no room for a token in the model's positions, or an empty one.
            NonFiniteError: where the model's logits are NaN or infinite.
        """
        return self._sample(groups, n, seed, self.settings)

    def greedy(self, groups: Sequence[Group]) -> list[Group]:
        """For each group, the response made of the most probable tokens."""
        return self._sample(groups, 1, 0, self.settings.model_copy(update={"temperature": 0.0}))

    def _sample(self, groups: Sequence[Group], n: int, seed: int, settings: RolloutSettings) -> list[Group]:
        rows = self.rows(groups, n, seed)
        self.draw(rows, settings)
        return [g.with_responses([r.response() for r in rows[i * n : (i + 1) * n]]) for i, g in enumerate(groups)]

    def rows(self, groups: Sequence[Group], n: int, seed: int) -> list[Row]:
        """n rows for each group, in order, without tokens yet.

        Raises:
            DataError: as `sample` does.
        """
        if n < 1:
            raise ConfigError(f"rollout: n={n} responses per prompt; at least 1 is needed")
        most, positions = self.settings.max_new_tokens, self.model.max_length
        occurrences: Counter[bytes] = Counter()
        rows: list[Row] = []
        shortened = 0
        for group in groups:
            length = len(group.prompt_ids)
            if not length:
                raise DataError(f"{group.origin or 'a group'}: the prompt has no tokens")
            room = most if positions is None else min(most, positions - length)
            if room < 1:
                raise DataError(
                    f"{group.origin or 'a group'}: the prompt has {length} tokens and the model knows {positions} "
                    "positions: no room for a response. Leave such prompts out or shorten them"
                )
            shortened += room < most
            key = stream_key(seed, group.origin, group.prompt_ids)
            first = n * occurrences[key]
            occurrences[key] += 1
            rows += [Row(group.prompt_ids, group.origin, key, first + k, room) for k in range(n)]
        if shortened:
            log.warning(
                "%d of %d prompts leave less room than max_new_tokens=%d in the model's %d positions: "
                "their responses end where the positions end",
                *(shortened, len(groups), most, positions),
            )
        return rows


def best_of(
    sampler: Sampler, scorer: Scorer, groups: Sequence[Group], n: int, seed: int, column: str = "reward"
) -> list[Group]:
    """For each group, in order, the one of n sampled responses with the highest `column`; the first among equals.

    Raises:
        AlignlabError: where the scorer does not fill that column.
    """
    if column not in scorer.fills:
        raise AlignlabError(f"best of {n}: the scorer fills {', '.join(scorer.fills) or 'nothing'}, not '{column}'")
    sampled = sampler.sample(groups, n, seed)
    scorer.score(sampled)
    return [g.with_responses(best(g, 1, column)) for g in sampled]


def check_samples(
    asked: Sequence[Group],
    drawn: Sequence[Group],
    n: int,
    engine: RolloutEngine,
    environment: Environment | None = None,
    exact: bool = False,
) -> None:
    """See that what was drawn is what was asked for: too few responses would train on less, or on nothing.

    Args:
        exact: whether the samples' log-probs are to stand for those of a scoring pass.

    Raises:
        AlignlabError: a group lacks responses or one has no tokens, or no log-probs where those are made use of. The
            message names the class that drew them.
    """
    who = name_of(environment, "rollout") if environment is not None else name_of(engine)
    if not isinstance(drawn, Sequence) or len(drawn) != len(asked) or not all(isinstance(g, Group) for g in drawn):
        found = f"{len(drawn)} groups" if isinstance(drawn, Sequence) else type(drawn).__name__
        raise AlignlabError(f"{who}: must sample a list of {len(asked)} groups, one for each prompt; got {found}")
    for prompt, group in zip(asked, drawn, strict=True):
        if len(group.responses) != n:
            raise AlignlabError(f"{prompt.place}: {who}: {n} responses were asked for; it drew {len(group.responses)}")
        for response in group.responses:
            if not response.token_ids:
                raise AlignlabError(f"{prompt.place}: {who}: a response has no tokens (token_ids)")
            logp = response.columns.get("behaviour_logp")
            if (engine.off_policy or exact) and (logp is None or np.shape(logp) != (response.loss_tokens,)):
                raise AlignlabError(
                    f"{prompt.place}: {who}: its log-probs are made use of (off_policy, exact_logp), so each "
                    "response needs the column behaviour_logp: the log-probs of its "
                    f"{response.loss_tokens} tokens under the distribution that they were drawn from"
                )
