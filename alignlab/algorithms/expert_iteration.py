"""Expert iteration (Anthony et al. 2017, arXiv:1705.08439; for reasoning steps Uesato et al. 2022, arXiv:2211.14275).

It repeats two steps. Policy improvement: for each prompt find the best of N samples, or of a search over steps
(`environment=steps`), by a score such as that of a process reward model. Distillation: fine-tune on what was found.
"""

from __future__ import annotations

from collections.abc import Sequence

from alignlab.algorithms.rejection_sampling import RejectionSampling
from alignlab.core import Group, Response


class ExpertIteration(RejectionSampling):
    """SFT on the `keep` best responses to each prompt, by the column `reward`, that reach a minimum.

    Args:
        keep: how many responses to learn from, >= 1. The first one wins a tie.
        minimum: the lowest reward to learn from; None: any.

    Raises:
        ConfigError: keep is less than 1.
    """

    def __init__(self, keep: int = 1, minimum: float | None = None) -> None:
        super().__init__(keep)
        self.minimum = minimum

    def prepare(self, groups: Sequence[Group]) -> list[Group]:
        best = super().prepare(groups)
        if self.minimum is not None:
            best = [g.with_responses([r for r in g.responses if self._good_enough(r)]) for g in best]
            kept = sum(bool(g.responses) for g in best)
            self.report = {"good_enough": kept / len(best) if best else 0.0}
        return [g for g in best if g.responses]

    def _good_enough(self, response: Response) -> bool:
        return self.minimum is None or float(response.columns["reward"]) >= self.minimum  # type: ignore[arg-type]
