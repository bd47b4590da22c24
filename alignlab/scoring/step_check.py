"""Labels of steps from a program that checks them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Literal

from alignlab.core import AlignlabError, Group
from alignlab.data.steps import Steps, label_steps
from alignlab.models import ModelSettings
from alignlab.models.base import load_tokenizer
from alignlab.scoring.process_reward import spread

Check = Callable[[str, list[str], dict], Sequence[float]]
"""(prompt, steps, the record's other fields) → a label in [-1, 1] for each step: -1 wrong, 0 neutral, 1 right."""


class StepCheckScorer:
    """Fills `step_label`, for a process reward model, or `step_reward`, for an algorithm that rewards steps.

    With `step_label` the ends of the steps become the only tokens of a response that bear loss. With `step_reward` they
    stay as they are: it is the label at the end of each step, 0 elsewhere.

    Args:
        function: the program; in a config, `{_target_: hydra.utils.get_method, path: my_module.my_function}`.
        tokenizer: Hub id or folder of the policy: its tokenizer tells where steps end.
        column: "step_label" or "step_reward".
        step_separator, step_token: what parts the steps, see `data`.
    """

    def __init__(
        self,
        function: Check,
        tokenizer: str,
        column: Literal["step_label", "step_reward"] = "step_label",
        step_separator: str = "\n",
        step_token: str | None = None,
    ) -> None:
        self.function, self.tokenizer, self.column = function, tokenizer, column
        self.step_separator, self.step_token = step_separator, step_token
        self.fills = (column,)

    @cached_property
    def steps(self) -> Steps:
        return Steps(load_tokenizer(ModelSettings(path=self.tokenizer)), self.step_separator, self.step_token)

    def score(self, groups: Sequence[Group]) -> None:
        for group in groups:
            for response in group.responses:
                steps = self.steps.split(response.token_ids)
                labels = self._labels(group, steps)
                ends = self.steps.ends(response.token_ids)
                if self.column == "step_label":
                    label_steps(response, ends, labels)
                else:
                    response.columns["step_reward"] = spread(response, ends, labels)

    def _labels(self, group: Group, steps: list[str]) -> list[float]:
        name = getattr(self.function, "__qualname__", repr(self.function))
        try:
            labels = [float(x) for x in self.function(group.prompt, steps, group.extra)]
        except Exception as error:  # the user's code: name the record it failed on
            raise AlignlabError(f"{group.origin}: {name} failed: {type(error).__name__}: {error}") from error
        if len(labels) != len(steps):
            raise AlignlabError(f"{group.origin}: {name} gave {len(labels)} labels for {len(steps)} steps")
        for label in labels:
            if not -1 <= label <= 1:
                raise AlignlabError(f"{group.origin}: {name} gave the label {label}: must be in [-1, 1]")
        return labels
