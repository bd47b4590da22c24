"""What an algorithm is: a loss, the columns that the loss needs, and what is selected or computed before it.

Everything else (packing, distribution, adapters, checkpoints, resume, sweeps, leaderboards) is shared. A new algorithm
is one file with a subclass of `Algorithm`, and one config whose `_target_` names it.
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
"""Name → one value for each token, response, pair or group. The loop logs the mean over the whole global batch."""


class Outputs:
    """What the forward pass computed for a batch: only what the algorithm `reads`."""

    def __init__(self, **values: Tensor) -> None:
        self.values = values

    def _get(self, name: str) -> Tensor:
        if name not in self.values:
            asked = name.rpartition("_")[0]
            raise AlignlabError(f"outputs.{name} was not computed: add '{asked}' to the algorithm's `reads`")
        return self.values[name]

    @property
    def logp_T(self) -> Tensor:
        """Log-prob of each loss-bearing token given all tokens before it, in nats, shape (T,), float32."""
        return self._get("logp_T")

    @property
    def entropy_T(self) -> Tensor:
        """Entropy of the next-token distribution at each loss-bearing token, in nats, shape (T,), float32. It has a
        gradient only if the algorithm reads "entropy_grad" too."""
        return self._get("entropy_T")

    @property
    def value_T(self) -> Tensor:
        """The critic's estimate of the future reward just before each loss-bearing token, shape (T,), float32."""
        return self._get("value_T")

    @property
    def score_N(self) -> Tensor:
        """Output of the score head at the last token of each response, shape (N,), float32."""
        return self._get("score_N")

    @property
    def step_TL(self) -> Tensor:
        """Logits of the step head at each loss-bearing token, shape (T, labels), float32."""
        return self._get("step_TL")


class Algorithm:
    """One alignment algorithm. A subclass needs `loss`; every other method and attribute has a default.

    The loop calls, in this order: `setup` and `check` once, before training; then for each iteration `arrange`
    (responses and scores are there), `prepare` (log-probs are there too), and for each micro-batch `loss`.

    Attributes of the class, which an instance may set for itself:
        unit: what the loss is a mean over: "token", "response", "pair" or "group". `loss` returns one value for each.
        needs: columns that the loss or `prepare` needs, without axis suffix, such as `("ref_logp",)`. The loop fills
            `ref_logp` (log-probs of the reference), `old_logp` and `old_value` (of the policy and its critic, before
            the first update of the iteration). A scorer fills the others.
        reads: what the forward pass computes for the loss: "logp", "entropy", "entropy_grad" (entropy with a
            gradient), "value", "score", "step". For a score model "logp" is of the base's own language head, frozen,
            on the trunk that is trained.
        model: the kind of model that is trained.
        min_responses: a record with fewer responses is refused.
        labels: number of outputs of the step head.
        critic: where the value head sits: on the policy's trunk ("shared"), or on a trunk of its own ("own": a second
            adapter, or a copy of the decoder if there are no adapters).
        off_policy_correction: whether the loss weighs tokens by the column `importance`, if there is one.

    Attributes that `prepare` may set:
        report: metrics of the iteration that are not means over its batches; logged with each step.
        state: numbers that must survive a resume, such as an adaptive coefficient; saved in checkpoints.
    """

    unit: Unit = "response"
    needs: tuple[str, ...] = ()
    reads: frozenset[str] = frozenset({"logp"})
    model: ClassVar[ModelKind] = "policy"
    min_responses: int = 0
    labels: int = 1
    critic: Literal["shared", "own"] = "shared"
    off_policy_correction: bool = False
    report: Mapping[str, float] = MappingProxyType({})
    state: Mapping[str, float] = MappingProxyType({})

    def setup(self, tokenizer: Any) -> None:
        """Called once, before anything else, with the model's tokenizer: for algorithms that need token ids."""

    def check(self, group: Group) -> str | None:
        """Why this algorithm cannot learn from a record, or None. Called for every record before training starts."""
        count, least = len(group.responses), self.min_responses
        if count >= least:
            return None
        responses = "1 response" if least == 1 else f"{least} responses"
        advice = "" if count else ": give records with responses, or source=rollout, which samples them"
        return f"{type(self).__name__} needs at least {responses} to a prompt; this record has {count}{advice}"

    def arrange(self, groups: Sequence[Group]) -> list[Group]:
        """What the model reads. Called with all groups of an iteration after sampling and scoring, before log-probs
        are filled in. The default returns the groups as they are; a change goes into new groups."""
        return list(groups)

    def prepare(self, groups: Sequence[Group]) -> list[Group]:
        """Select groups and compute columns, such as advantages. Called once for each iteration, after all columns in
        `needs` are filled. Every process gets all groups, so statistics over the whole iteration belong here. The
        default returns the groups as they are."""
        return list(groups)

    def loss(self, outputs: Outputs, batch: Batch) -> tuple[Tensor, Metrics]:
        """One loss for each `unit` of the batch, and metrics. Pure: it changes neither the batch nor the algorithm."""
        raise NotImplementedError(f"{type(self).__name__} does not define loss(outputs, batch)")

    def derive(self, means: Mapping[str, float]) -> dict[str, float]:
        """Metrics that are computed from the global means of other metrics, such as a correlation. A metric whose name
        begins with an underscore is not logged; it exists for this."""
        return {}

    def enough(self, metrics: Mapping[str, float]) -> bool:
        """Whether to skip the rest of an iteration. Called after each step with its metrics."""
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
