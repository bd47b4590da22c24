"""Is this model exact in packed rows? Tried on random tokens when a model is loaded, since being wrong is silent."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from alignlab.core import Group, Response
from alignlab.models.attention import refusal, shortest_window, use_plans
from alignlab.models.packed_model import PackedModel, evaluating
from alignlab.models.packing import Rows, Span, lay_out
from alignlab.models.precision import exact_float32

TOLERANCE = {torch.bfloat16: (0.15, 0.2), torch.float16: (0.03, 0.05)}
"""Largest mean absolute difference of log-probs put down to rounding: in nats, and as a part of what a wrong mask, or
the lack of the context, would make. The first alone would pass wrong ones where attention contributes little, as in a
model with random weights; in trained models it contributes 0.1 to 1 nat."""
FULL_PRECISION = (1e-4, 0.01)

FITS = 64
"""The longest sequence of the trial is shorter than this."""

SHORT_WINDOW = 8
"""Sliding windows are shortened to this for the trial, so that its sequences go beyond them."""


def rounding(dtype: torch.dtype) -> float:
    """Largest difference of hidden states in this precision put down to rounding, as a part of their norm."""
    return {torch.bfloat16: 0.01, torch.float16: 0.002}.get(dtype, 1e-4)


def probe(model: PackedModel) -> None:
    """Set `model.whole_logits` and `model.layout` to what is exact for it, and say so in `model.notes`.

    The yardstick is the model's own forward pass, `network(input_ids).logits`, one response at a time.
    """
    groups = random_groups(int(model.config.vocab_size), model.max_length)
    absolute, relative = TOLERANCE.get(model.dtype, FULL_PRECISION)
    name = type(model.base).__name__
    with torch.no_grad(), evaluating(model), exact_float32(), _short_window(model.config):
        expected = _one_by_one(model, groups)
        model.layout = "plain"
        difference = _difference(model, model.lay_out(groups), expected)
        if model.kind == "policy" and not difference <= absolute:
            model.whole_logits = True
            difference = _difference(model, model.lay_out(groups), expected)
            model.notes.append(f"the head of {name} is more than a linear map: its own forward computes the logits")
        if not difference <= absolute:
            model.notes.append(
                f"padded rows of {name} differ from single sequences by {difference:.2g} nats on average"
            )
        model.layout = "packed"
        rows = model.lay_out(groups)
        difference = _difference(model, rows, expected)
        all_in_one = replace(rows, group_RL=torch.zeros_like(rows.group_RL), branch_RL=torch.zeros_like(rows.branch_RL))
        wrong = _difference(model, all_in_one, expected)
    if not difference <= min(absolute, relative * wrong):
        model.layout = "plain"
        why = f"mean difference {difference:.2g}, {wrong:.2g} if all tokens saw each other"
        model.notes.append(
            f"packed rows are not known to be exact for {name} "
            f"({why if math.isfinite(difference) else 'it takes no mask of ours'}): "
            "plain sequences are used, which cost more where prompts are shared"
        )
        return
    with torch.no_grad(), evaluating(model), exact_float32():
        if _takes_varlen(model, groups, limit=lambda wrong: min(absolute, relative * wrong)):
            model.layout = "varlen"


def _takes_varlen(model: PackedModel, groups: list[Group], limit: Callable[[float], float]) -> bool:
    """Whether attention over the pieces of a row without padding is exact too, where no sliding window interferes."""
    window = shortest_window(model.config)
    if refused := refusal(model.base):
        model.notes.append(refused)
    if model.dropout or not use_plans(model.base) or (window or FITS) < FITS:
        return False
    expected = _one_by_one(model, groups)

    def difference(rows: Rows) -> float:
        return _difference(model, rows, expected)

    rows = lay_out(groups, "varlen", model.pad_id).to(model.device)
    shared = replace(rows, spans=(Span(0, rows.input_ids_RL.shape[1], ()),))
    shared = replace(shared, group_RL=torch.zeros_like(rows.group_RL), branch_RL=torch.zeros_like(rows.branch_RL))
    return difference(rows) <= limit(difference(shared))


@contextmanager
def _short_window(config: Any) -> Iterator[None]:
    window = getattr(config, "sliding_window", None)
    if not window:
        yield
        return
    config.sliding_window = min(window, SHORT_WINDOW)
    try:
        yield
    finally:
        config.sliding_window = window


def random_groups(vocabulary: int, limit: int | None) -> list[Group]:
    """A few groups of different shapes, longer than short sliding windows, within the positions the model has."""
    generator = torch.Generator().manual_seed(0)

    def ids(count: int) -> list[int]:
        return torch.randint(0, vocabulary, (count,), generator=generator).tolist()

    half = max(1, (limit or 1024) // 2)
    shapes: list[tuple[int, list[int]]] = [(40, [5, 9, 1]), (3, [4]), (6, [2, 7, 3])]
    return [Group(ids(min(p, half)), [Response(ids(min(c, half))) for c in lengths]) for p, lengths in shapes]


def _one_by_one(model: PackedModel, groups: list[Group]) -> Tensor:
    """What transformers itself says: log-probs of response tokens, or the hidden states there, flat."""
    found: list[Tensor] = []
    for group in groups:
        for response in group.responses:
            ids = torch.tensor([group.prompt_ids + response.token_ids], device=model.device)
            start = len(group.prompt_ids)
            if model.kind == "policy":
                logits = model.network(input_ids=ids, use_cache=False).logits[0, start - 1 : -1]
                logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
                found.append(logits.log_softmax(-1).gather(-1, ids[0, start:, None]).squeeze(-1))
            else:  # hidden states: the classifier's own forward adds dropout and a pooling of its own
                found.append(
                    model.decoder(input_ids=ids, use_cache=False).last_hidden_state[0, start:].float().flatten()
                )
    return torch.cat(found)


def _difference(model: PackedModel, rows: Rows, expected: Tensor) -> float:
    """Mean absolute difference from `expected`; infinite where the model refuses the layout."""
    try:
        if model.kind == "policy":
            found = model(rows)["logp_T"]
        else:
            hidden = model._run(model.decoder, rows).last_hidden_state.flatten(0, 1)
            found = hidden[rows.place_T].float().flatten()
    except (ValueError, TypeError, RuntimeError, AttributeError, IndexError, KeyError):
        return float("inf")  # some architectures take no mask of four axes or no position ids
    return float((found - expected).abs().mean())
