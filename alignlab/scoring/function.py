"""Rewards from a function of yours on texts: a rule, a checker, a lexicon."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from alignlab.core import AlignlabError, Group

Rule = Callable[[str, str, dict], float]
"""(prompt, response, the record's other fields) → reward."""


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
                try:
                    value = float(self.function(group.prompt, response.text, group.extra))
                except Exception as error:  # the user's code: name the record it failed on
                    name = getattr(self.function, "__qualname__", repr(self.function))
                    raise AlignlabError(f"{group.origin}: {name} failed: {type(error).__name__}: {error}") from error
                if value != value:
                    raise AlignlabError(f"{group.origin}: the reward of a response is not a number")
                response.columns[self.column] = value
