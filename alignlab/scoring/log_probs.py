"""Columns of what a model says of responses: log-probs of the reference, the policy's own before an update, values."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from alignlab.core import Group, Response
from alignlab.models import InStep, PackedModel


def fill_log_probs(
    model: PackedModel,
    groups: Sequence[Group],
    column: str,
    max_tokens_per_microbatch: int,
    temperature: float = 1.0,
    in_step: InStep | None = None,
) -> None:
    """Set `response.columns[column]` to the log-probs of the response's loss-bearing tokens under `model`, in nats.

    Responses that have the column are left alone, so a frozen model is asked once for each.
    """
    missing = with_some(groups, lambda _, response: column not in response.columns)
    fill_outputs(model, missing, {"logp": column}, max_tokens_per_microbatch, temperature, in_step)


def with_some(groups: Sequence[Group], wanted: Callable[[Group, Response], bool]) -> list[Group]:
    """The groups with those of their responses that are wanted, the very same objects; without groups of none."""
    some = [g.with_responses([r for r in g.responses if wanted(g, r)]) for g in groups]
    return [g for g in some if g.responses]


def fill_outputs(
    model: PackedModel,
    groups: Sequence[Group],
    columns: Mapping[str, str],
    max_tokens_per_microbatch: int,
    temperature: float = 1.0,
    in_step: InStep | None = None,
) -> None:
    """Set columns to per-token outputs of one pass of `model` over the groups, whether they have them already or not.

    Args:
        columns: output → column: `{"logp": "old_logp", "value": "old_value"}`.
        in_step: as for `PackedModel.outputs`.
    """
    if not columns or not (groups or in_step):
        return
    found = model.outputs(groups, columns, max_tokens_per_microbatch, temperature, in_step)
    responses = [r for g in groups for r in g.responses]
    for output, column in columns.items():
        for response, values in zip(responses, found.get(output, []), strict=True):
            response.columns[column] = values.numpy()
