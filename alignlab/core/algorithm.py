"""What an algorithm is: which responses it wants, which columns must be filled in, and a loss.

Everything else (packing, distribution, adapters, checkpoints, resume, sweeps, leaderboards) is shared, so a new
algorithm is one file with a subclass of `Algorithm`, named by `_target_` in a config.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, ClassVar, Literal

from torch import Tensor

from alignlab.core.batch import Batch, Unit
from alignlab.core.errors import AlignlabError
from alignlab.core.group import Group

ModelKind = Literal["policy", "score", "step"]
"""What is trained: a causal language model, a sequence classifier with one output, or a token classifier."""

Metrics = dict[str, Tensor]
"""Name → a vector of values; the loop reports the mean over the whole global batch."""


class Outputs:
    """What the forward pass yields for a batch. Only what the algorithm `reads` is computed."""

    def __init__(self, **values: Tensor) -> None:
        self.values = values

    def _get(self, name: str) -> Tensor:
        if name not in self.values:
            asked = name.rpartition("_")[0]
            raise AlignlabError(f"the forward pass was not asked for '{asked}': add it to the algorithm's `reads`")
        return self.values[name]

    @property
    def logp_T(self) -> Tensor:
        """Log-prob of each loss-bearing token given all before it, in nats, shape (T,), float32."""
        return self._get("logp_T")

    @property
    def entropy_T(self) -> Tensor:
        """Entropy of the distribution each of them was drawn from, in nats, shape (T,), float32. It has a gradient only
        for an algorithm that reads "entropy_grad" too."""
        return self._get("entropy_T")

    @property
    def value_T(self) -> Tensor:
        """The value head before each loss-bearing token is chosen: what is to come from there, shape (T,), float32."""
        return self._get("value_T")

    @property
    def score_N(self) -> Tensor:
        """The score head at the last token of each response, shape (N,), float32."""
        return self._get("score_N")

    @property
    def step_TL(self) -> Tensor:
        """The step head at each loss-bearing token, logits of the labels, shape (T, labels), float32."""
        return self._get("step_TL")


class Algorithm:
    """One alignment algorithm.

    Class attributes (which an instance may set for itself):
        unit: what the loss is a mean over; `loss` returns one value for each of them.
        model: the kind of model it trains.
        reads: which outputs of the forward pass the loss reads: "logp", "entropy" (and "entropy_grad" for its
            gradient), "value", "score", "step". A score model may be read for "logp" too: those of the base's own
            language head, held fixed, on the trunk that is trained.
        needs: columns that must be there before the loss, without axis suffix: `("ref_logp",)`. The loop fills in
            `ref_logp` (the reference's log-probs), `old_logp` and `old_value` (the policy's own, before the first
            update on an iteration's groups); a scorer fills in the others.
        labels: outputs of a step head.
        critic: where the value head of an algorithm that reads "value" sits: on the policy's trunk ("shared"), or on
            an adapter, without adapters on a copy of the decoder, of its own ("own").

    Attributes:
        report: figures of an iteration that are no means over its batches, set by `prepare`; logged with each step.
        state: numbers that must survive a resume, such as an adaptive coefficient; kept in checkpoints.
    """

    unit: Unit = "response"
    model: ClassVar[ModelKind] = "policy"
    reads: frozenset[str] = frozenset({"logp"})
    needs: tuple[str, ...] = ()
    labels: int = 1
    critic: Literal["shared", "own"] = "shared"
    report: Mapping[str, float] = MappingProxyType({})
    state: Mapping[str, float] = MappingProxyType({})

    def setup(self, tokenizer: Any) -> None:
        """Called once, before anything else, with the model's tokenizer: for algorithms that need token ids."""

    def check(self, group: Group) -> str | None:
        """Why a group cannot be used by this algorithm, or None. Called on every record before training starts."""
        return None

    def arrange(self, groups: Sequence[Group]) -> list[Group]:
        """What the model shall read: called with all groups of an iteration, after sampling and scoring, before
        log-probs are filled in. New groups, where it changes anything; the default leaves them as they are."""
        return list(groups)

    def prepare(self, groups: Sequence[Group]) -> list[Group]:
        """Select and annotate the groups of an iteration, once, after its columns are filled in: keep the best
        response, compute advantages. All groups are there, on every process: statistics over the whole iteration
        belong here. Groups may be dropped or added. The default leaves them as they are."""
        return list(groups)

    def loss(self, outputs: Outputs, batch: Batch) -> tuple[Tensor, Metrics]:
        """One loss for each of `unit`, in nats unless the paper has no such thing, and metrics. Pure."""
        raise NotImplementedError(f"{type(self).__name__} does not define loss(outputs, batch)")

    def derive(self, means: Mapping[str, float]) -> dict[str, float]:
        """Figures made from the global means of the metrics, such as a correlation. Metrics whose names begin with
        an underscore are not logged: they are there for this."""
        return {}

    def enough(self, metrics: Mapping[str, float]) -> bool:
        """Whether to leave out what is left of an iteration, asked after each step with its metrics."""
        return False


def aggregate(loss: Tensor, global_count: int, world_size: int = 1) -> Tensor:
    """The number to call backward on: the sum over this micro-batch divided by the count over the global batch.

    Summed over micro-batches and averaged over processes (as DDP and DeepSpeed average gradients) this is the mean
    over the global batch, exactly, however it is split.

    Args:
        loss: one value for each of the algorithm's unit in this micro-batch, any shape.
        global_count: how many of them there are in the global batch, over all processes and micro-batches.
        world_size: number of processes whose gradients are averaged.
    """
    return loss.sum() * (world_size / max(global_count, 1))
