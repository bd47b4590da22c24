"""Expert iteration (Anthony et al. 2017, arXiv:1705.08439; for reasoning steps Uesato et al. 2022, arXiv:2211.14275).

Policy improvement: for each prompt the best of N samples, or of a search over steps (`environment=steps`), by the
score of a process reward model. Distillation: fine-tuning on what was found. The loop repeats the two.
"""

from __future__ import annotations

from collections.abc import Sequence

from alignlab.algorithms.rejection_sampling import RejectionSampling
from alignlab.core import Group


class ExpertIteration(RejectionSampling):
    """SFT on the `keep` best responses to each prompt, by the column `reward`, of those that are good enough.

    Args:
        keep: how many to learn from, >= 1. The first drawn wins a tie.
        minimum: the lowest reward to learn from; None: any.
    """

    def __init__(self, keep: int = 1, minimum: float | None = None) -> None:
        super().__init__(keep)
        self.minimum = minimum

    def prepare(self, groups: Sequence[Group]) -> list[Group]:
        best = super().prepare(groups)
        if self.minimum is not None:
            enough = self.minimum
            best = [
                g.with_responses([r for r in g.responses if float(r.columns["reward"]) >= enough])  # type: ignore[arg-type]
                for g in best
            ]
            kept = sum(bool(g.responses) for g in best)
            self.report = {"good_enough": kept / len(best) if best else 0.0}
        return [g for g in best if g.responses]
