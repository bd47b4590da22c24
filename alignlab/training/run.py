"""One training run, from a resolved config to a folder with a model in it."""

from __future__ import annotations

import resource
import sys
from collections.abc import Iterable
from functools import partial
from os.path import isdir, isfile  # unlike Path's, False for names that are too long
from pathlib import Path
from typing import Any

import torch

from alignlab.core import (
    Callback,
    ConfigError,
    DataError,
    RolloutContext,
)
from alignlab.core.files import write_json
from alignlab.core.parts import calling, complaint
from alignlab.data import Splits, load
from alignlab.models import (
    PackedModel,
    check_tokens,
    dtype_loaded,
    load_model,
    outline_of,
    save_model,
)
from alignlab.training import provenance
from alignlab.training.callbacks import CheckpointEvery, Evaluation, Samples
from alignlab.training.callbacks.logging import Logging, MetricsLog
from alignlab.training.callbacks.progress import ProgressDisplay
from alignlab.training.callbacks.pruning import PRUNED, Pruning
from alignlab.training.callbacks.run_lock import RunLock
from alignlab.training.checkpoints.store import Checkpoints
from alignlab.training.distributed.processes import Processes
from alignlab.training.distributed.watchdog import LOGS
from alignlab.training.optimizer import build_optimizer
from alignlab.training.precision import Precision, in_words, scaling
from alignlab.training.reference_cache import wants_reference
from alignlab.training.run_config import RunConfig, check
from alignlab.training.run_folder import RESULT, claim, finished
from alignlab.training.trainer import Trainer


def train(
    config: dict[str, Any], out: Path, callbacks: Iterable[Callback] = (), checked: RunConfig | None = None
) -> dict[str, Any]:
    """Train as the config says, in the folder `out`; go on from its newest checkpoint where there is one.

    Args:
        callbacks: called beside those of the config.
        checked: what the config names, where it is made already.

    Returns:
        What `result.json` holds: steps, tokens, seconds, peak memory, the last evaluation. Of a run that was finished
        before, also `already_done`. Of a trial that was ended early: what `pruned.json` holds, and `pruned`.

    Raises:
        ConfigError: a setting is unknown or impossible, or `out` holds a run with other settings or on other data.
        DataError: a record cannot be used, with file and line.
    """
    run = checked or check(config)
    files = [Path(p) for p in run.data.paths if isfile(p) or isdir(p)]
    if run.training.resumes and (found := finished(out, config)) is not None:
        provenance.check_data(out, files, run.training.resume)
        return found | {"already_done": True}
    if run.training.threads:
        torch.set_num_threads(run.training.threads)
    scaled = scaling(run.training.mixed_precision, dtype_loaded(run.model, run.quantization))
    processes = Processes(scaled, run.distributed)
    lock = _take_folder(out, config, run, processes, files)
    with run.sampling(partial(_context, out, run, processes)):  # first: a server may share the GPU with the model
        model = _load_model(run, processes)
        splits = _load_data(run, model, processes)
        trainer = _make_trainer(config, out, run, processes, lock, model, splits, callbacks)
        if processes.is_main:
            _say(config, out, run, trainer, files)
        with processes.peers():
            trainer.run()
    return _finish(out, run, trainer)


def _context(out: Path, run: RunConfig, processes: Processes) -> RolloutContext:
    """What a rollout engine needs to know of the run before the model is there."""
    outline = outline_of(run.model)
    precision = Precision.of(run.training.mixed_precision, run.distributed.mode, outline.dtype, processes.device)
    return RolloutContext(
        model_settings=run.model,
        folder=out,
        adapter=run.adapter,
        device=processes.device,
        dtype=precision.products_in(outline.dtype, run.adapter.trains_base),
        held=_held(run, outline.weights, processes.world) if processes.device.type == "cuda" else 0.0,
        rank=processes.rank,
        gather=processes.gather,
        show_progress=run.training.progress != "off",
    )


def _held(run: RunConfig, weights: int, world: int) -> float:
    """Bytes of a device that weights and optimiser states will take, about: where the model itself is trained, float32
    weights, AdamW's two states and a reference in half precision; under an adapter the frozen base, 2 bytes a weight or
    half of one."""
    mode = run.distributed.mode
    if not run.adapter.trains_base:
        held = weights * (0.6 if run.quantization.kind == "nf4" else 1.1 if run.quantization.kind == "int8" else 2.1)
        return held / world if run.distributed.divides else held
    reference = 2 if wants_reference(run.algorithm, run.source) else 0
    whole, states = weights * (4 + reference), weights * 8
    return (whole + states) / world if run.distributed.divides else whole + states / (world if "zero" in mode else 1)


def _take_folder(
    out: Path, config: dict[str, Any], run: RunConfig, processes: Processes, files: list[Path]
) -> RunLock | None:
    """Claim the run's folder; its lock, on the main process."""
    lock = RunLock(out) if processes.is_main else None
    if lock is not None:
        claim(out, config, run.training, files)
        lock.take()
    processes.barrier()
    processes.watch(out / LOGS)
    return lock


def _load_model(run: RunConfig, processes: Processes) -> PackedModel:
    algorithm = run.algorithm
    model = load_model(
        run.model,
        run.adapter,
        algorithm.model,
        labels=algorithm.labels,
        language_head=algorithm.model == "score" and "logp" in algorithm.reads,
        quantization=run.quantization,
        # A model that is to be divided need not fit on one device; a quantised base is made there, and is small.
        device="cpu" if run.distributed.divides and run.quantization.kind == "none" else processes.device,
        seed=run.training.seed,
    )
    with calling(algorithm, "setup"):
        algorithm.setup(model.tokenizer)
    torch.manual_seed(run.training.seed)
    for note in model.notes if processes.is_main else ():
        print(f"note: {note}", file=sys.stderr)
    return model


def _load_data(run: RunConfig, model: PackedModel, processes: Processes) -> Splits:
    """Training and validation records, each of which the algorithm can use."""
    settings = run.data
    if settings.max_length is None and model.max_length:
        settings = settings.model_copy(update={"max_length": model.max_length})
    splits = load(settings, model.tokenizer)
    for line in splits.report.lines() if processes.is_main else ():
        print(line)
    for group in [*splits.train, *splits.validation]:
        reason = None if run.samples else complaint(run.algorithm, group)
        if reason:
            raise DataError(f"{group.origin}: {reason}")
    check_tokens([*splits.train, *splits.validation], int(model.config.vocab_size))
    if run.training.eval_every is not None and not splits.validation:
        raise ConfigError("training.eval_every: there are no validation records: see data.validation")
    return splits


def _make_trainer(
    config: dict[str, Any],
    out: Path,
    run: RunConfig,
    processes: Processes,
    lock: RunLock | None,
    model: PackedModel,
    splits: Splits,
    callbacks: Iterable[Callback],
) -> Trainer:
    settings = run.training
    return Trainer(
        model,
        run.algorithm,
        optimizer=partial(build_optimizer, run.optimizer),
        train=splits.train,
        validation=splits.validation,
        scorers=run.scorers,
        rollout=run.engine,
        environment=run.environment,
        schedule=run.schedule,
        order=run.order,
        callbacks=[*_callbacks(config, out, run, processes, lock), *run.callbacks, *callbacks],
        settings=settings,
        source=run.source,
        distributed=run.distributed,
        processes=processes,
        checkpoints=Checkpoints(
            out / "checkpoints",
            settings.keep_last,
            settings.keeps_best,
            settings.metric_mode,
            is_main=processes.is_main,
            agree=lambda well: all(processes.gather(well)),
            guard=lock.check if lock is not None else None,
        ),
    )


def _callbacks(
    config: dict[str, Any], out: Path, run: RunConfig, processes: Processes, lock: RunLock | None
) -> list[Callback]:
    """What every run has. Pruning comes after the metrics that it goes by, at the end of a run before their log."""
    settings, is_main = run.training, processes.is_main
    found: list[Callback] = [
        Logging(
            MetricsLog(out, run.tracker, config, is_main),
            ProgressDisplay(settings.progress, is_main),
            settings.log_every,
        )
    ]
    if settings.eval_every is not None:
        found.append(
            Evaluation(
                settings.eval_every,
                settings.metric,
                settings.metric_mode,
                settings.patience,
                settings.keeps_best,
                settings.final == "best",
            )
        )
    if lock is not None:
        found.append(lock)
    if run.samples:
        found.append(Samples(out))
    if is_main and (pruning := Pruning.of(out)) is not None:
        found.append(pruning)
    found.append(CheckpointEvery(settings.checkpoint_steps, settings.checkpoint_seconds))
    return found


def _say(config: dict[str, Any], out: Path, run: RunConfig, trainer: Trainer, files: list[Path]) -> None:
    """Write down where the run comes from, and print what it is."""
    processes, model = trainer.processes, trainer.model
    resumed = run.training.resumes and trainer.checkpoints is not None and bool(trainer.checkpoints.folders())
    found = provenance.collect(config, files, model.tokenizer, run.training.seed, processes.world)
    found["precision"] = trainer.computes
    provenance.write(out, found, resumed)
    where = f"{processes.world} process(es), {trainer.engine.name}, {processes.device}"
    rows = f"{model.layout} rows, {trainer.budget.found():,} tokens at a time"
    print(f"{type(run.algorithm).__name__} on {len(trainer.train)} groups: {where}, {rows} → {out}")
    print(f"precision: {in_words(trainer.computes, processes.device)}")


def _finish(out: Path, run: RunConfig, trainer: Trainer) -> dict[str, Any]:
    """Write the model and the result."""
    processes, state = trainer.processes, trainer.state
    result = {
        "step": state.step,
        "ended_by": trainer.loop.ended_by,
        "trained_tokens": state.trained_tokens,
        "generated_tokens": state.generated_tokens,
        "seconds": round(state.seconds, 3),
        "peak_memory_mb": round(max(processes.gather(peak_memory_mb())), 1),
        "processes": processes.world,
        "engine": trainer.engine.name,
        "precision": trainer.computes,
        "evaluation": trainer.evaluation,
    }
    if trainer.discarded:  # a trial that was pruned
        if processes.is_main:
            write_json(out / PRUNED, result)
        processes.barrier()
        processes.unwatch()
        return result | {"pruned": True}
    model = _whole_model(out, run, trainer)
    if processes.is_main:
        texts = [g for g in trainer.train if g.responses][:8]
        for note in save_model(model, out / "model", merge=run.training.save_model == "merged", texts=texts):
            print(f"note: {note}", file=sys.stderr)
        write_json(out / RESULT, result)
    processes.barrier()
    processes.unwatch()
    return result


def _whole_model(out: Path, run: RunConfig, trainer: Trainer) -> PackedModel:
    """The trained model; where no process has it, put together anew in the main process's memory."""
    if not run.distributed.divides:
        return trainer.model
    trained: dict[str, Any] = {}
    for name, tensors in trainer.engine.tensors(states=False):
        if trainer.processes.is_main:
            trained[name] = {"weight": tensors["weight"].cpu()}
    if not trainer.processes.is_main:
        return trainer.model
    from alignlab.training.checkpoints.export import rebuild

    return rebuild(out, trained, trust=True)


def peak_memory_mb() -> float:
    """Most memory this process has held: on the GPU where it computes on one, else of the process, in MB (10⁶)."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 1e6
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak * (1 if sys.platform == "darwin" else 1024) / 1e6
