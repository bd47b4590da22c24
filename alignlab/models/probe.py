"""Is this model exact in packed rows? Tried on random tokens when a model is loaded, since being wrong is silent."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from alignlab.core import AlignlabError, Group, Response
from alignlab.core.memory import is_memory_error, said
from alignlab.models.attention import path, refusal, shortest_window, use_plans
from alignlab.models.packed_model import PackedModel, evaluating
from alignlab.models.packing import Rows, Span, lay_out
from alignlab.models.private_api import attention_of

TOLERANCE = {torch.bfloat16: (0.15, 0.2), torch.float16: (0.03, 0.05)}
"""Largest mean absolute difference of log-probs put down to rounding: in nats, and as a part of what a wrong mask, or
the lack of the context, would make. The first alone would pass wrong ones where attention contributes little, as in a
model with random weights; in trained models it contributes 0.1 to 1 nat."""
FULL_PRECISION = (1e-4, 0.01)

REFUSALS = (ValueError, TypeError, RuntimeError, AttributeError, IndexError, KeyError)
"""What architectures raise at inputs that they were not made for."""

FITS = 64
"""The longest sequence of the trial is shorter than this."""

SHORT_WINDOW = 8
"""Sliding windows are shortened to this for the trial, so that its sequences go beyond them."""


def tolerance(dtype: torch.dtype, device: torch.device) -> tuple[float, float]:
    """Largest mean difference of log-probs put down to rounding where products have this dtype; see `TOLERANCE`.

    GPUs that may round the factors of float32 products to TF32, which has as many digits as float16, are allowed what
    float16 is.
    """
    if dtype == torch.float32 and device.type != "cpu" and torch.get_float32_matmul_precision() != "highest":
        dtype = torch.float16
    return TOLERANCE.get(dtype, FULL_PRECISION)


def rounding(dtype: torch.dtype) -> float:
    """Largest difference of hidden states in this precision put down to rounding, as a part of their norm."""
    return {torch.bfloat16: 0.01, torch.float16: 0.002}.get(dtype, 1e-4)


def probe(model: PackedModel) -> None:
    """Set `model.whole_logits` and `model.layout` to what is exact for it, and say so in `model.notes`.

    The yardstick is the model's own forward pass, `network(input_ids).logits`, one response at a time.
    """
    groups = random_groups(int(model.config.vocab_size), model.max_length)
    absolute, relative = tolerance(model.dtype, model.device)
    name = type(model.base).__name__
    with torch.no_grad(), evaluating(model), _short_window(model.config):
        expected = _one_by_one(model, groups)
        model.layout = "plain"
        difference, refused = _difference(model, model.lay_out(groups), expected)
        if model.kind == "policy" and not difference <= absolute:
            model.whole_logits = True
            difference, refused = _difference(model, model.lay_out(groups), expected)
            model.notes.append(f"the head of {name} is more than a linear map: its own forward computes the logits")
        if not difference <= absolute:
            model.notes.append(
                f"padded rows of {name} differ from single sequences by {difference:.2g} nats on average{refused}"
            )
        model.layout = "packed"
        rows = model.lay_out(groups)
        difference, refused = _difference(model, rows, expected)
        all_in_one = replace(rows, group_RL=torch.zeros_like(rows.group_RL), branch_RL=torch.zeros_like(rows.branch_RL))
        wrong, _ = _difference(model, all_in_one, expected)
    if not difference <= min(absolute, relative * wrong):
        model.layout = "plain"
        why = f"mean difference {difference:.2g}, {wrong:.2g} if all tokens saw each other"
        model.notes.append(
            f"packed rows are not known to be exact for {name} "
            f"({'it takes no mask of ours' + refused if refused else why}): "
            "plain sequences are used, which cost more where prompts are shared"
        )
        return
    with torch.no_grad(), evaluating(model):
        reason = _refuses_varlen(model, groups, limit=lambda wrong: min(absolute, relative * wrong))
    if reason is None:
        model.layout = "varlen"
    elif reason:
        model.notes.append(reason)


def _refuses_varlen(model: PackedModel, groups: list[Group], limit: Callable[[float], float]) -> str | None:
    """Why rows without padding are not used: attention then goes through a mask of all pairs. None where they are; ""
    where the config or the architecture has another attention than SDPA."""
    if path(model.device, attention_of(model.base)) == "mask":
        return ""
    if refused := refusal(model.base):
        return refused
    through_a_mask = f"attention of {type(model.base).__name__} goes through a mask of all pairs: "
    if model.dropout:
        return f"{through_a_mask}it keeps its dropout (model.dropout=true)"
    if (window := shortest_window(model.config) or FITS) < FITS:
        return f"{through_a_mask}it sees windows of {window} tokens"
    use_plans(model.base)
    expected = _one_by_one(model, groups)
    rows = lay_out(groups, "varlen", model.pad_id).to(model.device)
    shared = replace(rows, spans=(Span(0, rows.input_ids_RL.shape[1], ()),))
    shared = replace(shared, group_RL=torch.zeros_like(rows.group_RL), branch_RL=torch.zeros_like(rows.branch_RL))
    difference, refused = _difference(model, rows, expected)
    wrong, _ = _difference(model, shared, expected)
    if difference <= limit(wrong):
        return None
    why = f"mean difference without it {difference:.2g}, {wrong:.2g} if all tokens saw each other"
    return f"{through_a_mask}{refused.removeprefix(': ') or why}"


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


def _difference(model: PackedModel, rows: Rows, expected: Tensor) -> tuple[float, str]:
    """Mean absolute difference from `expected`. Infinite where the model refuses the layout: then with ": " and what it
    said.

    Raises:
        Exception: memory ran out.
    """
    try:
        if model.kind == "policy":
            found = model(rows)["logp_T"]
        else:
            hidden = model._run(model.decoder, rows).last_hidden_state.flatten(0, 1)
            found = hidden[rows.place_T].float().flatten()
    except (AlignlabError, *REFUSALS) as error:  # some take no mask of four axes, or no position ids
        if is_memory_error(error):
            raise
        return math.inf, f": {said(error)}"
    return float((found - expected).abs().mean()), ""
