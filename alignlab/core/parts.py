"""Calls of parts that a user may have written, such as an algorithm or a scorer; `training.parts` has those of a loop.

What they raise and what they return is checked here: a mistake is one line that names class, method and records.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from inspect import isroutine
from typing import Any, get_args

import numpy as np
import torch
from torch import Tensor

from alignlab.core.algorithm import Algorithm, Metrics, Outputs
from alignlab.core.batch import Batch, Unit
from alignlab.core.errors import AlignlabError, ConfigError, did_you_mean, failure
from alignlab.core.group import Group, Response, is_per_token, numbers
from alignlab.core.interfaces import NeedsPolicy, NeedsSampler, Scorer
from alignlab.core.memory import is_memory_error
from alignlab.core.sampling import Environment, RolloutContext, RolloutEngine, Sampler

READS = ("logp", "entropy", "entropy_grad", "value", "score", "step")
"""What a forward pass can compute for a loss."""


WHOLE = (int, np.integer)
"""Kinds of whole numbers."""


def name_of(part: object, method: str = "") -> str:
    """As in "my_module.MyScorer.score"."""
    kind: Any = part if isroutine(part) else type(part)
    method = "" if isroutine(part) else method
    return ".".join(filter(None, (kind.__module__, kind.__qualname__, method)))


def is_ours(part: object) -> bool:
    """Whether a part's class is one of alignlab's own."""
    return type(part).__module__.partition(".")[0] == "alignlab"


@contextmanager
def calling(part: object, method: str, where: str = "") -> Iterator[None]:
    """What a user's own class raises in the block becomes one line that names class, method and place.

    Errors of our own classes stay what they are, and so do those that say what to do already and a lack of memory,
    after which some callers go on. A `SystemExit` of a user's code is an error like others: it must not end a run with
    status 0 and without a model. Ctrl-C alone is not.

    Args:
        part: the object whose method is called in the block.
        where: the records at hand, as in "data.jsonl:3".
    """
    try:
        yield
    except (AlignlabError, KeyboardInterrupt):
        raise
    except BaseException as error:
        if is_ours(part) or is_memory_error(error):
            raise
        place = f"{where}: " if where else ""
        raise AlignlabError(f"{place}{name_of(part, method)}: {failure(error)}") from error


def records(groups: Sequence[Group]) -> str:
    """Where groups come from, as in "data.jsonl:3, data.jsonl:7 and 12 more"."""
    places = [g.origin or f"group {i}" for i, g in enumerate(groups)]
    return ", ".join(places[:2]) + (f" and {len(places) - 2} more" if len(places) > 2 else "")


def check_algorithm(algorithm: Algorithm) -> None:
    """Raise ConfigError unless `unit` and `reads` are known and `needs` are names."""
    needs: Any = algorithm.needs
    if not isinstance(needs, tuple | list) or not all(isinstance(column, str) for column in needs):
        raise ConfigError(
            f"{name_of(algorithm, 'needs')}={needs!r}: must be names of columns, as in needs = ('reward',)"
        )
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
    if not loss.is_floating_point() or loss.layout != torch.strided or loss.device.type != batch.device.type:
        raise AlignlabError(
            f"{method}: the loss must be a floating-point tensor on {batch.device}; got {loss.dtype} "
            f"({str(loss.layout).removeprefix('torch.')}) on {loss.device}"
        )
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
        return {str(name): number(value) for name, value in found.items()}
    except ValueError as error:
        raise AlignlabError(f"{name_of(part, method)}: must return a dictionary of numbers: one {error}") from error


def number(value: Any) -> float:
    """A number that someone else's code gave, NaN and infinity among them.

    Raises:
        ValueError: it is none; a text of digits is none.
    """
    try:
        if not isinstance(value, str | bytes):
            return float(value)
    except Exception as error:
        raise ValueError(f"is no number ({_kind(value)})") from error
    raise ValueError(f"is no number ({_kind(value)})")


def finite(value: Any) -> float:
    """A number that is neither NaN nor infinite.

    Raises:
        ValueError: it is none.
    """
    if not math.isfinite(found := number(value)):
        raise ValueError(f"is not finite ({found})")
    return found


# ---------------------------------------------------------------------------------------------- scoring


def fills_of(part: Scorer | Environment) -> tuple[str, ...]:
    """Names of the columns that a scorer or an environment fills.

    Raises:
        ConfigError: they are no names.
    """
    with calling(part, "fills"):
        found: Any = part.fills
    if isinstance(found, str) or not isinstance(found, Sequence) or not all(isinstance(n, str) for n in found):
        raise ConfigError(f'{name_of(part, "fills")}: must be a tuple of names, as in ("reward",); got {found!r:.80}')
    return tuple(found)


def check_columns(scorers: Mapping[str, Scorer]) -> None:
    """Refuse scorers that fill the same column: the last one's values would replace the others'.

    Args:
        scorers: by name, as messages call them.

    Raises:
        ConfigError: two of them do.
    """
    filled: dict[str, str] = {}
    for name, scorer in scorers.items():
        fills = fills_of(scorer)
        if twice := next((column for column in fills if column in filled), None):
            raise ConfigError(
                f"{name}: fills the column '{twice}', as {filled[twice]} does, and one would replace the other: "
                "make one of both with scoring=combined, or give one another column"
            )
        filled |= dict.fromkeys(fills, name)


def bind_all(parts: Iterable[object], policy: Any) -> None:
    """Tell the parts that want to know it which policy is trained, or measured: an `alignlab.Policy`."""
    for part in parts:
        if isinstance(part, NeedsPolicy):
            with calling(part, "bind"):
                part.bind(policy, policy.tokenizer)


def score(scorer: Scorer, groups: Sequence[Group], key: str = "") -> None:
    """Have a scorer fill its columns.

    Args:
        key: where the config has it, for messages, which name the class and method in any case.

    Raises:
        AlignlabError: it raised, or a response lacks a column, or has something else in it than finite numbers.
    """
    with calling(scorer, "score", records(groups)):
        scorer.score(list(groups))  # of its own: what it adds or takes away is no matter
    fills, name = fills_of(scorer), ", ".join(filter(None, (key, name_of(scorer, "score"))))
    for group in groups if is_ours(scorer) and fills else ():
        if group.responses and not any(column in r.columns for r in group.responses for column in fills):
            raise AlignlabError(f"{group.place}: {name}: filled none of {', '.join(fills)}")
    _check_filled(name, groups, fills, every=not is_ours(scorer))


def _check_filled(part: str, groups: Sequence[Group], names: Sequence[str], every: bool) -> None:
    """Args: `every`: whether each response must have each column; ours leave out a record's own responses, or groups of
    another size."""
    for group in groups:
        for k, response in enumerate(group.responses):
            for name in names:
                if name not in response.columns:
                    if not every:
                        continue
                    raise AlignlabError(
                        f"{group.place}: {part}: response {k + 1} got no '{name}', which is in `fills`: set "
                        f"response.columns['{name}'] for every response"
                    )
                value = response.columns[name]
                try:
                    response.columns[name] = _column(response, value)
                except ValueError as error:
                    raise AlignlabError(
                        f"{group.place}: {part}: '{name}' of response {k + 1} {error}: a finite number is wanted, or "
                        f"one for each token; got {value!r:.80}"
                    ) from error


def _column(response: Response, value: Any) -> Any:
    """A number, or an array of one for each token that bears loss, whatever it was given as."""
    if getattr(value, "ndim", None) == 0 or not is_per_token(value) or isinstance(value, str | bytes):
        return finite(value) if hasattr(value, "ndim") or not isinstance(value, bool | int | float) else _same(value)
    try:
        found = numbers(value.detach().double().cpu().numpy() if isinstance(value, Tensor) else value)
    except Exception as error:
        raise ValueError(f"is neither a number nor one for each token; got {_kind(value)}") from error
    if found.shape != (response.loss_tokens,):
        raise ValueError(
            f"has the shape {found.shape}: give one number, or one for each of its {response.loss_tokens} tokens that "
            "bear loss"
        )
    if not np.isfinite(found).all():
        raise ValueError("has numbers that are not finite")
    return found


def _same(value: float) -> float:
    finite(value)
    return value


# ---------------------------------------------------------------------------------------------- sampling


def check_engine(engine: RolloutEngine) -> RolloutEngine:
    """Raise ConfigError unless an engine's temperature and importance cap are numbers."""
    for name, wanted in (("temperature", "a number >= 0"), ("importance_cap", "a number > 0, or None")):
        with calling(engine, name):
            value = getattr(engine, name)
        try:
            good = (value is None and name != "temperature") or finite(value) >= 0
        except ValueError:
            good = False
        if not good:
            raise ConfigError(f"{name_of(engine, name)}: must be {wanted}; got {value!r:.80}")
    return engine


@contextmanager
def started(engine: RolloutEngine, context: RolloutContext) -> Iterator[None]:
    """What an engine needs for as long as a run samples."""
    with ExitStack() as stack:
        with calling(engine, "start"):
            manager: Any = engine.start(context)
            if not isinstance(manager, AbstractContextManager):
                raise AlignlabError(
                    f"{name_of(engine, 'start')}: must return a context manager, as nullcontext(); got {_kind(manager)}"
                )
            stack.enter_context(manager)
        yield


def sampler_of(engine: RolloutEngine, policy: Any) -> Sampler:
    """An engine's sampler of a policy."""
    with calling(engine, "sampler"):
        found: Any = engine.sampler(policy)
        if not isinstance(found, Sampler):
            raise AlignlabError(
                f"{name_of(engine, 'sampler')}: must return a sampler, with `sample` and `generated_tokens`; got "
                f"{_kind(found)}"
            )
    return found


def give_sampler(scorers: Iterable[Scorer], sampler: Sampler) -> None:
    """Hand the sampler to the scorers that draw responses themselves."""
    for scorer in scorers:
        if isinstance(scorer, NeedsSampler):
            with calling(scorer, "bind_sampler"):
                scorer.bind_sampler(sampler)


def generated_tokens(sampler: Sampler) -> int:
    """Tokens that a sampler has drawn so far."""
    with calling(sampler, "generated_tokens"):
        found = sampler.generated_tokens
    try:
        return int(finite(found))
    except ValueError as error:
        raise AlignlabError(f"{name_of(sampler, 'generated_tokens')}: {error}") from error


def drawn(sampler: Sampler, environment: Environment | None, groups: Sequence[Group], n: int, seed: int) -> list[Group]:
    """The groups with n responses each, from the sampler, or from an environment in which its policy acts.

    Raises:
        AlignlabError: that raised, or returned something else.
    """
    part, method = (sampler, "sample") if environment is None else (environment, "rollout")
    with calling(part, method, records(groups)):
        found: Any = (
            sampler.sample(groups, n, seed) if environment is None else environment.rollout(sampler, groups, n, seed)
        )
    if not is_ours(part):
        _check_drawn(name_of(part, method), groups, found, n)
    if environment is not None:
        _check_filled(name_of(part, method), found, fills_of(environment), every=not is_ours(part))
    return list(found)


def taken(sampler: Sampler, take: Callable[[], list[Group]], groups: Sequence[Group], n: int) -> list[Group]:
    """Wait for the groups that a sampler has been drawing meanwhile: `take` is what its `prefetch` returned.

    Raises:
        AlignlabError: as in `drawn`.
    """
    with calling(sampler, "prefetch", records(groups)):
        found: Any = take()
    if not is_ours(sampler):
        _check_drawn(name_of(sampler, "prefetch"), groups, found, n)
    return list(found)


def _check_drawn(name: str, groups: Sequence[Group], found: Any, n: int) -> None:
    if not isinstance(found, Sequence) or not all(isinstance(g, Group) for g in found):
        raise AlignlabError(
            f"{name}: must return a list of groups, {len(groups)}, one for each prompt; got {_kind(found)}"
        )
    if len(found) != len(groups):
        raise AlignlabError(f"{name}: returned {len(found)} groups for {len(groups)} prompts; must be one for each")
    for group, asked in zip(found, groups, strict=True):
        if len(group.responses) != n or not all(isinstance(r, Response) for r in group.responses):
            raise AlignlabError(f"{asked.place}: {name}: must give {n} responses; got {len(group.responses)}")
        for k, response in enumerate(group.responses):
            where, ids, mask = f"{asked.place}: {name}: response {k + 1}", response.token_ids, response.loss_mask
            if not isinstance(ids, list) or not ids or not all(isinstance(i, WHOLE) and i >= 0 for i in ids):
                raise AlignlabError(f"{where} needs a list of at least one token id")
            if mask is not None and len(mask) != len(ids):
                raise AlignlabError(f"{where} has {len(ids)} tokens and {len(mask)} values of loss_mask")
            if not is_per_token(response.columns.get("behaviour_logp", 0.0)):
                raise AlignlabError(
                    f"{where} needs `behaviour_logp`, a log-prob for each of its {response.loss_tokens} tokens that "
                    "bear loss, under the distribution that they were drawn from"
                )
            try:
                response.columns["behaviour_logp"] = _column(response, response.columns["behaviour_logp"])
            except ValueError as error:
                raise AlignlabError(f"{where}: `behaviour_logp` {error}") from error


def _kind(value: object) -> str:
    return "None" if value is None else type(value).__name__
