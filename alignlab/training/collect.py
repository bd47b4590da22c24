"""How the groups of an iteration come about: sampled, scored, arranged, given log-probs, prepared."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from alignlab.core import (
    Algorithm,
    AlignlabError,
    Environment,
    ExactSampler,
    GatheringEngine,
    Group,
    PrefetchingSampler,
    Reports,
    Response,
    RestingSampler,
    RolloutEngine,
    Sampler,
    Scorer,
)
from alignlab.core.parts import (
    calling,
    generated_tokens,
    give_sampler,
    groups_of,
    name_of,
    numbers_of,
    sampler_of,
    score,
    taken,
)
from alignlab.core.parts import (
    drawn as draw,
)
from alignlab.models import Reference
from alignlab.scoring import fill_log_probs, fill_outputs
from alignlab.scoring.log_probs import with_some
from alignlab.training.distributed.engine import Engine
from alignlab.training.exchange import Pieces, pack, unpack
from alignlab.training.off_policy import compare, warn
from alignlab.training.order import shares
from alignlab.training.reference_cache import ReferenceCache
from alignlab.training.settings import SourceSettings

OLD = {"logp": "old_logp", "value": "old_value"}
"""Output of the policy → the column that keeps what it was before the iteration's first update."""

OF_POLICY = {"current": "old_logp", "reference": "ref_logp"}
"""Which policy is sampled from → the column that its sampler's log-probs are, where they are exact."""


@dataclass
class Collected:
    """The groups of an iteration, the same on every process.

    Attributes:
        sampled: the groups with everything that was drawn, before the algorithm chose from it.
        groups: what there is to train on.
        generated_tokens: response tokens drawn, over all processes.
        reward: mean reward of the responses drawn, where they have one.
        report: metrics of the scorers and the environment, and of the off-policy correction.
    """

    sampled: list[Group]
    groups: list[Group]
    generated_tokens: int
    reward: float | None
    report: dict[str, float] = field(default_factory=dict)


@dataclass
class Prefetch:
    """Responses that are being drawn while something else goes on.

    Attributes:
        sampler: that draws them.
        take: waits for them.
        seed: what they are drawn with, which tells whose they are.
        step: optimiser steps that the weights had seen.
    """

    sampler: Sampler
    take: Callable[[], list[Group]]
    seed: int
    step: int


@dataclass
class Collector:
    """Makes an iteration's groups. Each process samples, scores and reads its share; all get everything.

    Attributes:
        cache: what the reference has said of the data in this run and others; None where it is not kept.
    """

    algorithm: Algorithm
    engine: Engine
    source: SourceSettings
    scorers: Sequence[Scorer]
    reference: Reference | None
    rollout: RolloutEngine | None
    environment: Environment | None
    max_tokens_per_microbatch: int
    cache: ReferenceCache | None = None

    def __post_init__(self) -> None:
        self.model, self.processes = self.engine.model, self.engine.processes
        self._prefetched: Prefetch | None = None
        self._sampler: Sampler | None = None

    @property
    def temperature(self) -> float:
        """Log-probs are of softmax(logits / temperature): what was sampled from, where the run samples."""
        return self.rollout.temperature if self.rollout is not None else 1.0

    def collect(
        self,
        groups: list[Group],
        seed: int,
        step: int = 0,
        following: Callable[[], tuple[list[Group], int]] | None = None,
    ) -> Collected:
        """From records or prompts to what the loss is computed on, in the order of the records.

        Args:
            step: optimiser steps done.
            following: the next groups and their seed, whose responses are to be drawn meanwhile where that is wanted.
        """
        share = shares(groups, self.processes.world)
        mine = [groups[i] for i in share[self.processes.rank]]
        drawn, exact, stale, report = 0, False, 0, dict[str, float]()
        if self.source.kind == "rollout":
            if self._prefetched is not None and self._prefetched.seed == seed:
                stale = step - self._prefetched.step
            mine, drawn, exact = self._sample(mine, seed)
            if following is not None and self.rollout is not None and self.rollout.prefetches:
                self._prefetch(*following(), step)
        for scorer in self.scorers:
            score(scorer, mine)
        if isinstance(self._sampler, RestingSampler):
            self._sampler.rest()
        for reporting in (*self.scorers, self.environment):
            with calling(reporting, "report"):
                said: Mapping[str, float] = reporting.report if isinstance(reporting, Reports) else {}
            report |= numbers_of(reporting, "report", said)

        # An algorithm that arranges anew looks at all groups at once; for others, one exchange does for everything.
        arranges = type(self.algorithm).arrange is not Algorithm.arrange
        filled = [] if arranges else self._fill(mine, groups, _drawn_for(mine, exact))
        found, tokens, report = self._exchange(groups, mine, share, drawn, report, filled)
        arranged = found
        if arranges:
            arranged = groups_of(self.algorithm, "arrange", found)
            share = shares(arranged, self.processes.world)
            mine = [arranged[i] for i in share[self.processes.rank]]
            filled = self._fill(mine, arranged, _drawn_for(found, exact))
            self._exchange_columns(arranged, mine, share, filled)
        if self.rollout is not None and self.rollout.off_policy and self.source.kind == "rollout":
            report |= {"rollout_staleness": float(stale), **compare(arranged, self.rollout.importance_cap)}
            if not stale and self.processes.is_main:
                warn(report)
        _check_needs(self.algorithm, arranged)
        return Collected(found, groups_of(self.algorithm, "prepare", arranged), tokens, _mean_reward(found), report)

    # ------------------------------------------------------------------ sampling

    def _sample(self, groups: Sequence[Group], seed: int) -> tuple[list[Group], int, bool]:
        """Groups with their samples, after the record's own responses where those are kept; the tokens drawn; and
        whether the samples' `behaviour_logp` is what a scoring pass would say."""
        if self.rollout is None:
            raise AlignlabError("source.kind=rollout needs a rollout engine")
        if self._prefetched is not None and self._prefetched.seed == seed:
            sampler, exact = self._prefetched.sampler, False
            drawn = taken(sampler, self._prefetched.take, groups, self.source.group_size)
            self._prefetched = None
        else:
            choice = nullcontext(self.model) if self.source.policy == "current" else self._reference().model()
            with choice as policy, self._whole(policy):
                sampler = sampler_of(self.rollout, policy)
                drawn = draw(sampler, self.environment, groups, self.source.group_size, seed)
                exact = self._exact(sampler)
        tokens = generated_tokens(sampler)  # a search draws more than it returns
        give_sampler(self.scorers, sampler)
        self._sampler = sampler
        if self.source.keep:
            own = [[replace(r, columns=dict(r.columns)) for r in g.responses] for g in groups]
            drawn = [g.with_responses([*kept, *g.responses]) for kept, g in zip(own, drawn, strict=True)]
        return drawn, tokens, exact

    def _prefetch(self, groups: Sequence[Group], seed: int, step: int) -> None:
        """Begin to draw the next iteration's responses, with the weights as they are now."""
        assert self.rollout is not None
        mine = [groups[i] for i in shares(groups, self.processes.world)[self.processes.rank]]
        with self._whole(self.model):
            sampler = sampler_of(self.rollout, self.model)
        if not isinstance(sampler, PrefetchingSampler):
            raise AlignlabError(f"{type(self.rollout).__name__} prefetches, but its samplers have no `prefetch`")
        take = sampler.prefetch(mine, self.source.group_size, seed)
        self._prefetched = Prefetch(sampler, take, seed, step)

    def _whole(self, policy: Any) -> AbstractContextManager[None]:
        """All of a policy's weights on this process while it samples, unless the engine gathers them by itself."""
        gathers = isinstance(self.rollout, GatheringEngine) and self.rollout.gathers
        return nullcontext() if gathers else self.engine.whole(policy)

    def _exact(self, sampler: Sampler) -> bool:
        """Whether a sampler's log-probs are the scoring pass's, to float32 rounding. A search or an environment reads
        them off the same sampler, but behind other prompts than the record's."""
        return self.environment is None and isinstance(sampler, ExactSampler) and sampler.exact_logp

    # ------------------------------------------------------------------ log-probs

    def _columns(self) -> list[str]:
        """What the loop itself fills in of what the algorithm needs."""
        return [c for c in ("ref_logp", *OLD.values()) if c in self.algorithm.needs]

    def _fill(self, mine: list[Group], everyones: Sequence[Group], prompts: Mapping[int, list[int]]) -> list[str]:
        """What the algorithm needs of the reference and of the policy as it is before the iteration's first update.

        Args:
            mine: this process's share.
            everyones: all groups of which that is a share.
            prompts: what the responses were drawn for that have exact log-probs of the policy they were drawn from,
                by the response's `id`: those need no pass, unless the algorithm has put them behind another prompt.

        Returns:
            The columns filled.
        """
        columns, needs = self._columns(), self.algorithm.needs
        if not columns:
            return columns
        in_step = self.engine.in_step(mine, everyones)
        old = {output: column for output, column in OLD.items() if column in needs}
        sampled = OF_POLICY[self.source.policy]

        def to_read(group: Group, response: Response) -> bool:
            return prompts.get(id(response)) != group.prompt_ids

        for response in (r for g in mine for r in g.responses if sampled in needs and not to_read(g, r)):
            response.columns[sampled] = response.columns["behaviour_logp"]
        budget, temperature = self.max_tokens_per_microbatch, self.temperature
        if "ref_logp" in needs:
            with self._reference().model() as reference:
                if self.cache is None:
                    fill_log_probs(reference, mine, "ref_logp", budget, temperature, in_step)
                else:  # each group by itself: what is kept must not depend on what else this run reads
                    alone = (reference, mine, "ref_logp", 1, temperature, in_step)
                    self.cache.fill(mine, lambda: fill_log_probs(*alone))
        unread = with_some(mine, to_read) if sampled in old.values() and "value" not in old else mine
        fill_outputs(self.model, unread, old, budget, temperature, in_step)
        return columns

    def _reference(self) -> Reference:
        if self.reference is None:
            raise AlignlabError(f"{type(self.algorithm).__name__} needs a reference policy and the run has none")
        return self.reference

    # ------------------------------------------------------------------ exchange

    def _exchange(
        self,
        groups: Sequence[Group],
        mine: list[Group],
        share: Sequence[Sequence[int]],
        drawn: int,
        report: dict[str, float],
        filled: Sequence[str],
    ) -> tuple[list[Group], int, dict[str, float]]:
        """Everyone's share on every process; tokens drawn by all; metrics averaged over the processes.

        Records that everyone has travel as the columns that were filled in; only new responses travel whole.
        """
        new = self.source.kind == "rollout" or bool(self.scorers)
        found, rank = list(groups), self.processes.rank
        for i, group in zip(share[rank], mine, strict=True):
            found[i] = group
        if self.processes.world == 1:
            return found, drawn, report
        if not new:
            self._exchange_columns(found, mine, share, filled)
            return found, drawn, report
        parcel = pack(mine, [groups[i] for i in share[rank]])
        parts = self.processes.gather((parcel, drawn, report))
        for other, (indices, (theirs, _, _)) in enumerate(zip(share, parts, strict=True)):
            if other != rank:
                for i, group in zip(indices, unpack(theirs, [groups[i] for i in indices]), strict=True):
                    found[i] = group
        told: dict[str, list[float]] = {}
        for _, _, metrics in parts:
            for name, value in metrics.items():
                told.setdefault(name, []).append(value)
        return found, sum(n for _, n, _ in parts), {n: sum(v) / len(v) for n, v in told.items()}

    def _exchange_columns(
        self, groups: Sequence[Group], mine: Sequence[Group], share: Sequence[Sequence[int]], filled: Sequence[str]
    ) -> None:
        """Columns that each process has filled in for its share, on every process."""
        if self.processes.world == 1 or not filled:
            return
        own = [r.columns for g in mine for r in g.responses]
        columns = [Pieces.of([np.asarray(c[name]) for c in own]) for name in filled]
        for rank, (indices, theirs) in enumerate(zip(share, self.processes.gather(columns), strict=True)):
            responses = [r for i in indices for r in groups[i].responses]
            for name, pieces in zip(filled, theirs if rank != self.processes.rank else [], strict=False):
                for response, values in zip(responses, pieces.apart(), strict=True):
                    response.columns[name] = values


def _drawn_for(groups: Sequence[Group], exact: bool) -> dict[int, list[int]]:
    """The prompt that each response was drawn for whose sampler's log-probs are exact, by the response's `id`."""
    return {id(r): g.prompt_ids for g in groups for r in g.responses if exact and r.source == "policy"}


def _mean_reward(groups: Sequence[Group]) -> float | None:
    """Over the responses that were drawn."""
    rewards: list[Any] = [
        r.columns["reward"] for g in groups for r in g.responses if r.source != "data" and "reward" in r.columns
    ]
    return sum(map(float, rewards)) / len(rewards) if rewards else None


def _check_needs(algorithm: Algorithm, groups: Sequence[Group]) -> None:
    """Raise AlignlabError for a column that the algorithm needs and no response has, read by it or not."""
    responses = [r for g in groups for r in g.responses]
    for column in algorithm.needs if responses else ():
        alone = column == "reward" and all(len(g.responses) == 1 for g in groups)  # there is nothing to choose between
        if not alone and not any(column in r.columns for r in responses):
            raise AlignlabError(
                f"{groups[0].place}: {name_of(algorithm, 'needs')}: no response has the column '{column}': give "
                "records that have it, or a scorer that fills it (scoring=…)"
            )
