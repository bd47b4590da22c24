"""Several scorers as one; several rewards made into one: an ensemble's, or those of criteria such as honesty."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

from alignlab.core import AlignlabError, ConfigError, Group, NeedsPolicy, Reports, Scorer, require
from alignlab.core.parts import calling, check_columns, fills_of, score

How = Literal["weighted_sum", "minimum", "mean_minus_deviation", "mean_minus_variance"]

COMBINE: Mapping[str, Callable[[Sequence[float], float], float]] = {
    "weighted_sum": lambda values, penalty: sum(values),
    "minimum": lambda values, penalty: min(values),
    "mean_minus_deviation": lambda values, penalty: statistics.fmean(values) - penalty * statistics.pstdev(values),
    "mean_minus_variance": lambda values, penalty: statistics.fmean(values) - penalty * statistics.pvariance(values),
}
"""(the members' weighted rewards of a response, penalty) → its reward."""


class SeveralScorers:
    """Scorers that score one after the other, as one.

    Args:
        members: by name.

    Raises:
        ConfigError: two of them fill the same column.
    """

    def __init__(self, members: Mapping[str, Scorer]) -> None:
        self.members = dict(members)
        self.fills: tuple[str, ...] = self._columns()

    def _columns(self) -> tuple[str, ...]:
        check_columns(self.members)
        return tuple(column for member in self.members.values() for column in fills_of(member))

    def score(self, groups: Sequence[Group]) -> None:
        for member in self.members.values():
            score(member, groups)

    def bind(self, policy: Any, tokenizer: Any) -> None:
        """See `alignlab.core.NeedsPolicy`: for the members that do."""
        for member in self.members.values():
            if isinstance(member, NeedsPolicy):
                with calling(member, "bind"):
                    member.bind(policy, tokenizer)

    @property
    def report(self) -> dict[str, float]:
        """The members' metrics, as in `honest/judged`."""
        reporting = {name: m.report for name, m in self.members.items() if isinstance(m, Reports)}
        return {f"{name}/{metric}": value for name, report in reporting.items() for metric, value in report.items()}


class CombinedScorer(SeveralScorers):
    """Fills `reward` from the rewards of several scorers, which are kept as `reward_<name>`.

    Args:
        members: the scorers by name; each must fill `reward`.
        how: "weighted_sum"; "minimum", the worst case, and "mean_minus_variance", uncertainty-weighted, as in Coste et
            al. (2023, arXiv:2310.02743); "mean_minus_deviation", which unlike the variance stays in the rewards' own
            units (Eisenstein et al. 2023, arXiv:2312.09244). Deviation and variance are those of the members
            themselves (divided by their number, not by one less).
        weights: factor on each member's reward before they are combined; 1 for those that are not named.
        penalty: of the deviation or variance, >= 0.
    """

    def __init__(
        self,
        members: dict[str, Scorer],
        how: How = "weighted_sum",
        weights: dict[str, float] | None = None,
        penalty: float = 1.0,
    ) -> None:
        require(bool(members), "scoring.members", members, "must name at least one scorer")
        require(how in COMBINE, "scoring.how", how, f"must be one of {', '.join(COMBINE)}")
        require(penalty >= 0, "scoring.penalty", penalty, "must be >= 0")
        for name, member in members.items():
            if "reward" not in (fills := fills_of(member)):
                raise ConfigError(f"scoring.members.{name}: fills {', '.join(fills)}; it must fill reward")
        unknown = sorted(set(weights or {}) - set(members))
        require(not unknown, "scoring.weights", weights, f"there is no member {', '.join(unknown)}")
        super().__init__(members)
        self.how, self.penalty = how, penalty
        self.weights = {name: (weights or {}).get(name, 1.0) for name in members}

    def _columns(self) -> tuple[str, ...]:
        return ("reward", *(f"reward_{name}" for name in self.members))

    def score(self, groups: Sequence[Group]) -> None:
        for name, member in self.members.items():
            for group in groups:
                for response in group.responses:
                    response.columns.pop("reward", None)  # another's must not pass for this member's
            score(member, groups, f"scoring.members.{name}")
            for group in groups:
                for response in group.responses:
                    if "reward" not in response.columns:
                        raise AlignlabError(f"{group.origin}: scoring.members.{name} gave a response no reward")
                    response.columns[f"reward_{name}"] = response.columns.pop("reward")
        for group in groups:
            for response in group.responses:
                values = [
                    weight * float(response.columns[f"reward_{name}"])  # type: ignore[arg-type]
                    for name, weight in self.weights.items()
                ]
                response.columns["reward"] = COMBINE[self.how](values, self.penalty)
