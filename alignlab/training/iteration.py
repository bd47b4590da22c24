"""How the groups of an iteration come about: sampled, scored, arranged, given log-probs, prepared."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace

from alignlab.core import Algorithm, AlignlabError, Group, Sampler, Scorer
from alignlab.models import PackedModel, Reference
from alignlab.scoring import fill_log_probs, fill_outputs
from alignlab.training.engine import Engine
from alignlab.training.settings import SourceSettings
from alignlab.training.sources import shares

OLD = {"logp": "old_logp", "value": "old_value"}
"""Output of the policy → the column that keeps what it was before the iteration's first update."""


@dataclass
class Collected:
    """The groups of an iteration, the same on every process.

    Attributes:
        sampled: the groups with everything that was drawn, before the algorithm chose from it.
        groups: what there is to train on.
        generated_tokens: response tokens drawn, over all processes.
        reward: mean reward of the responses drawn, where they have one.
    """

    sampled: list[Group]
    groups: list[Group]
    generated_tokens: int
    reward: float | None


@dataclass
class Collector:
    """Makes an iteration's groups. Each process samples, scores and reads its share; all get everything."""

    algorithm: Algorithm
    engine: Engine
    source: SourceSettings
    scorers: Sequence[Scorer]
    reference: Reference | None
    sampler: Callable[[PackedModel], Sampler] | None
    token_budget: int
    temperature: float

    def __post_init__(self) -> None:
        self.model, self.processes = self.engine.model, self.engine.processes

    def collect(self, groups: list[Group], seed: int) -> Collected:
        """From records or prompts to what the loss is computed on, in the order of the records."""
        found, tokens = list(groups), 0
        if self.source.kind == "rollout" or self.scorers:
            share = shares(groups, self.processes.world)
            mine = [groups[i] for i in share[self.processes.rank]]
            drawn = 0
            if self.source.kind == "rollout":
                mine, drawn = self._sample(mine, seed)
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
        arranged = self.algorithm.arrange(found)
        self._fill(arranged)
        prepared = self.algorithm.prepare(arranged)
        return Collected(found, prepared, tokens, sum(rewards) / len(rewards) if rewards else None)

    def _sample(self, groups: Sequence[Group], seed: int) -> tuple[list[Group], int]:
        """Groups with their samples, after the record's own responses where those are kept; and the tokens drawn."""
        if self.sampler is None:
            raise AlignlabError("source.kind=rollout needs a sampler")
        choice = nullcontext(self.model) if self.source.policy == "current" else self._reference().model()
        with choice as policy, self.engine.whole(policy):
            sampler = self.sampler(policy)
            drawn = sampler.sample(groups, self.source.samples, seed)
        tokens = sampler.generated_tokens  # a search draws more than it returns
        if self.source.keep:
            own = [[replace(r, columns=dict(r.columns)) for r in g.responses] for g in groups]
            drawn = [g.with_responses([*kept, *g.responses]) for kept, g in zip(own, drawn, strict=True)]
        return drawn, tokens

    def _fill(self, groups: list[Group]) -> None:
        """What the algorithm needs of the reference and of the policy as it is before the iteration's first update."""
        needs = self.algorithm.needs
        columns = [c for c in ("ref_logp", *OLD.values()) if c in needs]
        if not columns:
            return
        mine = [groups[i] for i in shares(groups, self.processes.world)[self.processes.rank]]
        in_step = self.engine.in_step(groups)
        old = {output: column for output, column in OLD.items() if column in needs}
        with self.processes.accelerator.autocast():  # as in training: not every engine puts it into the model itself
            if "ref_logp" in needs:
                with self._reference().model() as reference:
                    fill_log_probs(reference, mine, "ref_logp", self.token_budget, self.temperature, in_step)
            fill_outputs(self.model, mine, old, self.token_budget, self.temperature, in_step)
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
