"""Columns of log-probs: the reference's, or the policy's own before an update."""

from __future__ import annotations

from collections.abc import Sequence

from alignlab.core import Group
from alignlab.models import PackedModel


def fill_log_probs(
    model: PackedModel, groups: Sequence[Group], column: str, token_budget: int, temperature: float = 1.0
) -> None:
    """Set `response.columns[column]` to the log-probs of the response's loss-bearing tokens under `model`, in nats.

    Groups that have the column in every response are left alone, so a frozen model is asked once per group.
    """
    missing = [g for g in groups if not all(column in r.columns for r in g.responses)]
    if not missing:
        return
    values = model.outputs(missing, ("logp",), token_budget, temperature)["logp"]
    for response, logp in zip((r for g in missing for r in g.responses), values, strict=True):
        response.columns[column] = logp.tolist()
