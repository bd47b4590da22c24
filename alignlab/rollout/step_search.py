"""Search over the steps of a solution, guided by a scorer such as a process reward model.

Beam search over steps as in Snell et al. (2024, arXiv:2408.03314): keep the best few beginnings, draw several next
steps for each, and so on.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from alignlab.core import AlignlabError, ConfigError, Group, Sampler, Scorer, require
from alignlab.core.parts import bind_all, fills_of, score
from alignlab.data.steps import Steps
from alignlab.rollout.batching import Row
from alignlab.rollout.sampler import StepSampler

OWN_SAMPLES = 1 << 32
"""Numbers of samples from here on are those of a search: no plain sample shares their random numbers."""


@dataclass(slots=True)
class _Beam:
    """A beginning of a solution, or a whole one."""

    row: Row
    score: float | None = None

    @property
    def ended(self) -> bool:
        return self.row.finished or len(self.row.tokens) >= self.row.limit


@dataclass(slots=True)
class _Search:
    """The search for one response."""

    group: Group
    beams: list[_Beam]
    drawn: int = 0  # sample numbers used
    children: list[_Beam] = field(default_factory=list)


class StepSearch:
    """An `Environment`: each of the n responses to a prompt is the best one found by a search of its own.

    `behaviour_logp` holds the log-probs under the policy that drew the tokens; that the best of several was kept is
    not in them. It needs a `StepSampler`, and fills what `scorer` fills.

    Args:
        scorer: fills `reward` of beginnings of solutions, as of whole ones.
        beams: how many beginnings are kept, >= 1.
        expand: how many next steps are drawn for each, >= 1. With one beam and one step it is plain sampling.
        step_separator, step_token: what ends a step, see `data`.
    """

    needs_step_sampler = True

    def __init__(
        self,
        scorer: Scorer,
        beams: int = 4,
        expand: int = 4,
        step_separator: str = "\n",
        step_token: str | None = None,
    ) -> None:
        require(beams >= 1, "environment.beams", beams, "must be at least 1")
        require(expand >= 1, "environment.expand", expand, "must be at least 1")
        self.fills = fills_of(scorer)
        if "reward" not in self.fills:
            raise AlignlabError(f"environment.scorer: fills {', '.join(self.fills) or 'nothing'}, not 'reward'")
        self.scorer, self.beams, self.expand = scorer, beams, expand
        self.step_separator, self.step_token = step_separator, step_token

    def bind(self, policy: Any, tokenizer: Any) -> None:
        """For a scorer that works with the policy."""
        bind_all([self.scorer], policy)

    def rollout(self, sampler: Sampler, groups: Sequence[Group], n: int, seed: int) -> list[Group]:
        """See `alignlab.core.Environment.rollout`.

        Raises:
            ConfigError: the sampler cannot draw step by step.
        """
        if not isinstance(sampler, StepSampler):
            raise ConfigError(
                f"environment: responses are drawn step by step, which {type(sampler).__name__} cannot: use "
                "rollout=local"
            )
        steps = Steps(sampler.tokenizer, self.step_separator, self.step_token)
        searches = [_Search(groups[i // n], [_Beam(row)]) for i, row in enumerate(sampler.rows(groups, n, seed))]
        first = True
        while going := [s for s in searches if not all(b.ended for b in s.beams)]:
            for search in going:
                self._expand(search, self.expand * (self.beams if first else 1))
            drawn = [c.row for s in going for c in s.children if not c.ended]
            sampler.extend(drawn, lambda row: steps.completes(row.tokens, row.begun))
            self._prune(going, self.beams)
            first = False
        self._prune(searches, 1)
        best = [s.beams[0].row.response() for s in searches]
        found = [g.with_responses(best[i * n : (i + 1) * n]) for i, g in enumerate(groups)]
        score(self.scorer, found)
        return found

    def _expand(self, search: _Search, count: int) -> None:
        """Replace each beam that has not ended by `count` copies to continue. The first keeps its random numbers."""
        search.children = []
        for beam in search.beams:
            if beam.ended:
                search.children.append(beam)
                continue
            for copy in range(count):
                row = replace(beam.row, tokens=list(beam.row.tokens), logp=list(beam.row.logp))
                if copy:
                    search.drawn += 1
                    row.sample = (row.sample % OWN_SAMPLES) + OWN_SAMPLES * search.drawn
                search.children.append(_Beam(row))

    def _prune(self, searches: Sequence[_Search], keep: int) -> None:
        """Keep the best that differ; the first drawn among equals. Where all are kept nothing is scored."""
        for search in searches:
            distinct: dict[tuple[int, ...], _Beam] = {}
            for beam in search.children or search.beams:
                distinct.setdefault(tuple(beam.row.tokens), beam)
            search.beams, search.children = list(distinct.values()), []
        crowded = [s for s in searches if len(s.beams) > keep]
        new = [[b for b in s.beams if b.score is None] for s in crowded]
        pairs = zip(crowded, new, strict=True)
        scored = [s.group.with_responses([b.row.response() for b in some]) for s, some in pairs]
        if wanted := [g for g in scored if g.responses]:
            score(self.scorer, wanted)
        for group, some in zip(scored, new, strict=True):
            for response, beam in zip(group.responses, some, strict=True):
                beam.score = float(response.columns["reward"])  # type: ignore[arg-type]
        for search in crowded:
            search.beams = sorted(search.beams, key=lambda b: -(b.score or 0.0))[:keep]
