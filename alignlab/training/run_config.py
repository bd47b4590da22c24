"""The config of a run, checked: all that can be known to be wrong before a model or data are loaded."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from alignlab.build import build_type, section
from alignlab.core import (
    AdapterKind,
    Algorithm,
    Callback,
    ConfigError,
    DataOrder,
    Environment,
    RolloutContext,
    RolloutEngine,
    Schedule,
    Scorer,
    Tracker,
    did_you_mean,
    require,
)
from alignlab.core.parts import calling, check_algorithm, fills_of, name_of, started
from alignlab.data import DataSettings
from alignlab.models import (
    ModelSettings,
    QuantizationSettings,
    check_adapter,
)
from alignlab.rollout import build_engine, build_environment
from alignlab.scoring import build_scorers
from alignlab.training.callbacks.trackers import build_tracker
from alignlab.training.optimizer import build_optimizer, check_mode
from alignlab.training.reference_cache import wants_reference
from alignlab.training.settings import DistributedSettings, SourceSettings, TrainingSettings


@dataclass(frozen=True)
class RunConfig:
    """The sections of a run's config, each possible in itself and with the others."""

    training: TrainingSettings
    distributed: DistributedSettings
    source: SourceSettings
    model: ModelSettings
    adapter: AdapterKind
    quantization: QuantizationSettings
    data: DataSettings
    algorithm: Algorithm
    scorers: list[Scorer]
    rollout: RolloutEngine
    environment: Environment | None
    tracker: Tracker | None
    schedule: Any
    order: Any
    callbacks: list[Callback]
    optimizer: dict[str, Any]

    @property
    def samples(self) -> bool:
        """Whether responses are sampled."""
        return self.source.kind == "rollout"

    @property
    def engine(self) -> RolloutEngine | None:
        """What samples in this run; None where nothing does."""
        return self.rollout if self.samples else None

    def check_mode(self, mode: str) -> None:
        """See that the run can be had in a mode of `distributed`; raises a ConfigError where it cannot."""
        optimizer = build_optimizer(self.optimizer, [{"params": [torch.nn.Parameter(torch.zeros(1, 1))]}])
        check_mode(mode, self.training.mixed_precision, optimizer)

    def sampling(self, context: Callable[[], RolloutContext]) -> Any:
        """What must live while responses are sampled, such as a server."""
        return started(self.rollout, context()) if self.samples else nullcontext()


def check(config: dict[str, Any], algorithm: Algorithm | None = None, scorers: list[Scorer] | None = None) -> RunConfig:
    """All that can be known to be wrong with a run before a model or data are loaded.

    Args:
        algorithm, scorers: instead of those that the config names.

    Raises:
        ConfigError: a setting is unknown, impossible, or at odds with another.
    """
    run = RunConfig(
        training=section(TrainingSettings, config["training"], "training"),
        distributed=section(DistributedSettings, config.get("distributed", {}), "distributed"),
        source=section(SourceSettings, config["source"], "source"),
        model=section(ModelSettings, config["model"], "model"),
        adapter=build_type(AdapterKind, config["adapter"], "adapter"),
        quantization=section(QuantizationSettings, config.get("quantization", {}), "quantization"),
        data=section(DataSettings, config["data"], "data"),
        algorithm=algorithm or build_algorithm(config["algorithm"]),
        scorers=build_scorers(config["scoring"]) if scorers is None else scorers,
        rollout=build_engine(config["rollout"]),
        environment=build_environment(config.get("environment")),
        tracker=build_tracker(config.get("tracker")),
        schedule=build_type(Schedule, config.get("schedule"), "schedule"),
        order=partial(build_type, DataOrder, config["order"], "order") if config.get("order") else None,
        callbacks=_build_callbacks(config.get("callbacks") or {}),
        optimizer=config["optimizer"],
    )
    run.check_mode(run.distributed.mode)
    check_adapter(run.quantization, run.adapter)
    _check_watching(run.training)
    _check_columns(run)
    if run.samples:
        temperature = run.rollout.temperature
        require(temperature > 0, "rollout.temperature", temperature, "a policy that is trained must sample: above 0")
        parts = {"source": run.source, "distributed": run.distributed, "quantization": run.quantization}
        with calling(run.rollout, "check"):
            run.rollout.check({**parts, "environment": run.environment}, run.algorithm)
    elif run.environment is not None:
        raise ConfigError("environment: a policy acts in one only with source=rollout")
    if run.source.ref_update_interval and not wants_reference(run.algorithm, run.source):
        raise ConfigError(f"source.ref_update_interval: {type(run.algorithm).__name__} uses no reference policy")
    return run


def _build_callbacks(values: Any) -> list[Callback]:
    """The callbacks of the config, each a section with a name of the user's."""
    if not isinstance(values, dict):
        raise ConfigError(f"callbacks={values!r}: must be sections, as in callbacks.mine._target_=my_module.MyCallback")
    return [build_type(Callback, each, f"callbacks.{name}") for name, each in values.items()]


def build_algorithm(values: dict[str, Any]) -> Algorithm:
    """The algorithm that `_target_` names: one of ours or anyone's on the Python path."""
    algorithm: Algorithm = build_type(Algorithm, values, "algorithm")
    check_algorithm(algorithm)
    return algorithm


def _check_watching(settings: TrainingSettings) -> None:
    watching = {"patience": settings.patience, "final": settings.final == "best"}
    for name, wanted in watching.items():
        if wanted and settings.eval_every is None:
            raise ConfigError(f"training.{name}: needs evaluations: give training.eval_every, in steps")


def _check_columns(run: RunConfig) -> None:
    """Find out before anything is loaded that nobody fills in what the algorithm needs. Records bring columns of their
    own; a missing one is reported with the record."""
    by_the_loop = {"ref_logp", "old_logp", "old_value", "behaviour_logp"}
    filled = by_the_loop | {column for scorer in run.scorers for column in fills_of(scorer)}
    filled |= set(fills_of(run.environment)) if run.environment is not None else set()
    # Records of these formats may bring columns of any name.
    free = run.data.parser in ("auto", "groups") or "." in str(run.data.parser)
    for column in run.algorithm.needs:
        if column in filled:
            continue
        near = did_you_mean(column, filled if run.samples else by_the_loop)
        if near.startswith("; did") and (run.samples or not free):
            raise ConfigError(f"{name_of(run.algorithm, 'needs')}: nothing fills the column '{column}'{near}")
        if run.samples:
            raise ConfigError(
                f"scoring: {type(run.algorithm).__name__} needs the column '{column}' and nothing fills it: "
                "choose a scorer, as in scoring=reward_model scoring.path=DIR (or source=data, where the records have "
                "responses and rewards)"
            )
