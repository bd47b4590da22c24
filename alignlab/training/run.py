"""One training run, from a resolved config to a folder with a model in it."""

from __future__ import annotations

import json
import resource
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from alignlab.config import build, section
from alignlab.core import (
    Algorithm,
    ConfigError,
    DataError,
    Environment,
    Group,
    NeedsPolicy,
    RolloutContext,
    RolloutEngine,
    Scorer,
    require,
)
from alignlab.core.files import write_json, write_text
from alignlab.data import DataSettings, load
from alignlab.models import (
    AdapterSettings,
    ModelSettings,
    QuantizationSettings,
    Reference,
    add_value_head,
    check_adapter,
    load_model,
    save_model,
)
from alignlab.rollout import build_engine, build_environment
from alignlab.scoring import build_scorers
from alignlab.training import provenance
from alignlab.training.callbacks.progress import ProgressDisplay
from alignlab.training.callbacks.pruning import PRUNED, Pruning
from alignlab.training.callbacks.tracking import Tracker, TrackerSettings
from alignlab.training.checkpoints.store import Checkpoints
from alignlab.training.distributed.engine import DIVIDING, make_engine
from alignlab.training.distributed.processes import Processes
from alignlab.training.distributed.watchdog import LOGS
from alignlab.training.off_policy import saved_when_lost
from alignlab.training.reference_cache import ReferenceCache, identity
from alignlab.training.run_folder import RESULT, claim
from alignlab.training.run_lock import RunLock
from alignlab.training.settings import DistributedSettings, SourceSettings, TrainingSettings
from alignlab.training.trainer import Trainer

SAMPLES_KEPT = 2
"""Groups of each iteration that go to samples.jsonl."""


def train(config: dict[str, Any], out: Path) -> dict[str, Any]:
    """Train as the config says, in the folder `out`; go on from its newest checkpoint where there is one.

    Returns:
        What `result.json` holds: steps, tokens, seconds, peak memory, the last evaluation. Of a trial of a search that
        was ended early: what `pruned.json` holds, and `pruned`.

    Raises:
        ConfigError: a setting is unknown or impossible, or `out` holds a run with other settings.
        DataError: a record cannot be used, with file and line.
    """
    checked = check(config)
    settings, source, rollout, algorithm = checked.training, checked.source, checked.rollout, checked.algorithm
    data_settings, scorers = checked.data, checked.scorers
    if settings.threads:
        torch.set_num_threads(settings.threads)

    processes = Processes(settings.mixed_precision, checked.distributed)
    owner = RunLock(out) if processes.is_main else None
    if owner is not None:
        claim(out, config, settings)
        owner.take()
    processes.barrier()
    processes.watch(out / LOGS)
    divides = checked.distributed.mode in DIVIDING
    model = load_model(
        checked.model,
        checked.adapter,
        algorithm.model,
        labels=algorithm.labels,
        language_head=algorithm.model == "score" and "logp" in algorithm.reads,
        quantization=checked.quantization,
        # A model that is to be divided need not fit on one device; a quantised base is made there, and is small.
        device="cpu" if divides and checked.quantization.kind == "none" else processes.device,
        seed=settings.seed,
    )
    algorithm.setup(model.tokenizer)
    torch.manual_seed(settings.seed)
    for note in model.notes if processes.is_main else ():
        print(f"note: {note}", file=sys.stderr)
    if data_settings.max_length is None and model.max_length:
        data_settings = data_settings.model_copy(update={"max_length": model.max_length})
    splits = load(data_settings, model.tokenizer)
    for line in splits.report.lines() if processes.is_main else ():
        print(line)
    groups = splits.train
    for group in [*groups, *splits.validation]:
        reason = algorithm.check(group) if source.kind == "data" else None
        if reason:
            raise DataError(f"{group.origin}: {reason}")

    if settings.eval_every is not None and not splits.validation:
        raise ConfigError("training.eval_every: there are no validation records: see data.validation")

    fresh = checked.adapter.kind == "lora" and not (Path(checked.model.path) / "adapter_config.json").exists()
    reference = (
        Reference(model, fresh, moves=source.ref_update_interval is not None)
        if _wants_reference(algorithm, source)
        else None
    )
    temperature, cache = rollout.temperature if source.kind == "rollout" else 1.0, None
    if reference is not None and settings.reference_cache and source.kind == "data" and not source.ref_update_interval:
        known = identity(reference, temperature, settings.mixed_precision) if processes.is_main else ""
        cache = ReferenceCache(Path(settings.reference_cache), processes.gather(known)[0])
    if "value" in algorithm.reads:
        add_value_head(model, algorithm.critic, settings.seed)
    optimizer = _build_optimizer(config["optimizer"], [p for p in model.parameters() if p.requires_grad])

    with processes.peers():
        engine = make_engine(checked.distributed, model, optimizer, processes, settings.max_grad_norm)
        processes.same_timeout()
    if reference is not None and not reference.shares_weights:
        engine.divide(reference.held_in)
    tracker = Tracker(out, checked.tracker, config, processes.is_main)
    trainer = Trainer(
        algorithm=algorithm,
        engine=engine,
        settings=settings,
        source=source,
        train=groups,
        validation=splits.validation,
        scorers=scorers,
        reference=reference,
        sampler=rollout.sampler,
        temperature=temperature,
        cache=cache,
        checkpoints=Checkpoints(
            out / "checkpoints",
            settings.keep_last,
            settings.keeps_best,
            settings.metric_mode,
            is_main=processes.is_main,
            agree=lambda well: all(processes.gather(well)),
        ),
        tracker=tracker,
        progress=ProgressDisplay(settings.progress, processes.is_main),
        keep_samples=_keep_samples(out),
        pruning=Pruning.of(out) if processes.is_main else None,
        owner=owner,
    )
    if processes.is_main:
        files = [Path(p) for p in data_settings.paths if Path(p).exists()]
        resumed = settings.resume == "auto" and bool(trainer.checkpoints.folders())
        provenance.write(
            out, provenance.collect(config, files, model.tokenizer, settings.seed, processes.world), resumed
        )
        where = f"{processes.world} process(es), {engine.name}, {processes.device}"
        rows = f"{model.layout} rows, {trainer.budget.found():,} tokens at a time"
        print(f"{type(algorithm).__name__} on {len(groups)} groups: {where}, {rows} → {out}")
    trainer.collector.rollout, trainer.collector.environment = rollout, checked.environment
    for part in (*scorers, checked.environment):
        if isinstance(part, NeedsPolicy):
            part.bind(model, model.tokenizer)
    shown = settings.progress != "off"
    context = RolloutContext(model, checked.model, out, processes.is_main, processes.gather, shown)
    drawing = rollout.start(context) if source.kind == "rollout" else nullcontext()
    with drawing, tracker, trainer.progress, processes.peers(), saved_when_lost(trainer):
        state = trainer.run()
        if owner is not None:
            owner.check()
    result = {
        "step": state.step,
        "trained_tokens": state.trained_tokens,
        "generated_tokens": state.generated_tokens,
        "seconds": round(state.seconds, 3),
        "peak_memory_mb": round(max(processes.gather(peak_memory_mb())), 1),
        "processes": processes.world,
        "engine": engine.name,
        "evaluation": trainer.evaluation,
    }
    if trainer.pruned:
        if processes.is_main:
            write_json(out / PRUNED, result)
        processes.barrier()
        processes.unwatch()
        return result | {"pruned": True}
    texts = [g for g in groups if g.responses][:8]
    trained: dict[str, Any] = {}
    for name, tensors in engine.tensors(states=False) if divides else ():
        if processes.is_main:
            trained[name] = {"weight": tensors["weight"].cpu()}
    if processes.is_main:
        if divides:  # no process has the model: put it together anew, in the host's memory
            from alignlab.training.checkpoints.export import rebuild

            model = rebuild(out, trained)
        notes = save_model(model, out / "model", merge=settings.save_model == "merged", texts=texts)
        for note in notes:
            print(f"note: {note}", file=sys.stderr)
        write_json(out / RESULT, result)
    processes.barrier()
    processes.unwatch()
    return result


@dataclass(frozen=True)
class Checked:
    """The sections of a run's config, each possible in itself and with the others."""

    training: TrainingSettings
    distributed: DistributedSettings
    source: SourceSettings
    rollout: RolloutEngine
    model: ModelSettings
    adapter: AdapterSettings
    quantization: QuantizationSettings
    data: DataSettings
    tracker: TrackerSettings
    algorithm: Algorithm
    scorers: list[Scorer]
    environment: Environment | None


def check(config: dict[str, Any]) -> Checked:
    """All that can be known to be wrong with a run before a model or data are loaded.

    Raises:
        ConfigError: a setting is unknown, impossible, or at odds with another.
    """
    checked = Checked(
        training=section(TrainingSettings, config["training"], "training"),
        distributed=section(DistributedSettings, config.get("distributed", {}), "distributed"),
        source=section(SourceSettings, config["source"], "source"),
        rollout=build_engine(config["rollout"]),
        model=section(ModelSettings, config["model"], "model"),
        adapter=section(AdapterSettings, config["adapter"], "adapter"),
        quantization=section(QuantizationSettings, config.get("quantization", {}), "quantization"),
        data=section(DataSettings, config["data"], "data"),
        tracker=section(TrackerSettings, config["tracker"], "tracker"),
        algorithm=build_algorithm(config["algorithm"]),
        scorers=build_scorers(config["scoring"]),
        environment=build_environment(config.get("environment")),
    )
    _build_optimizer(config["optimizer"], [torch.nn.Parameter(torch.zeros(1, 1))])
    check_adapter(checked.quantization, checked.adapter)
    _check_limits(checked.training)
    if checked.source.kind == "rollout":
        temperature = checked.rollout.temperature
        require(temperature > 0, "rollout.temperature", temperature, "a policy that is trained must sample: above 0")
    fillers: list[Scorer | Environment] = [*checked.scorers, *([checked.environment] if checked.environment else [])]
    _check_columns(checked.algorithm, checked.source, fillers)
    if checked.source.kind == "rollout":
        checked.rollout.check(vars(checked), checked.algorithm)
    elif checked.environment:
        raise ConfigError("environment: responses are drawn in it only with source=rollout")
    if checked.source.ref_update_interval and not _wants_reference(checked.algorithm, checked.source):
        raise ConfigError(f"source.ref_update_interval: {type(checked.algorithm).__name__} uses no reference policy")
    return checked


def build_algorithm(values: dict[str, Any]) -> Algorithm:
    """The algorithm that `_target_` names: one of ours or anyone's on the Python path."""
    algorithm = build(values, "algorithm")
    if not isinstance(algorithm, Algorithm):
        raise ConfigError(f"algorithm._target_={values['_target_']}: not a subclass of alignlab.core.Algorithm")
    return algorithm


def peak_memory_mb() -> float:
    """Most memory this process has held: on the GPU where it computes on one, else of the process, in MB (10⁶)."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 1e6
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak * (1 if sys.platform == "darwin" else 1024) / 1e6


def _build_optimizer(values: dict[str, Any], trained: Sequence[torch.nn.Parameter]) -> torch.optim.Optimizer:
    """The optimiser that `_target_` names, with weight decay on matrices only."""
    groups: list[dict[str, Any]] = [
        {"params": [p for p in trained if p.dim() >= 2]},
        {"params": [p for p in trained if p.dim() < 2], "weight_decay": 0.0},
    ]
    optimizer = build(values, "optimizer", [g for g in groups if g["params"]])
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise ConfigError("optimizer._target_: must name a subclass of torch.optim.Optimizer")
    return optimizer


def _check_limits(settings: TrainingSettings) -> None:
    ends = (settings.max_trained_tokens, settings.max_generated_tokens, settings.max_seconds)
    if settings.steps is None and settings.epochs is None and not any(ends):
        raise ConfigError("training: nothing ends this run: give training.steps, epochs or one of max_*")
    watching = {"patience": settings.patience, "final": settings.final == "best"}
    for name, wanted in watching.items():
        if wanted and settings.eval_every is None:
            raise ConfigError(f"training.{name}: needs evaluations: give training.eval_every, in steps")


def _wants_reference(algorithm: Algorithm, source: SourceSettings) -> bool:
    return "ref_logp" in algorithm.needs or (source.kind == "rollout" and source.policy == "reference")


def _check_columns(algorithm: Algorithm, source: SourceSettings, fillers: Sequence[Scorer | Environment]) -> None:
    """Find out before anything is loaded that nobody fills in what the algorithm needs."""
    if source.kind == "data":
        return  # records bring columns of their own; a missing one is reported with the record
    filled = {"ref_logp", "old_logp", "old_value", "behaviour_logp", *(c for f in fillers for c in f.fills)}
    for column in algorithm.needs:
        if column not in filled:
            raise ConfigError(
                f"scoring: {type(algorithm).__name__} needs the column '{column}' and nothing fills it: "
                "choose a scorer, as in scoring=reward_model scoring.path=DIR"
            )


def _keep_samples(out: Path) -> Any:
    """Append the first groups of each iteration to samples.jsonl, for people to read. Without groups: forget what
    an earlier sitting wrote after this iteration, which will be sampled again."""
    path = out / "samples.jsonl"

    def keep(iteration: int, step: int, groups: Sequence[Group]) -> None:
        if not groups:
            if path.exists():
                lines = path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True)
                whole = lines[:-1] if lines and not lines[-1].endswith("\n") else lines  # killed while writing
                write_text(path, "".join(s for s in whole if json.loads(s)["iteration"] <= iteration))
            return
        with path.open("a", encoding="utf-8") as file:
            for group in groups[:SAMPLES_KEPT]:
                for response in group.responses:
                    line = {"iteration": iteration, "step": step, "prompt": group.prompt, "response": response.text}
                    numbers = {k: v for k, v in response.columns.items() if isinstance(v, float)}
                    file.write(json.dumps({**line, **numbers}, ensure_ascii=False) + "\n")

    return keep
