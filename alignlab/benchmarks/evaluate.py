"""Measure a saved model on a benchmark."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import torch
from pydantic import Field

from alignlab.benchmarks.base import Subject
from alignlab.build import build_type, section, targets
from alignlab.config import read_yaml
from alignlab.core import AlignlabError, Benchmark, ConfigError, MeasuresBestOf, Scorer, require
from alignlab.core.files import write_json
from alignlab.core.parts import bind_all, calling, fills_of, name_of, sampler_of
from alignlab.core.settings import Settings
from alignlab.models import ModelSettings, QuantizationSettings, load_model
from alignlab.rollout import build_engine
from alignlab.rollout.policy import Policy
from alignlab.scoring import RewardModelScorer, SeveralScorers, build_scorers
from alignlab.training.callbacks.logging import MetricsLog
from alignlab.training.callbacks.trackers import build_tracker

RANKED = ("reward", "kl", "win_rate")
"""Metrics whose names have a meaning for leaderboards."""


class EvaluateSettings(Settings):
    """What is measured, against what."""

    run: str = Field(min_length=1)
    out: str | None = None
    reference: str | None = None
    base: str | None = None
    reward_model: str | None = None
    best_of: int = Field(1, ge=1)
    max_tokens_per_microbatch: int = Field(16384, ge=1)
    threads: int | None = Field(None, ge=1)
    seed: int = 0


def build_benchmark(values: dict[str, Any]) -> Any:
    """The benchmark that `_target_` names: any class with the methods of `core.Benchmark`.

    Raises:
        ConfigError: there is none, or it lacks a method, with which.
    """
    benchmark = build_type(Benchmark, values, "benchmark")
    if not isinstance(benchmark.name, str) or not benchmark.name:
        raise ConfigError(f"{name_of(benchmark, 'name')}: must be a text; got {benchmark.name!r:.80}")
    return benchmark


def evaluate(config: dict[str, Any]) -> dict[str, Any]:
    """Measure the model of the run `run` (a run's folder or a model) and write `evaluation.json` there, or in `out`.

    The reference is `reference`, or else the model that the run started from. Where there is a `tracker` it gets
    the metrics too: in the summary of the run that was trained in that folder, or in a run of their own.

    Raises:
        ConfigError: there is no model, or no reference can be told, or best-of-N sampling cannot be measured.
        AlignlabError: the benchmark returns something else than metrics.
    """
    wanted = section(EvaluateSettings, {k: config[k] for k in EvaluateSettings.model_fields}, "")
    tracker = dict(config.get("tracker") or {})
    build_tracker(tracker)
    run = Path(wanted.run)
    path = run / "model" if (run / "model").is_dir() else run
    reference_path = wanted.reference or _start_of(run)
    if reference_path is None:
        missing = "is no run of alignlab" if run.exists() else "is not there; a model of the Hub needs a reference"
        raise ConfigError(f"run={run}: {missing}: name the model to measure against, reference=PATH")
    if wanted.threads:
        torch.set_num_threads(wanted.threads)
    benchmark = build_benchmark(config["benchmark"])
    rollout = build_engine(config["rollout"])
    proxy = _proxy(config.get("scoring"), wanted.reward_model)
    check_best_of("best_of", wanted.best_of, benchmark, proxy, rollout.temperature)
    quantization = section(QuantizationSettings, config.get("quantization", {}), "quantization")

    def open_model(where: str, key: str) -> Policy:
        settings = section(ModelSettings, {**config["model"], "path": where}, "model")
        device = "cuda" if torch.cuda.is_available() else "cpu"
        # What judges fluency is no part of what is measured: it stays as it is.
        held = QuantizationSettings() if key == "base" else quantization
        model = load_model(settings, trainable=False, quantization=held, device=device, key=key)
        for note in model.notes:
            print(f"note: {note}", file=sys.stderr)
        return Policy(model)

    base = wanted.base
    subject = Subject(
        policy=open_model(str(path), "run"),
        reference=_as_context(lambda: open_model(reference_path, "reference")),
        sampler=lambda policy: sampler_of(rollout, policy.model),
        base=(lambda: open_model(base, "base")) if base else None,
        proxy=proxy,
        max_tokens_per_microbatch=wanted.max_tokens_per_microbatch,
        seed=wanted.seed,
        best_of=wanted.best_of,
    )
    bind_all([proxy], subject.policy)
    with calling(benchmark, "evaluate"):
        measured = benchmark.evaluate(subject)
    if not isinstance(measured, Mapping):
        raise AlignlabError(
            f"benchmark '{benchmark.name}': evaluate returned {measured!r}; it must return metrics by name"
        )
    found = {"benchmark": benchmark.name, "samples_per_answer": wanted.best_of}
    found |= {str(name): _as_json(value, f"benchmark '{benchmark.name}': {name}") for name, value in measured.items()}
    _check_metrics(benchmark.name, found)
    folder = Path(wanted.out) if wanted.out else run if run.is_dir() else Path.cwd()
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "evaluation.json", without_nan(found))
    if tracker.get("_target_"):
        _track(folder, tracker, config, found)
    return found


def _check_metrics(benchmark: str, found: Mapping[str, Any]) -> None:
    """Refuse what leaderboards cannot rank, and say which metrics are not finite: JSON has null for them."""
    for name, value in found.items():
        numbers = value if name.endswith("_per_prompt") else [value] if name in RANKED else []
        if not isinstance(numbers, list) or any(not isinstance(n, int | float | None) for n in numbers):
            raise AlignlabError(
                f"benchmark '{benchmark}': {name}: evaluate returned {value!r:.80}; it must be a number"
            )
        if isinstance(value, float) and not math.isfinite(value):
            print(f"note: benchmark '{benchmark}': {name} is {value}: written as null", file=sys.stderr)


def _proxy(scoring: Any, reward_model: str | None) -> Scorer | None:
    """What gave the reward that was trained against: a reward model, or what the section `scoring` says."""
    scorers = build_scorers(scoring)
    if not scorers:
        return RewardModelScorer(reward_model) if reward_model else None
    require(reward_model is None, "reward_model", reward_model, "scoring gives the reward: leave out one of them")
    proxy = scorers[0] if len(scorers) == 1 else SeveralScorers({str(i): s for i, s in enumerate(scorers)})
    if "reward" not in (fills := fills_of(proxy)):
        raise ConfigError(f"scoring: fills {', '.join(fills)}, not reward")
    return proxy


def check_best_of(key: str, n: int, benchmark: Benchmark, reward_model: object, temperature: float) -> None:
    """Raise ConfigError where the best of n samples, asked for by the setting `key`, cannot be measured."""
    if n == 1:
        return
    measures = isinstance(benchmark, MeasuresBestOf) and benchmark.supports_best_of
    require(measures, key, n, f"the benchmark '{benchmark.name}' does not measure best-of-N sampling")
    require(reward_model is not None, key, n, "a reward model picks the best, and there is none: give reward_model")
    require(temperature > 0, "rollout.temperature", temperature, f"best_of={n} needs samples that differ: above 0")


def _as_context(open_model: Callable[[], Policy]) -> Callable[[], AbstractContextManager[Policy]]:
    @contextmanager
    def context() -> Iterator[Policy]:
        yield open_model()

    return context


def _track(folder: Path, tracker: dict[str, Any], config: dict[str, Any], found: dict[str, Any]) -> None:
    """Put the metrics of an evaluation into the summary of the folder's tracked run, as in `exact/objective_score`."""
    trained = _config_of(folder)
    known = dict(trained.get("tracker") or {})
    own = [name for _, name in targets(known, "tracker")] == [tracker["_target_"]]  # and nothing else, from anyone
    if own:  # the names of the training run stay as they are
        tracker, shown = {**known, **({"mode": tracker["mode"]} if "mode" in tracker else {})}, trained
    else:
        shown = config
        if "job_type" in tracker:
            tracker = {**tracker, "job_type": tracker["job_type"] or "evaluate"}
    metrics = {k: v for k, v in found.items() if isinstance(v, int | float) and not isinstance(v, bool)}
    with MetricsLog(folder, build_tracker(tracker), shown) as log:
        log.summarize({f"{found['benchmark']}/{name}": float(value) for name, value in metrics.items()})


def _start_of(run: Path) -> str | None:
    """The model a run of ours started from."""
    model = _config_of(run).get("model")
    path = model.get("path") if isinstance(model, dict) else None
    return path if isinstance(path, str) else None


def _config_of(run: Path) -> dict[str, Any]:
    """The config of a run of ours; nothing where the folder is none."""
    path = run / "config.yaml"
    return read_yaml(path, advice="name the model to measure against, reference=PATH") if path.exists() else {}


def _as_json(value: Any, where: str) -> Any:
    """The value with numbers, lists and dicts of Python instead of those of NumPy or torch."""
    value = value.tolist() if hasattr(value, "tolist") else value
    if isinstance(value, Mapping):
        return {str(k): _as_json(v, f"{where}.{k}") for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_as_json(v, f"{where}[{i}]") for i, v in enumerate(value)]
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise AlignlabError(
        f"{where}: evaluate returned a {type(value).__name__}; it must be a number, a text or a list of them"
    )


def without_nan(value: Any) -> Any:
    """JSON has no NaN: null."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {k: without_nan(v) for k, v in value.items()}
    return [without_nan(v) for v in value] if isinstance(value, list) else value
