"""Labels of steps without an annotator: can the policy still reach the right answer from here?

Math-Shepherd (Wang et al. 2023, arXiv:2312.08935, section 3.3).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from alignlab.core import ConfigError, Group, Response, Sampler, require
from alignlab.data.steps import Steps, label_steps
from alignlab.scoring.rules import Rule, call


class MonteCarloLabels:
    """Fills `step_label`: from the end of each step the policy completes the solution several times.

    The label is 1 if any completion is right, else -1 ("hard", equation 3), or 2p - 1 of the share p that is right
    ("soft", equation 4). After the last step nothing is left to complete: its label says whether the solution is right.
    The ends of the steps become the only tokens that bear loss.

    Args:
        function: whether the answer of a solution is right, true or above 0; in a config,
            `{_target_: hydra.utils.get_method, path: …}`.
        completions: of each beginning, >= 1.
        estimate: "hard" or "soft".
        step_separator, step_token: what parts the steps, see `data`.
        seed: of the completions.
    """

    fills = ("step_label",)

    def __init__(
        self,
        function: Rule,
        completions: int = 8,
        estimate: Literal["hard", "soft"] = "hard",
        step_separator: str = "\n",
        step_token: str | None = None,
        seed: int = 0,
    ) -> None:
        require(completions >= 1, "scoring.completions", completions, "must be at least 1")
        self.function, self.completions, self.estimate, self.seed = function, completions, estimate, seed
        self.step_separator, self.step_token = step_separator, step_token
        self._sampler: Sampler | None = None
        self._tokenizer: Any = None

    def bind(self, policy: Any, tokenizer: Any) -> None:
        """The policy's tokenizer tells where steps end."""
        self._tokenizer, self._steps = tokenizer, Steps(tokenizer, self.step_separator, self.step_token)

    def bind_sampler(self, sampler: Sampler) -> None:
        """The policy that completes solutions."""
        self._sampler = sampler

    def score(self, groups: Sequence[Group]) -> None:
        if self._sampler is None or self._tokenizer is None:
            raise ConfigError("scoring: Monte-Carlo labels need a policy to complete solutions: use `alignlab sample`")
        ends = [[self._steps.ends(r.token_ids) for r in g.responses] for g in groups]
        begun = [
            self._beginning(group, k, end)
            for group, some in zip(groups, ends, strict=True)
            for k, places in enumerate(some)
            for end in places[:-1]
        ]
        completed = iter(self._sampler.sample(begun, self.completions, self.seed) if begun else [])
        for group, some in zip(groups, ends, strict=True):
            for response, places in zip(group.responses, some, strict=True):
                right = [self._share(group, response.token_ids[: end + 1], next(completed)) for end in places[:-1]]
                right.append(float(self._right(group, response.text)))
                if self.estimate == "hard":
                    right = [float(p > 0) for p in right]
                label_steps(response, places, [2 * p - 1 for p in right])

    def _beginning(self, group: Group, k: int, end: int) -> Group:
        """The solution up to a step as a prompt; its origin names the solution, so that each has samples of its own."""
        ids = [*group.prompt_ids, *group.responses[k].token_ids[: end + 1]]
        return Group(ids, [], f"{group.origin} response {k}", group.prompt)

    def _share(self, group: Group, begun: list[int], completed: Group) -> float:
        """The share of right solutions among the completions."""
        right = [self._right(group, self._text(begun, r)) for r in completed.responses]
        return sum(right) / len(right)

    def _text(self, begun: list[int], completion: Response) -> str:
        """The solution's text. What a stop string cut off the completion's is cut off it too."""
        whole = self._decode([*begun, *completion.token_ids])
        cut = len(self._decode(completion.token_ids)) - len(completion.text)
        return whole[: len(whole) - cut] if cut > 0 else whole

    def _decode(self, ids: list[int]) -> str:
        return str(self._tokenizer.decode(ids, skip_special_tokens=True))

    def _right(self, group: Group, text: str) -> bool:
        return call(self.function, float, group, group.prompt, text, group.extra) > 0
