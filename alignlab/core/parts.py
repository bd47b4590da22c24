"""Calls of parts that a user may have written, such as an algorithm or a scorer.

What they raise and what they return is checked here: a mistake is one line that names class, method and records.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, get_args

import torch
from torch import Tensor

from alignlab.core.algorithm import Algorithm, Metrics, Outputs
from alignlab.core.batch import Batch, Unit
from alignlab.core.errors import AlignlabError, ConfigError, did_you_mean, failure
from alignlab.core.group import Group
from alignlab.core.memory import is_memory_error

READS = ("logp", "entropy", "entropy_grad", "value", "score", "step")
"""What a forward pass can compute for a loss."""


def name_of(part: object, method: str = "") -> str:
    """As in "my_module.MyScorer.score"."""
    kind = type(part)
    return ".".join(filter(None, (kind.__module__, kind.__qualname__, method)))


@contextmanager
def calling(part: object, method: str, where: str = "") -> Iterator[None]:
    """What a user's own class raises in the block becomes one line that names class, method and place.

    Errors of our own classes stay what they are, and so do those that say what to do already and a lack of memory,
    after which some callers go on. A `SystemExit` of a user's code is an error like others: it must not end a run with
    status 0 and without a model.

    Args:
        part: the object whose method is called in the block.
        where: the records at hand, as in "data.jsonl:3".
    """
    try:
        yield
    except AlignlabError:
        raise
    except (Exception, SystemExit) as error:
        if type(part).__module__.partition(".")[0] == "alignlab" or is_memory_error(error):
            raise
        place = f"{where}: " if where else ""
        raise AlignlabError(f"{place}{name_of(part, method)}: {failure(error)}") from error


def records(groups: Sequence[Group]) -> str:
    """Where groups come from, as in "data.jsonl:3, data.jsonl:7 and 12 more"."""
    places = [g.origin or f"group {i}" for i, g in enumerate(groups)]
    return ", ".join(places[:2]) + (f" and {len(places) - 2} more" if len(places) > 2 else "")


def check_algorithm(algorithm: Algorithm) -> None:
    """Raise ConfigError unless `unit` and `reads` are known."""
    if algorithm.unit not in get_args(Unit):
        near = did_you_mean(str(algorithm.unit), get_args(Unit))
        raise ConfigError(f"{name_of(algorithm, 'unit')}={algorithm.unit!r}: there is no such unit of a loss{near}")
    for name in algorithm.reads:
        if name not in READS:
            raise ConfigError(
                f"{name_of(algorithm, 'reads')}: no forward pass computes {name!r}{did_you_mean(name, READS)}"
            )


def complaint(algorithm: Algorithm, group: Group) -> str | None:
    """Why the algorithm cannot learn from a record, or None."""
    with calling(algorithm, "check", group.origin):
        found = algorithm.check(group)
    if found is not None and not isinstance(found, str):
        raise AlignlabError(f"{name_of(algorithm, 'check')}: must return a text or None; got {_kind(found)}")
    return found


def loss_of(algorithm: Algorithm, outputs: Outputs, batch: Batch) -> tuple[Tensor, Metrics]:
    """The algorithm's loss of a batch, one value for each of its unit, and its metrics.

    Raises:
        AlignlabError: the loss raised, or what it returned is none: another number of values would be a mean over
            something else, and depend on the micro-batches; one without gradient trains nothing.
    """
    place, method = records(batch.groups), name_of(algorithm, "loss")
    with calling(algorithm, "loss", place):
        found = algorithm.loss(outputs, batch)
    if not (isinstance(found, tuple) and len(found) == 2):
        raise AlignlabError(
            f"{method}: must return a loss and metrics, as in `return loss_N, {{}}`; got {_kind(found)}"
        )
    loss, metrics = found
    if not isinstance(loss, Tensor):
        raise AlignlabError(f"{method}: the loss must be a tensor; got {_kind(loss)}")
    count, unit = batch.count(algorithm.unit), algorithm.unit
    if loss.shape != (count,):
        raise AlignlabError(
            f"{method}: the loss has the shape {tuple(loss.shape)}; this batch has {count} {unit}s and the algorithm's "
            f"unit is '{unit}', so it must be ({count},): one value for each, and no mean over them"
        )
    if not loss.is_floating_point():
        raise AlignlabError(f"{method}: the loss must be a floating-point tensor; got {loss.dtype}")
    if torch.is_grad_enabled() and count and not loss.requires_grad:
        raise AlignlabError(
            f"{method}: the loss has no gradient, so nothing would be trained: it must be computed from `outputs`, "
            "without detach() or float()"
        )
    if not isinstance(metrics, Mapping):
        raise AlignlabError(f"{method}: metrics must be a dictionary of tensors; got {_kind(metrics)}")
    for name, values in metrics.items():
        if not isinstance(name, str) or not isinstance(values, Tensor) or values.ndim != 1:
            shown = f"the shape {tuple(values.shape)}" if isinstance(values, Tensor) else f"the type {_kind(values)}"
            raise AlignlabError(
                f"{method}: the metric {name!r} has {shown}: give one value for each token, response, pair or group, a "
                "tensor with one axis; its mean over the global batch is logged"
            )
    return loss, dict(metrics)


def groups_of(algorithm: Algorithm, method: str, groups: Sequence[Group]) -> list[Group]:
    """What `arrange` or `prepare` makes of an iteration's groups.

    Raises:
        AlignlabError: it raised, or returned something else than groups.
    """
    with calling(algorithm, method, records(groups)):
        found = getattr(algorithm, method)(groups)
    if not isinstance(found, Sequence) or not all(isinstance(g, Group) for g in found):
        raise AlignlabError(f"{name_of(algorithm, method)}: must return a list of groups; got {_kind(found)}")
    return list(found)


def numbers_of(part: object, method: str, found: Any) -> dict[str, float]:
    """Metrics by name that a part returned, as floats.

    Raises:
        AlignlabError: it returned something else.
    """
    if not isinstance(found, Mapping):
        raise AlignlabError(f"{name_of(part, method)}: must return a dictionary of numbers; got {_kind(found)}")
    try:
        return {str(name): float(value) for name, value in found.items()}
    except (TypeError, ValueError) as error:
        raise AlignlabError(f"{name_of(part, method)}: must return a dictionary of numbers: {error}") from error


def _kind(value: object) -> str:
    return "None" if value is None else type(value).__name__
