"""Is this model exact in packed rows? Tried on random tokens when a model is loaded, since being wrong is silent."""

from __future__ import annotations

import torch
from torch import Tensor

from alignlab.core import Group, Response
from alignlab.models.packed_model import PackedModel, evaluating

TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.bfloat16: 0.15, torch.float16: 0.03}
"""Largest mean absolute difference of log-probs (nats) put down to rounding. A wrong mask or wrong positions give
a difference of the order of what attention contributes: 0.1 to 1 nat in trained models."""


def probe(model: PackedModel) -> None:
    """Set `model.whole_logits` and `model.layout` to what is exact for it, and say so in `model.notes`.

    The yardstick is the model's own forward pass, `network(input_ids).logits`, one response at a time.
    """
    groups = _random_groups(int(model.config.vocab_size), model.max_length)
    tolerance = TOLERANCE.get(model.dtype, 1e-4)
    with torch.no_grad(), evaluating(model):
        expected = _one_by_one(model, groups)
        model.layout = "plain"
        if model.kind == "policy":
            for model.whole_logits in (False, True):
                if _difference(model, groups, expected) <= tolerance:
                    break
            if model.whole_logits:
                model.notes.append("its head is more than a linear map: logits are computed by the model's own forward")
        model.layout = "packed"
        difference = _difference(model, groups, expected)
        if not difference <= tolerance:
            model.layout = "plain"
            model.notes.append(
                f"packed rows are not exact for {type(model.base).__name__} (mean difference {difference:.2g} nats): "
                "plain sequences are used, which cost more where prompts are shared"
            )


def _random_groups(vocabulary: int, limit: int | None) -> list[Group]:
    """A few groups of different shapes, longer than small sliding windows, within the positions the model has."""
    generator = torch.Generator().manual_seed(0)

    def ids(count: int) -> list[int]:
        return torch.randint(0, vocabulary, (count,), generator=generator).tolist()

    long = min(40, (limit or 1024) // 2)
    shapes: list[tuple[int, list[int]]] = [(long, [5, 9, 1]), (3, [4]), (6, [2, 7, 3])]
    return [Group(ids(p), [Response(ids(c)) for c in lengths]) for p, lengths in shapes]


def _one_by_one(model: PackedModel, groups: list[Group]) -> Tensor:
    """What transformers itself says: log-probs of response tokens, or scores or step logits, flat."""
    found: list[Tensor] = []
    for group in groups:
        for response in group.responses:
            ids = torch.tensor([group.prompt_ids + response.token_ids], device=model.device)
            start = len(group.prompt_ids)
            if model.kind == "policy":
                logits = model.network(input_ids=ids, use_cache=False).logits[0].float()
                target = ids[0, start:, None]
                found.append(logits[start - 1 : -1].log_softmax(-1).gather(-1, target).squeeze(-1))
            else:  # hidden states: the classifier's own forward adds dropout and a pooling of its own
                found.append(model.decoder(input_ids=ids, use_cache=False).last_hidden_state[0, start:].float().flatten())
    return torch.cat(found)


def _difference(model: PackedModel, groups: list[Group], expected: Tensor) -> float:
    """Mean absolute difference from `expected`; infinite where the model refuses the layout."""
    try:
        rows = model.lay_out(groups)
        if model.kind == "policy":
            found = model(rows)["logp_T"]
        else:
            hidden = model._run(model.decoder, rows).last_hidden_state.flatten(0, 1)
            found = hidden[rows.place_T].float().flatten()
    except (ValueError, TypeError, RuntimeError, AttributeError, IndexError, KeyError):
        return float("inf")  # some architectures take no mask of four axes or no position ids
    return float((found - expected).abs().mean())
