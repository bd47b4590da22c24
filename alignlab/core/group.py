"""A group: a prompt and K responses to it. All that is trained on, sampled or scored is a list of groups."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from itertools import chain
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # commands that compute nothing start without NumPy
    import numpy as np

    Column = float | Sequence[float] | np.ndarray
else:
    Column = Any
"""What is known of a response: a number, or one number for each of its loss-bearing tokens. alignlab's own parts give
arrays; a list that a user's part gives becomes one when that part returns."""


def is_per_token(column: Column) -> bool:
    """Whether a column has a number for each token, in whatever kind of sequence, rather than one for the response."""
    return hasattr(column, "__len__")


def numbers(values: Sequence[float] | np.ndarray) -> np.ndarray:
    """An array for a column with a number for each token: float32 where that holds all of them exactly, as it does what
    models compute in float32 or less; float64 otherwise. A float32 array is returned as it is."""
    import numpy as np

    found = np.asarray(values)
    if found.dtype == np.float32:
        return found
    exact = found.astype(np.float64)
    with np.errstate(over="ignore"):
        rounded = exact.astype(np.float32)
    return rounded if np.array_equal(rounded, exact, equal_nan=True) else exact


def joined(lists: Sequence[Sequence[int]]) -> np.ndarray:
    """Lists of token ids, one after the other, int64."""
    import numpy as np

    return np.fromiter(chain.from_iterable(lists), np.int64, sum(map(len, lists)))


@dataclass(slots=True, eq=False, weakref_slot=True)
class Response:
    """One answer to a prompt.

    Attributes:
        token_ids: C >= 1 tokens. The end-of-sequence token is one of them if the response ended with it.
        loss_mask: which tokens bear loss, length C; None: all. Tokens without loss are read but not predicted, such
            as the later user turns of a chat, or the answer of a tool.
        columns: what is known of the response. A float is one value for the response (`reward`), an array or list
            is one value for each loss-bearing token (`ref_logp`). A `Batch` has them as `reward_N` and `ref_logp_T`.
        finished: whether it ended by itself (end token or stop string), not at the length limit.
        text: the text, for people and for scorers that read text.
        source: where it came from: "data" for a record's own response, "policy" for a sampled one, …
    """

    token_ids: list[int]
    loss_mask: list[bool] | None = None
    columns: dict[str, Column] = field(default_factory=dict)
    finished: bool = True
    text: str = ""
    source: str = "data"

    def __eq__(self, other: Any) -> bool:
        """Whether both are the same response, with the same numbers in the same columns."""
        if not isinstance(other, Response):
            return NotImplemented
        import numpy as np

        mine, theirs = self.columns, other.columns
        same = all(getattr(self, f.name) == getattr(other, f.name) for f in fields(self) if f.name != "columns")
        return same and mine.keys() == theirs.keys() and all(np.array_equal(mine[k], theirs[k]) for k in mine)

    __hash__ = None  # type: ignore[assignment]

    @property
    def loss_tokens(self) -> int:
        """Number of tokens that bear loss."""
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
        prompt_ids: P >= 1 tokens. The first token of each response is predicted from the last of them.
        responses: K >= 0 responses. A group that is still to be sampled for has none.
        origin: where the record came from, "file:line", for messages.
        prompt: the prompt's text.
        columns: what is known of the group, one value for each name. A `Batch` has `weight` as `weight_G`.
        extra: fields of the record that a scorer may need (a gold answer, a category). The model never sees them.
    """

    prompt_ids: list[int]
    responses: list[Response] = field(default_factory=list)
    origin: str = ""
    prompt: str = ""
    columns: dict[str, float] = field(default_factory=dict)
    extra: dict[str, object] = field(default_factory=dict)

    @property
    def place(self) -> str:
        """The origin for the beginning of a message; "a group" if it has none."""
        return self.origin or "a group"

    @property
    def packed_length(self) -> int:
        """Tokens of the group in shared-prefix packing, P + sum of C: the prompt is read once (the trunk), then each
        response (the branches)."""
        return len(self.prompt_ids) + sum(len(r.token_ids) for r in self.responses)

    def with_responses(self, responses: Sequence[Response]) -> Group:
        """The same prompt with other responses."""
        return Group(self.prompt_ids, list(responses), self.origin, self.prompt, dict(self.columns), self.extra)
