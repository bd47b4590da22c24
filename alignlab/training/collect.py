"""How the groups of an iteration come about: sampled, scored, arranged, given log-probs, prepared."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import partial

from alignlab.core import (
    Algorithm,
    AlignlabError,
    Environment,
    ExactSampler,
    Group,
    NeedsSampler,
    PrefetchingSampler,
    Response,
    RolloutEngine,
    Sampler,
    Scorer,
)
from alignlab.models import PackedModel, Reference
from alignlab.scoring import fill_log_probs, fill_outputs
from alignlab.scoring.log_probs import with_some
from alignlab.training.distributed.engine import Engine
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
        report: of a server's samples: how far they are from the policy that is trained, and how old.
    """

    sampled: list[Group]
    groups: list[Group]
    generated_tokens: int
    reward: float | None
    report: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Prefetched:
    """Responses that are being drawn: what they are drawn with, whose weights, and what waits for them."""

    sampler: Sampler
    seed: int
    step: int
    take: Callable[[], list[Group]]


@dataclass
class Collector:
    """Makes an iteration's groups. Each process samples, scores and reads its share; all get everything.

    Attributes:
        cache: what the reference has said of the data in this run and others; None where it is not kept.
        rollout: the engine that makes samplers; None: its responses are the policy's own.
        environment: what the policy acts in; None: its responses are plain samples.
    """

    algorithm: Algorithm
    engine: Engine
    source: SourceSettings
    scorers: Sequence[Scorer]
    reference: Reference | None
    sampler: Callable[[PackedModel], Sampler] | None
    max_tokens_per_microbatch: int
    temperature: float
    cache: ReferenceCache | None = None
    rollout: RolloutEngine | None = None
    environment: Environment | None = None

    def __post_init__(self) -> None:
        self.model, self.processes = self.engine.model, self.engine.processes
        self._prefetch: Prefetched | None = None

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
        found, tokens, exact, stale = list(groups), 0, False, 0
        if self.source.kind == "rollout" or self.scorers:
            share = shares(groups, self.processes.world)
            mine = [groups[i] for i in share[self.processes.rank]]
            drawn = 0
            if self.source.kind == "rollout":
                if self._prefetch is not None and self._prefetch.seed == seed:
                    stale = step - self._prefetch.step
                mine, drawn, exact = self._sample(mine, seed)
                if following is not None and self.rollout is not None and self.rollout.prefetches:
                    self._prefetch_next(*following(), step)
            for scorer in self.scorers:
                scorer.score(mine)
            parts = self.processes.gather((mine, drawn))
            tokens = sum(n for _, n in parts)
            for indices, (part, _) in zip(share, parts, strict=True):
                for i, group in zip(indices, part, strict=True):
                    found[i] = group
        rewards = [
            float(r.columns["reward"])  # type: ignore[arg-type]
            for g in found
            for r in g.responses
            if r.source != "data" and "reward" in r.columns
        ]
        prompts = {id(r): g.prompt_ids for g in found for r in g.responses if exact and r.source == "policy"}
        arranged = self.algorithm.arrange(found)
        self._fill(arranged, prompts)
        report = {}
        if self.rollout is not None and self.rollout.off_policy and self.source.kind == "rollout":
            report = {"rollout_staleness": float(stale), **compare(arranged, self.rollout.importance_cap)}
            if not stale and self.processes.is_main:
                warn(report)
        prepared = self.algorithm.prepare(arranged)
        return Collected(found, prepared, tokens, sum(rewards) / len(rewards) if rewards else None, report)

    def _sample(self, groups: Sequence[Group], seed: int) -> tuple[list[Group], int, bool]:
        """Groups with their samples, after the record's own responses where those are kept; the tokens drawn; and
        whether the samples' `behaviour_logp` is what a scoring pass would say."""
        if self.sampler is None:
            raise AlignlabError("source.kind=rollout needs a sampler")
        sampler: Sampler
        if self._prefetch is not None and self._prefetch.seed == seed:
            sampler, exact = self._prefetch.sampler, False
            drawn, self._prefetch = self._prefetch.take(), None
        else:
            choice = nullcontext(self.model) if self.source.policy == "current" else self._reference().model()
            with choice as policy, self.engine.whole(policy):
                sampler = self.sampler(policy)
                act = sampler.sample if self.environment is None else partial(self.environment.rollout, sampler)
                drawn = act(groups, self.source.group_size, seed)
                exact = self._exact(sampler)
        tokens = sampler.generated_tokens  # a search draws more than it returns
        for scorer in self.scorers:
            if isinstance(scorer, NeedsSampler):
                scorer.bind_sampler(sampler)
        if self.source.keep:
            own = [[replace(r, columns=dict(r.columns)) for r in g.responses] for g in groups]
            drawn = [g.with_responses([*kept, *g.responses]) for kept, g in zip(own, drawn, strict=True)]
        return drawn, tokens, exact

    def _prefetch_next(self, groups: Sequence[Group], seed: int, step: int) -> None:
        """Begin to draw the next iteration's responses, with the weights as they are now."""
        assert self.sampler is not None
        mine = [groups[i] for i in shares(groups, self.processes.world)[self.processes.rank]]
        with self.engine.whole(self.model):
            sampler = self.sampler(self.model)
        assert isinstance(sampler, PrefetchingSampler)
        self._prefetch = Prefetched(sampler, seed, step, sampler.prefetch(mine, self.source.group_size, seed))

    def _exact(self, sampler: Sampler) -> bool:
        """Whether a sampler's log-probs are the scoring pass's, to float32 rounding. An environment may have made
        anything of what was drawn."""
        exact = isinstance(sampler, ExactSampler) and sampler.exact_logp and self.environment is None
        return exact and self.processes.accelerator.mixed_precision == "no"

    def _fill(self, groups: list[Group], prompts: Mapping[int, list[int]]) -> None:
        """What the algorithm needs of the reference and of the policy as it is before the iteration's first update.

        Args:
            prompts: what the responses were drawn for that have exact log-probs of the policy they were drawn from,
                by the response's `id`: those need no pass, unless the algorithm has put them behind another prompt.
        """
        needs = self.algorithm.needs
        columns = [c for c in ("ref_logp", *OLD.values()) if c in needs]
        if not columns:
            return
        mine = [groups[i] for i in shares(groups, self.processes.world)[self.processes.rank]]
        in_step = self.engine.in_step(groups)
        old = {output: column for output, column in OLD.items() if column in needs}
        sampled = OF_POLICY[self.source.policy]

        def to_read(group: Group, response: Response) -> bool:
            return prompts.get(id(response)) != group.prompt_ids

        for response in (r for g in mine for r in g.responses if sampled in needs and not to_read(g, r)):
            response.columns[sampled] = response.columns["behaviour_logp"]
        with self.processes.accelerator.autocast():  # as in training: not every engine puts it into the model itself
            if "ref_logp" in needs:
                with self._reference().model() as reference:
                    if self.cache is None:
                        fill_log_probs(
                            reference, mine, "ref_logp", self.max_tokens_per_microbatch, self.temperature, in_step
                        )
                    else:  # each group by itself: what is kept must not depend on what else this run reads
                        alone = (reference, mine, "ref_logp", 1, self.temperature, in_step)
                        self.cache.fill(mine, lambda: fill_log_probs(*alone))
            unread = with_some(mine, to_read) if sampled in old.values() and "value" not in old else mine
            fill_outputs(self.model, unread, old, self.max_tokens_per_microbatch, self.temperature, in_step)
        if self.processes.world == 1:
            return
        found = [[{c: r.columns[c] for c in columns} for r in g.responses] for g in mine]
        share = shares(groups, self.processes.world)
        for indices, part in zip(share, self.processes.gather(found), strict=True):
            for i, responses in zip(indices, part, strict=True):
                for response, values in zip(groups[i].responses, responses, strict=True):
                    response.columns.update(values)

    def _reference(self) -> Reference:
        if self.reference is None:
            raise AlignlabError(f"{type(self.algorithm).__name__} needs a reference policy and the run has none")
        return self.reference
