"""A group: a prompt and the K responses to it. Everything that is trained on, sampled or scored is one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

Column = float | list[float]


@dataclass(slots=True)
class Response:
    """One answer to a prompt.

    Attributes:
        token_ids: C >= 1 tokens, the end-of-sequence token included where the response ended by itself.
        loss_mask: which tokens bear loss, length C; None means all. In a multi-turn chat the later user turns
            are tokens of the response that bear none: they are read, never predicted.
        columns: what is known of the response. A float is one value per response (`reward`), a list is one value
            per loss-bearing token (`ref_logp`). In a `Batch` they become `reward_N` and `ref_logp_T`.
        finished: whether it ended by itself (end token or stop string), not by the length limit.
        text: the text, for people and for scorers that read text.
        source: where it came from, e.g. "data" or "policy".
    """

    token_ids: list[int]
    loss_mask: list[bool] | None = None
    columns: dict[str, Column] = field(default_factory=dict)
    finished: bool = True
    text: str = ""
    source: str = "data"

    @property
    def loss_tokens(self) -> int:
        """Number of tokens that bear loss: this response's share of axis T."""
        return len(self.token_ids) if self.loss_mask is None else sum(self.loss_mask)

    @property
    def predicted(self) -> list[int]:
        """Indices within `token_ids` of the tokens that bear loss, ascending."""
        if self.loss_mask is None:
            return list(range(len(self.token_ids)))
        return [i for i, bears in enumerate(self.loss_mask) if bears]


@dataclass(slots=True)
class Group:
    """A prompt and the responses to it.

    Attributes:
        prompt_ids: P >= 1 tokens. The first response token is predicted from the last of them.
        responses: K >= 0 responses; a group of the rollout's input has none yet.
        origin: where the record came from, "file:line", for messages.
        prompt: the prompt's text.
        columns: one value for the whole group, by name; `name_G` in a `Batch`.
        extra: fields of the record that a scorer may need (a gold answer, a category); never seen by the model.
    """

    prompt_ids: list[int]
    responses: list[Response] = field(default_factory=list)
    origin: str = ""
    prompt: str = ""
    columns: dict[str, float] = field(default_factory=dict)
    extra: dict[str, object] = field(default_factory=dict)

    @property
    def packed_length(self) -> int:
        """Tokens of the group as trunk and branches: P + sum of C."""
        return len(self.prompt_ids) + sum(len(r.token_ids) for r in self.responses)

    def with_responses(self, responses: Sequence[Response]) -> Group:
        """The same prompt with other responses."""
        return Group(self.prompt_ids, list(responses), self.origin, self.prompt, dict(self.columns), self.extra)
