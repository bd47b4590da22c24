"""Rows that come and go while others are being drawn, for models whose attention takes plans."""

from __future__ import annotations

import inspect
import logging
import weakref
from collections.abc import Iterator, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from alignlab.core import AlignlabError
from alignlab.core.memory import is_memory_error, said
from alignlab.core.private_api import recompiling
from alignlab.models import PackedModel, evaluating
from alignlab.models.attention import PLAN, AttentionPlan, path, refusal, shortest_window, use_plans
from alignlab.models.private_api import attention_of
from alignlab.models.probe import REFUSALS
from alignlab.rollout.cohort import Cohort
from alignlab.rollout.decoding import is_exact, random_tokens

log = logging.getLogger(__name__)

MOST_SHAPES = 256
"""A compiled step is compiled anew for so many shapes and networks."""

_exact: weakref.WeakKeyDictionary[Any, bool] = weakref.WeakKeyDictionary()


class ContinuousDecoding:
    """Rows being extended, of which any may leave, and others join, at every step (continuous batching: Yu et al. 2022,
    Orca). A plan: its step's attention is each cohort's own.

    Args:
        compiled: compile the step; its first run in each of a few shapes takes long.

    Attributes:
        logits_RV: logits of the next token of each of the R rows, as the network's own forward gives them.
    """

    def __init__(self, model: PackedModel, compiled: bool = False) -> None:
        self._network = model.base
        self._device, self._compiled = model.device, compiled
        self._trims = "logits_to_keep" in inspect.signature(self._network.forward).parameters
        kinds = set(getattr(model.config, "layer_types", None) or ())
        # Has four axes, so that transformers makes none of its own. The plan is what counts.
        mask = torch.ones((1, 1, 1, 1), dtype=torch.bool, device=self._device)
        self._mask: Any = dict.fromkeys(kinds, mask) if kinds else mask
        self._cohorts: list[Cohort] = []
        self._position_R = torch.empty(0, dtype=torch.int64, device=self._device)
        self.logits_RV = torch.empty(0, device=self._device)

    @property
    def tokens(self) -> int:
        """For how many tokens keys and values must be kept."""
        return sum(cohort.needed.tokens for cohort in self._cohorts)

    def admit(self, contexts: Sequence[Sequence[int]], counts: Sequence[int], room: int) -> None:
        """Read contexts, in one pass without padding, and begin `counts` rows with each, which come last.

        Args:
            contexts: those of one length adjacent.
            room: tokens that a row may get.
        """
        for other in self._cohorts:
            other.compact()
        cohort = Cohort([len(c) for c in contexts], counts, room, self._device, self._compiled)
        ends = torch.tensor([len(c) for c in contexts], device=self._device).cumsum(0) - 1
        ids = torch.tensor([token for context in contexts for token in context], device=self._device)
        positions = torch.cat([torch.arange(len(c), device=self._device) for c in contexts])
        logits = self._run(cohort, ids, positions, ends)[torch.tensor(cohort.rows, device=self._device)]
        self.logits_RV = torch.cat([self.logits_RV, logits]) if self._cohorts else logits
        self._cohorts.append(cohort)
        self._place()

    def retain(self, going: Sequence[int]) -> list[int]:
        """Let the other rows go.

        Returns:
            The rows that go on, in their new order.
        """
        order: list[int] = []
        start = 0
        for cohort in self._cohorts:
            count = len(cohort.rows)
            mine = [i - start for i in going if start <= i < start + count]
            if len(mine) < count:
                mine = cohort.retain(mine)
            order += [start + i for i in mine]
            start += count
        self._cohorts = [cohort for cohort in self._cohorts if cohort.rows]
        self._place()
        return order

    def append(self, token_R: Tensor) -> None:
        """One more token for each row."""
        self.logits_RV = self._compiled_step(token_R) if self._compiled else self._run(self, token_R, self._position_R)
        for cohort in self._cohorts:
            cohort.length += 1
        self._position_R += 1

    def attend(self, module: Any, query: Tensor, key: Tensor, value: Tensor, scaling: float | None) -> Tensor:
        """See `AttentionPlan.attend`."""
        query, key, value = (x[0].transpose(0, 1) for x in (query, key, value))
        found, start = [], 0
        for cohort in self._cohorts:
            end = start + len(cohort.rows)
            part = slice(start, end)
            found.append(cohort.step(module.layer_idx, query[part], key[part], value[part], scaling))
            start = end
        return (found[0] if len(found) == 1 else torch.cat(found))[None]

    def _compiled_step(self, token_R: Tensor) -> Tensor:
        """Each cohort by itself, so that shapes are few."""
        found, start = [], 0
        with recompiling(MOST_SHAPES):
            for cohort in self._cohorts:
                count, places = len(cohort.rows), cohort.space.rows
                part = slice(start, start + count)
                ids, positions = (pad(x[part], (0, places - count)) for x in (token_R, self._position_R))
                logits = _compiled()(self._network, ids, positions, self._mask, cohort.masked_step())
                found.append(logits[:count])
                start += count
        return torch.cat(found)

    def _place(self) -> None:
        """Where the rows stand."""
        places = [length + cohort.length for cohort in self._cohorts for length in cohort.contexts]
        self._position_R = torch.tensor(places, dtype=torch.int64, device=self._device)

    def _run(self, plan: AttentionPlan, ids: Tensor, positions: Tensor, wanted: Tensor | None = None) -> Tensor:
        """Logits after some of the tokens of a varlen row, or after each."""
        trimmed = {"logits_to_keep": wanted} if self._trims and wanted is not None else {}
        logits = _forward(self._network, ids, positions, self._mask, plan, **trimmed)
        return logits if trimmed or wanted is None else logits[wanted]


def _forward(network: Any, ids: Tensor, positions: Tensor, mask: Any, plan: AttentionPlan, **options: Any) -> Tensor:
    """Logits of the tokens of a flat row, shape (L, V)."""
    given = {"position_ids": positions[None], "attention_mask": mask, "use_cache": False, PLAN: plan, **options}
    logits: Tensor = network(input_ids=ids[None], **given).logits[0]
    return logits


@cache
def _compiled() -> Any:
    return torch.compile(_forward, dynamic=False)


def takes_plans(model: PackedModel, longest: int) -> bool:
    """Whether `ContinuousDecoding` is exact for sequences of at most `longest` tokens; each network is tried once."""
    window = shortest_window(model.config)
    if window is not None and window < longest:
        return False
    if model.base not in _exact:
        reason = _try(model)
        if reason:
            log.warning("%s is sampled from through transformers' own cache: %s", type(model.base).__name__, reason)
        _exact[model.base] = reason is None
    return _exact[model.base]


def _try(model: PackedModel) -> str | None:
    """Why `ContinuousDecoding` is not exact, tried on random tokens, since being wrong would be silent; None where it
    is, and "" where the config or the architecture has another attention than SDPA.

    Raises:
        Exception: memory ran out.
    """
    before = attention_of(model.base)
    if path(model.device, before) == "mask":
        return ""
    if others := set(getattr(model.config, "layer_types", None) or ()) - {"full_attention", "sliding_attention"}:
        return f"it has layers of another kind than attention ({', '.join(sorted(others))})"
    if refused := refusal(model.base):
        return refused
    use_plans(model.base)
    with torch.no_grad(), evaluating(model), model.precision():
        try:
            if is_exact(model, _trial(model)):
                return None
            reason = "rows that come and go are not exact for it"
        except (AlignlabError, *REFUSALS) as error:
            if is_memory_error(error):
                raise
            reason = said(error)
    model.base.set_attn_implementation(before)
    return reason


def _trial(model: PackedModel) -> Iterator[tuple[Tensor, list[list[int]]]]:
    """Rows of several prompts begun, one of them gone, others begun beside them, some of each gone."""
    random = random_tokens(model)
    longest = max(1, min(7, (model.max_length or 1024) - 5))
    decoding = ContinuousDecoding(model)
    sequences: list[list[int]] = []

    def admit(lengths: list[int], counts: list[int]) -> Tensor:
        contexts = [random(length) for length in lengths]
        decoding.admit(contexts, counts, 6)
        sequences.extend(context for context, count in zip(contexts, counts, strict=True) for _ in range(count))
        return decoding.logits_RV

    def append() -> Tensor:
        tokens = random(len(sequences))
        sequences[:] = [[*sequence, token] for sequence, token in zip(sequences, tokens, strict=True)]
        decoding.append(torch.tensor(tokens, device=model.device))
        return decoding.logits_RV

    def retain(going: list[int]) -> None:
        sequences[:] = [sequences[i] for i in decoding.retain(going)]

    yield admit([longest, longest, max(1, longest // 3)], [2, 1, 1]), sequences
    yield append(), sequences
    retain([1, 2, 3])
    yield append(), sequences
    yield admit([max(1, longest - 2)], [3]), sequences
    yield append(), sequences
    retain([1, 2, 4])
    yield append(), sequences
