"""Process reward model: the probability that a step of a solution is right, for each step.

Uesato et al. (2022, arXiv:2211.14275), Lightman et al. (2023, arXiv:2305.20050); soft labels as in Math-Shepherd (Wang
et al. 2023, arXiv:2312.08935).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor

from alignlab.core import Algorithm, Batch, Group, Metrics, Outputs, Response, require_choice, segment_sum
from alignlab.core.group import is_per_token, numbers

NEUTRAL = {"soft": 0.0, "right": 1.0, "wrong": -1.0}


def step_loss(step_TL: Tensor, right_T: Tensor) -> Tensor:
    """Cross-entropy of P(right), per step, in nats, shape (T,); with hard labels equation 2 of Math-Shepherd.

    Args:
        step_TL: logits of "wrong" and "right", shape (T, 2).
        right_T: probability that the step is right, according to the label, in [0, 1], shape (T,).
    """
    logp_TL = step_TL.log_softmax(-1)
    return -(1 - right_T) * logp_TL[:, 0] - right_T * logp_TL[:, 1]


def first_error(wrong_T: Tensor, response_T: Tensor, count: int) -> Tensor:
    """Index of the first wrong step of each response, from 0; its number of steps if none is wrong. Shape (N,), int64.

    Args:
        wrong_T: whether each step is wrong, bool, shape (T,).
        response_T: the response of each step, ascending, int64, shape (T,).
        count: number of responses.
    """
    before_T = wrong_T.long().cumsum(0)
    length_N = torch.bincount(response_T, minlength=count)
    start_N = length_N.cumsum(0) - length_N
    earlier_N = torch.cat([before_T.new_zeros(1), before_T])[start_N]  # errors of the responses before it
    fine_T = (before_T == earlier_N[response_T]).long()
    return segment_sum(fine_T, response_T, count)


class ProcessRewardModel(Algorithm):
    """Learns P(right) for each step, from the column `step_label` in [-1, 1]: P(right) = (label + 1) / 2.

    Metrics (ProcessBench, Zheng et al. 2024, arXiv:2412.06559); a step is predicted wrong if P(right) < 1/2:

    * `accuracy`: share of steps that are predicted right or wrong correctly; steps with label 0 do not count.
    * `accuracy_right`: share of the solutions without a wrong step in which no step is predicted wrong.
    * `accuracy_wrong`: share of the other solutions in which the first step predicted wrong is the first wrong one.
    * `f1`: the harmonic mean of the last two.

    Args:
        supervise: "first_error": learn from the steps up to the first wrong one (Lightman et al., section 2.6); "all":
            from all steps (Math-Shepherd). None: "all" from the first label on that is neither -1, 0 nor 1, such as a
            share of continuations that succeed; "first_error" where there is none, as in people's labels.
        neutral: what a label of exactly 0 means: "soft" (P(right) = 1/2, which is what it says as a share), "right" or
            "wrong" (Lightman et al. tell neutral steps so, when they test), or "skip" (no loss).

    Raises:
        ConfigError: a value is not one of these.
    """

    unit = "token"
    model = "step"
    reads = frozenset({"step"})
    needs = ("step_label",)
    labels = 2

    def __init__(
        self,
        supervise: Literal["first_error", "all"] | None = None,
        neutral: Literal["soft", "right", "wrong", "skip"] = "soft",
    ) -> None:
        if supervise is not None:
            require_choice("algorithm.supervise", supervise, ("first_error", "all"))
        require_choice("algorithm.neutral", neutral, ("soft", "right", "wrong", "skip"))
        self.supervise, self.neutral = supervise, neutral

    def check(self, group: Group) -> str | None:
        if group.responses and all(is_per_token(r.columns.get("step_label", 0.0)) for r in group.responses):
            return None
        return "ProcessRewardModel needs a `step_label` for each step of each response: see data=steps"

    def prepare(self, groups: Sequence[Group]) -> list[Group]:
        """Mask out the steps that are not learned from: the loss is a mean over the others."""
        labels = (x for g in groups for r in g.responses for x in r.columns["step_label"])  # type: ignore[union-attr]
        if self.supervise is None and any(x not in (-1, 0, 1) for x in labels):
            self.state = {"shares": 1.0}
        cut = self.supervise == "first_error" or (self.supervise is None and not self.state)
        found = []
        for group in groups:
            responses = [self._supervised(r, cut) for r in group.responses]
            found.append(group.with_responses([r for r in responses if r.loss_tokens]))
        return [g for g in found if g.responses]

    def _supervised(self, response: Response, cut: bool) -> Response:
        labels = [float(x) for x in response.columns["step_label"]]  # type: ignore[union-attr]
        if self.neutral != "skip":
            labels = [label or NEUTRAL[self.neutral] for label in labels]
        count = len(labels)
        if cut:
            count = next((i + 1 for i, label in enumerate(labels) if label < 0), count)
        kept = [(i, x) for i, x in zip(response.predicted[:count], labels, strict=False) if x or self.neutral != "skip"]
        ends = {i for i, _ in kept}
        return replace(
            response,
            loss_mask=[i in ends for i in range(len(response.token_ids))],
            columns={"step_label": numbers([x for _, x in kept])},
        )

    def loss(self, outputs: Outputs, batch: Batch) -> tuple[Tensor, Metrics]:
        label_T, step_TL = batch["step_label_T"], outputs.step_TL
        guess_T = step_TL[:, 1] >= step_TL[:, 0]
        truth_N = first_error(label_T < 0, batch.response_T, batch.N)
        found_N = (first_error(~guess_T, batch.response_T, batch.N) == truth_N).float()
        right_N = truth_N == batch.length_N
        return step_loss(step_TL, (label_T + 1) / 2), {
            "accuracy": (guess_T == (label_T > 0))[label_T != 0].float(),
            "accuracy_right": found_N[right_N],
            "accuracy_wrong": found_N[~right_N],
            "predicted_right": guess_T.float(),
        }

    def derive(self, means: Mapping[str, float]) -> dict[str, float]:
        if "accuracy_right" not in means or "accuracy_wrong" not in means:
            return {}
        a, b = means["accuracy_right"], means["accuracy_wrong"]
        return {"f1": 2 * a * b / (a + b) if a + b else 0.0}
