"""Rejection sampling: keep the best of N sampled responses, then fine-tune on them.

Nakano et al. (2021, arXiv:2112.09332) for best of N; Touvron et al. (2023, arXiv:2307.09288, section 3.2.3) and RAFT
(Dong et al. 2023, arXiv:2304.06767) for fine-tuning on it. If `source.rollout_batch_size` is the number of prompts it
is the one-round method; if it is smaller, later samples come from the policy that has learned from earlier ones.
"""

from __future__ import annotations

from collections.abc import Sequence

from alignlab.algorithms.sft import SFT
from alignlab.core import AlignlabError, Group, Response, require


class RejectionSampling(SFT):
    """SFT on the `keep` best of the responses to each prompt, by the column `reward`.

    Args:
        keep: how many responses to learn from, >= 1. The first one wins a tie.

    Raises:
        ConfigError: keep is less than 1.
    """

    needs = ("reward",)
    min_responses = 0

    def __init__(self, keep: int = 1) -> None:
        require(keep >= 1, "algorithm.keep", keep, "must be at least 1")
        self.keep = keep

    def prepare(self, groups: Sequence[Group]) -> list[Group]:
        return [g.with_responses(best(g, self.keep)) for g in groups if g.responses]


def best(group: Group, keep: int = 1, column: str = "reward") -> list[Response]:
    """The `keep` responses of the group with the highest values in `column`, best first. The first one wins a tie.

    Raises:
        AlignlabError: a response has no such value.
    """
    if not all(column in r.columns for r in group.responses):
        raise AlignlabError(
            f"{group.place}: best of N needs a `{column}` for each response: choose a scorer that fills it (scoring=…)"
        )
    return sorted(group.responses, key=lambda r: -float(r.columns[column]))[:keep]  # type: ignore[arg-type]
