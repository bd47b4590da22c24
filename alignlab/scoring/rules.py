"""Columns from a function of yours: a rule, a checker, a lexicon; on whole responses, or on their steps."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal, TypeVar

from alignlab.core import AlignlabError, Group
from alignlab.core.errors import failure, shorten
from alignlab.core.parts import finite
from alignlab.data.steps import Steps, label_steps
from alignlab.scoring.process_reward import spread

Rule = Callable[[str, str, dict], float]
"""(prompt, response, the record's other fields) → reward."""

Check = Callable[[str, list[str], dict], Sequence[float]]
"""(prompt, steps, the record's other fields) → a label in [-1, 1] for each step: -1 wrong, 0 neutral, 1 right."""


Result = TypeVar("Result")


def call(function: Callable[..., Any], convert: Callable[[Any], Result], group: Group, *arguments: Any) -> Result:
    """What a user's function says of `group`, or of one of its responses, converted.

    Raises:
        AlignlabError: that failed, with the function's name and the record it failed on.
    """
    where = f"{group.place}: {name_of(function)}"
    try:
        found = function(*arguments)
    except (Exception, SystemExit) as error:
        raise AlignlabError(f"{where} failed: {failure(error)}") from error
    try:
        return convert(found)
    except Exception as error:
        raise AlignlabError(f"{where} returned {found!r:.80}: {shorten(error)}") from error


def name_of(function: Callable[..., Any]) -> str:
    """As it is called in messages."""
    return str(getattr(function, "__qualname__", repr(function)))


class FunctionScorer:
    """Fills a column with `function(prompt, response, extra)` for each response.

    Args:
        function: the rule; in a config, `{_target_: hydra.utils.get_method, path: my_module.my_function}`.
        column: name of the column.
    """

    def __init__(self, function: Rule, column: str = "reward") -> None:
        self.function, self.column = function, column
        self.fills = (column,)

    def score(self, groups: Sequence[Group]) -> None:
        for group in groups:
            for response in group.responses:
                value = call(self.function, finite, group, group.prompt, response.text, group.extra)
                response.columns[self.column] = value


class StepCheckScorer:
    """Fills `step_label`, for a process reward model, or `step_reward`, for an algorithm that rewards steps.

    With `step_label` the ends of the steps become the only tokens of a response that bear loss. With `step_reward` they
    stay as they are: it is the label at the end of each step, 0 elsewhere.

    Args:
        function: the program; in a config, `{_target_: hydra.utils.get_method, path: my_module.my_function}`.
        column: "step_label" or "step_reward".
        step_separator, step_token: what parts the steps, see `data`.
    """

    def __init__(
        self,
        function: Check,
        column: Literal["step_label", "step_reward"] = "step_label",
        step_separator: str = "\n",
        step_token: str | None = None,
    ) -> None:
        self.function, self.column = function, column
        self.step_separator, self.step_token = step_separator, step_token
        self.fills = (column,)

    def bind(self, policy: Any, tokenizer: Any) -> None:
        """The policy's tokenizer tells where steps end."""
        self._steps = Steps(tokenizer, self.step_separator, self.step_token)

    def score(self, groups: Sequence[Group]) -> None:
        for group in groups:
            for response in group.responses:
                steps, ends = self._steps.split(response.token_ids), self._steps.ends(response.token_ids)
                labels = self._labels(group, steps)
                if self.column == "step_label":
                    label_steps(response, ends, labels)
                else:
                    response.columns["step_reward"] = spread(response, ends, labels)

    def _labels(self, group: Group, steps: list[str]) -> list[float]:
        name = name_of(self.function)
        labels = call(self.function, lambda found: [finite(x) for x in found], group, group.prompt, steps, group.extra)
        if len(labels) != len(steps):
            raise AlignlabError(f"{group.origin}: {name} gave {len(labels)} labels for {len(steps)} steps")
        for label in labels:
            if not -1 <= label <= 1:
                raise AlignlabError(f"{group.origin}: {name} gave the label {label}: must be in [-1, 1]")
        return labels
