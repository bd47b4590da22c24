"""The one trainer: a policy, an algorithm, and steps. Every algorithm, source and mode of distribution goes through it.

`Trainer.step(groups)` takes one optimiser step on groups of one's own. `Trainer.run()` takes as many as the settings
say, on records or on responses that it samples. Callbacks do what happens beside the steps: logging, evaluations,
checkpoints, samples for people to read, pruning.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch

from alignlab.core import (
    Algorithm,
    AlignlabError,
    Callback,
    ConfigError,
    DataOrder,
    Environment,
    Group,
    Interrupted,
    NeedsPolicy,
    NonFiniteError,
    RolloutEngine,
    SamplerLost,
    Schedule,
    Scorer,
)
from alignlab.models import PackedModel, Reference, add_value_head, save_model
from alignlab.training.checkpoints.state import State, load_state, save_state
from alignlab.training.checkpoints.store import Checkpoints
from alignlab.training.collect import Collector
from alignlab.training.distributed.engine import Engine, make_engine
from alignlab.training.distributed.processes import Processes, launched
from alignlab.training.micro_batch_budget import TokenBudget
from alignlab.training.order import Shuffled, iteration_seed
from alignlab.training.reference_cache import ReferenceCache, identity
from alignlab.training.schedule import Constant
from alignlab.training.settings import DistributedSettings, SourceSettings, TrainingSettings
from alignlab.training.signals import StopRequest
from alignlab.training.step import Pass, parameter_groups, run_with_memory

log = logging.getLogger(__name__)

EMPTY_ITERATIONS = 20
"""Iterations in a row that may leave nothing to train on before the run is stopped."""

MakeOptimizer = Callable[[list[dict[str, Any]]], torch.optim.Optimizer]
"""From parameter groups, as torch's optimisers take them, to an optimiser."""


class Trainer:
    """Trains a policy with an algorithm.

        trainer = Trainer(policy, GRPO(kl_coef=0.05), lr=1e-5)
        for _ in range(100):
            groups = policy.sample(prompts, n=8)
            score(groups, reward)
            metrics = trainer.step(groups)
        trainer.save("out")

    Under torchrun every process does the same; `groups` are then all groups, on every process.

    Args:
        policy: the model to train, an `alignlab.Policy` or a `PackedModel`, of the kind that the algorithm trains.
        algorithm: one of `alignlab.algorithms`, or a subclass of `Algorithm` of one's own.
        lr: peak learning rate of AdamW, > 0; or give `optimizer`.
        optimizer: makes another optimiser from parameter groups, as in `functools.partial(torch.optim.SGD, lr=0.1)`.
        train: the records, or the prompts to sample for; for `run`.
        validation: held-out records or prompts; for `evaluate`.
        scorers: fill in columns such as rewards, in this order, before each step.
        rollout: draws responses where `source.kind` is "rollout".
        environment: what the policy acts in while sampling; None: it answers the prompt, and that is all.
        schedule: of the learning rate over a `run`; constant by default.
        order: makes the order of the records from `groups`, `batch_size` and `seed`; shuffled by default.
        callbacks: called in this order at each point of a run, at its end in the reverse order.
        settings: batch size, limits, clipping, precision, seed.
        source: where responses come from.
        distributed: how many processes, and what each holds.
        processes: those of the run, where they have been found already.
        checkpoints: where `run` saves and goes on from; None: it does neither.

    Attributes:
        state: where the run stands.
        metrics: of the last step, and of the evaluation after it.
        evaluation: metrics of the last evaluation.
        stopped: why the run was ended before its limits, by a callback; None otherwise.
        discarded: whether nothing more is to be done with it then.

    Raises:
        ConfigError: policy and algorithm do not fit, or the settings are impossible.
    """

    def __init__(
        self,
        policy: Any,
        algorithm: Algorithm,
        *,
        lr: float | None = None,
        optimizer: MakeOptimizer | None = None,
        train: Sequence[Group] = (),
        validation: Sequence[Group] = (),
        scorers: Sequence[Scorer] = (),
        rollout: RolloutEngine | None = None,
        environment: Environment | None = None,
        schedule: Schedule | None = None,
        order: Callable[..., DataOrder] | None = None,
        callbacks: Iterable[Callback] = (),
        settings: TrainingSettings | None = None,
        source: SourceSettings | None = None,
        distributed: DistributedSettings | None = None,
        processes: Processes | None = None,
        checkpoints: Checkpoints | None = None,
    ) -> None:
        self.algorithm = algorithm
        self.settings, self.source = settings or TrainingSettings(), source or SourceSettings()
        self.model = model = _model_for(policy, algorithm)
        distributed = distributed or DistributedSettings(mode="ddp" if (launched() or 1) > 1 else "single")
        self.processes = processes or Processes(self.settings.mixed_precision, distributed)
        self.train, self.validation = list(train), list(validation)
        self.callbacks = list(callbacks)
        self.schedule = schedule or Constant()
        per_iteration = self.settings.batch_size
        if self.source.kind == "rollout":
            per_iteration = self.source.rollout_batch_size or self.settings.batch_size
        self.order: DataOrder | None = None
        if self.train:
            make_order = order or Shuffled
            self.order = make_order(groups=self.train, batch_size=per_iteration, seed=self.settings.seed)

        # The reference is the policy as it is now: before a value head is added, and before weights are divided.
        reference = None
        if wants_reference(algorithm, self.source):
            reference = Reference(model, model.fresh_adapter, moves=self.source.ref_update_interval is not None)
        cache = self._reference_cache(reference, rollout)
        if "value" in algorithm.reads and model.value_head is None:
            add_value_head(model, algorithm.critic, self.settings.seed)
        made = _optimizer(model, lr, optimizer)
        with self.processes.peers():
            self.engine: Engine = make_engine(distributed, model, made, self.processes, self.settings.max_grad_norm)
            self.processes.same_timeout()
        if reference is not None and not reference.shares_weights:
            self.engine.divide(reference.held_in)
        self.reference = reference
        for part in (*scorers, environment):
            if isinstance(part, NeedsPolicy):
                part.bind(model, model.tokenizer)

        self.checkpoints = checkpoints
        folder = self.checkpoints.folder.parent if self.checkpoints is not None else None
        self.budget = TokenBudget(folder, self.settings.max_tokens_per_microbatch, self.processes.device)
        self.collector = Collector(
            algorithm=algorithm,
            engine=self.engine,
            source=self.source,
            scorers=list(scorers),
            reference=reference,
            rollout=rollout,
            environment=environment,
            max_tokens_per_microbatch=self.budget.tokens,
            cache=cache,
        )
        self.state = State()
        self.metrics: dict[str, float] = {}
        self.evaluation: dict[str, float] = {}
        self.last = Pass({}, 0, 0, 0)  # of the last step
        self.stopped: str | None = None
        self._checkpoint_asked = False
        self.discarded = False

    # ------------------------------------------------------------------ one step

    def step(self, groups: Sequence[Group], lr: float | None = None) -> dict[str, float]:
        """One optimiser step on all of these groups: fill in the columns that the algorithm needs, let it prepare them,
        compute the loss, update.

        Args:
            groups: with responses, and with the columns that nothing here fills in, such as rewards. Under torchrun the
                same on every process.
            lr: the learning rate of this step; by default the peak.

        Returns:
            Metrics by name: `loss`, `grad_norm`, `lr`, and those of the algorithm. Empty where the algorithm left
            nothing to train on.

        Raises:
            AlignlabError: a column is missing, with the record's origin.
            NonFiniteError: the loss or the gradient is not finite; nothing has been changed.
        """
        for group in groups:
            if (reason := self.algorithm.check(group)) is not None:
                raise AlignlabError(f"{group.origin or 'a group'}: {reason}")
        state = self.state
        found = self.collector.collect(list(groups), iteration_seed(self.settings.seed, state.iteration), state.step)
        state.iteration += 1
        self._remember(found.report, found.reward)
        if not found.groups:
            return {}
        peak = float(self.engine.optimizer.param_groups[0]["initial_lr"])
        self._update(found.groups, 1.0 if lr is None else lr / peak)
        state.step += 1
        self._each("on_step")
        return dict(self.metrics)

    def save(self, folder: str | Path, merge: bool = False) -> list[str]:
        """Write the model to a folder from which plain transformers and peft load it. Called by all processes.

        Args:
            merge: fold an adapter into its base.

        Returns:
            What there is to say of it.
        """
        notes: list[str] = []
        if self.engine.divides:
            raise AlignlabError(
                f"{self.engine.name}: no process has the whole model: save a checkpoint, and use `alignlab export`"
            )
        if self.processes.is_main:
            texts = [g for g in self.train if g.responses][:8]
            notes = save_model(self.model, Path(folder), merge=merge, texts=texts)
        self.processes.barrier()
        return notes

    # ------------------------------------------------------------------ a run

    def run(self) -> State:
        """Train until a limit of the settings is reached, or a callback stops it; go on from the newest checkpoint.

        Raises:
            Interrupted: asked to stop by a signal; a checkpoint has been written.
            NonFiniteError: a loss or gradient is not finite; nothing has been changed by that step.
            SamplerLost: what samples is gone; a checkpoint has been written.
        """
        if self.order is None:
            raise AlignlabError("there are no records to train on: give Trainer(train=…), or call step(groups)")
        error: BaseException | None = None
        try:
            self._resume()
            self._each("on_start")
            self._train()
        except BaseException as raised:
            error = raised
            raise
        finally:
            self._end(error)
        return self.state

    def _train(self) -> None:
        started = time.monotonic() - self.state.seconds
        empty = 0
        try:
            with StopRequest() as stop:
                while not self._finished():
                    if not self.state.pending:
                        self.state.pending, self.state.position = self._next_iteration(), 0
                        empty = empty + 1 if not self.state.pending else 0
                        if empty >= EMPTY_ITERATIONS:
                            raise AlignlabError(
                                f"{empty} iterations in a row left nothing to train on: "
                                f"{type(self.algorithm).__name__} dropped every group (do all responses to a prompt "
                                "get the same reward?)"
                            )
                        continue
                    self._update(self._minibatch(), self.schedule(self.done))
                    self._advance(enough=self.algorithm.enough(self.last.metrics))
                    self.state.seconds = time.monotonic() - started
                    self._each("on_step")
                    self._heed(stop.signal)
        except SamplerLost as lost:
            if not self.state.step or self.checkpoints is None:
                raise
            self.checkpoint()
            kept = f"checkpoint of step {self.state.step} saved: the same command goes on"
            raise type(lost)(f"{lost}; {kept}") from lost
        self.state.seconds = time.monotonic() - started

    def _heed(self, signal: str | None) -> None:
        """Do what signals and callbacks have asked for in any of the processes."""
        asked = self.processes.gather((signal, self.stopped, self.discarded, self._checkpoint_asked))
        signal = next((s for s, *_ in asked if s), None)
        self.stopped = next((reason for _, reason, *_ in asked if reason), None)
        self.discarded = any(discard for _, _, discard, _ in asked)
        if self.discarded:
            return
        self.state.stopped = self.stopped
        if self.checkpoints is not None and (signal or any(save for *_, save in asked)):
            self.checkpoint()
        if signal:
            saved = f"checkpoint of step {self.state.step} saved: the same command goes on"
            raise Interrupted(signal, saved if self.checkpoints is not None else "nothing was saved")

    def request_stop(self, reason: str, discard: bool = False) -> None:
        """End the run after this step; to be called by callbacks, on any of the processes.

        Args:
            reason: in a few words; `stopped` has it afterwards.
            discard: nothing more is done with the run: no last evaluation, no best weights.
        """
        self.stopped, self.discarded = self.stopped or reason, self.discarded or discard

    def request_checkpoint(self) -> None:
        """Write a checkpoint after this step; to be called by callbacks, on any of the processes."""
        self._checkpoint_asked = True

    # ------------------------------------------------------------------ updates

    def _update(self, groups: Sequence[Group], factor: float) -> None:
        """One optimiser step; `metrics` are its metrics afterwards.

        Args:
            factor: on the peak learning rate.
        """
        lr = self.engine.scale_lr(factor)
        self.state.watched = None
        self.model.train()
        self.last, norm = self._take_step(groups)
        self.model.fresh_adapter = False
        self.metrics = {**self.last.metrics, **self.state.report, "lr": lr, "grad_norm": norm}
        if not self.last.units:
            self.metrics["skipped"] = 1.0
        if self.state.skipped:
            self.metrics["non_finite_steps"] = float(self.state.skipped)
        if self.state.reward is not None:
            self.metrics["reward"] = self.state.reward

    def _take_step(self, groups: Sequence[Group]) -> tuple[Pass, float]:
        """What the passes over the groups came to, and the norm of the gradient."""
        try:
            passed = self._pass(groups, train=True)
        except NonFiniteError as error:
            if self.settings.non_finite == "stop":
                raise
            self.engine.discard()
            return self._skip(str(error)), math.inf
        if not passed.units:
            self.engine.discard()
            return passed, 0.0
        norm = self.engine.step()
        if not math.isfinite(norm) and self.processes.accelerator.scaler is None:  # float16 scales less from now on
            origins = ", ".join(g.origin for g in groups[:5])
            problem = (
                f"the gradient of step {self.state.step + 1} is not finite; the records of its batch: {origins}"
                f"{' …' if len(groups) > 5 else ''}. Lower the learning rate or use a wider precision"
            )
            if self.settings.non_finite == "stop":
                raise NonFiniteError(problem)
            return self._skip(problem), norm
        self.state.trained_tokens += passed.trained_tokens
        return passed, norm

    def _skip(self, problem: str) -> Pass:
        """Leave a step out, loudly: nothing was changed by it."""
        self.state.skipped += 1
        if self.processes.is_main:
            log.warning("step %d left out (training.non_finite=skip): %s", self.state.step + 1, problem)
        return Pass({}, 0, 0, 0)

    def _pass(self, groups: Sequence[Group], train: bool) -> Pass:
        passed = run_with_memory(
            groups,
            algorithm=self.algorithm,
            engine=self.engine,
            budget=self.budget,
            temperature=self.collector.temperature,
            train=train,
            resumes=self.settings.resume == "auto",
        )
        self.collector.max_tokens_per_microbatch = self.budget.tokens
        return passed

    # ------------------------------------------------------------------ groups

    def _next_iteration(self) -> list[Group]:
        """Draw, sample, score and prepare the next iteration's groups; the same list on every process."""
        assert self.order is not None
        index, state = self.state.iteration, self.state
        every = self.source.ref_update_interval
        if index and every and index % every == 0 and state.refreshed != index:
            self._update_reference()
            state.refreshed = index  # sampling may fail, and be done again after a resume
        records, groups, seed = self._drawn(index)
        found = self.collector.collect(groups, seed, step=state.step, following=lambda: self._drawn(index + 1)[1:])
        self.order.observe(index, records, found.sampled)
        state.iteration += 1
        state.order = dict(self.order.state)
        self._remember(found.report, found.reward if self.source.kind == "rollout" else None)
        if self.source.kind == "rollout":
            state.sampled = found.generated_tokens
            state.generated_tokens += found.generated_tokens
            self._each("on_iteration", found.sampled)
        return found.groups

    def _remember(self, report: Mapping[str, float], reward: float | None) -> None:
        """What the steps on an iteration's groups report."""
        self.state.report = {**self.algorithm.report, **report}
        self.state.algorithm = dict(self.algorithm.state)
        self.state.reward = reward

    def _drawn(self, index: int) -> tuple[list[int], list[Group], int]:
        """Records of an iteration, and the seed of what is sampled for them."""
        assert self.order is not None
        records = list(self.order.batch(index))
        return records, [self.train[i] for i in records], iteration_seed(self.settings.seed, index)

    def _update_reference(self) -> None:
        """Move the reference to the policy; what it said of records before no longer holds."""
        if self.reference is None:
            raise AlignlabError(f"source.ref_update_interval: {type(self.algorithm).__name__} uses no reference policy")
        held = self.reference.held_in
        apart = nullcontext() if held is self.model else self.engine.whole(held, change=True)
        with self.engine.whole(self.model, change=held is self.model), apart:
            self.reference.refresh(self.source.ref_update_tau)
        for group in [*self.train, *self.validation]:
            for response in group.responses:
                response.columns.pop("ref_logp", None)

    def _minibatch(self) -> list[Group]:
        """The groups of the next step: minibatches in a fresh order for each pass over the iteration."""
        groups, size = self.state.pending, self.settings.batch_size
        per_pass = math.ceil(len(groups) / size)
        pass_, place = divmod(self.state.position, per_pass)
        if self.ppo_epochs == 1 and per_pass == 1:
            return groups
        order = Shuffled(groups, size, iteration_seed(self.settings.seed + 1, self.state.iteration))
        return [groups[i] for i in order.batch(pass_ * per_pass + place)]

    @property
    def ppo_epochs(self) -> int:
        """How often an iteration's groups are trained on."""
        return self.source.ppo_epochs if self.source.kind == "rollout" else 1

    def _advance(self, enough: bool) -> None:
        self.state.step += 1
        self.state.position += 1
        steps = self.ppo_epochs * math.ceil(len(self.state.pending) / self.settings.batch_size)
        if enough or self.state.position >= steps:
            self.state.pending = []

    # ------------------------------------------------------------------ limits

    @property
    def epoch(self) -> float:
        """How often all records have been drawn."""
        return self.state.iteration / self.order.batches_per_epoch if self.order is not None else 0.0

    @property
    def done(self) -> float:
        """Share of the run that is over, by the limit that is nearest; 0 without a limit."""
        return max((consumed / limit for consumed, limit in self._limits()), default=0.0)

    def _limits(self) -> list[tuple[float, float]]:
        s, state = self.settings, self.state
        ahead = 0.0  # share of the current iteration that is still to be trained on
        if state.pending:
            ahead = 1 - state.position / (self.ppo_epochs * math.ceil(len(state.pending) / s.batch_size))
        limits: list[tuple[float, float | None]] = [
            (state.step, s.steps),
            (state.trained_tokens, s.max_trained_tokens),
            # What was sampled is trained on, also where it reaches the limit.
            (state.generated_tokens - ahead * state.sampled, s.max_generated_tokens),
            (state.seconds, s.max_seconds),
        ]
        if s.epochs is not None and self.order is not None:
            limits.append((state.iteration - ahead, math.ceil(s.epochs * self.order.batches_per_epoch)))
        return [(float(c), float(limit)) for c, limit in limits if limit is not None]

    def _finished(self) -> bool:
        finished = self.done >= 1 or self.stopped is not None
        # Time differs between processes: all do what the first one does.
        return self.processes.gather(finished)[0] if self.settings.max_seconds else finished

    # ------------------------------------------------------------------ evaluation

    def evaluate(self) -> dict[str, float]:
        """Loss and metrics on the validation records, under `eval/` names. It changes nothing of the run."""
        state, report = self.algorithm.state, self.algorithm.report
        found = self.collector.collect(list(self.validation), iteration_seed(self.settings.seed, 2**31))
        self.algorithm.state, self.algorithm.report = state, report
        self.model.eval()
        passed = self._pass(found.groups, train=False)
        return {f"eval/{name}": value for name, value in passed.metrics.items()}

    def evaluated(self, metrics: dict[str, float]) -> None:
        """Tell the callbacks of an evaluation."""
        self.evaluation = metrics
        self.metrics |= metrics
        self._each("on_evaluate", metrics)

    # ------------------------------------------------------------------ callbacks

    def _each(self, point: str, *arguments: Any) -> None:
        for callback in self.callbacks:
            getattr(callback, point)(self, *arguments)

    def _end(self, error: BaseException | None) -> None:
        """Let every callback end, the last one first, whatever one of them raises; the first error is the run's."""
        failed: BaseException | None = None
        for callback in reversed(self.callbacks):
            try:
                callback.on_end(self, error or failed)
            except BaseException as raised:
                failed = failed or raised
        if failed is not None and error is None:
            raise failed

    # ------------------------------------------------------------------ disk

    def checkpoint(self) -> None:
        """Save where the run stands. Called by all processes."""
        if self.checkpoints is None:
            raise AlignlabError("this trainer has no folder for checkpoints")
        self._checkpoint_asked = False
        with self.checkpoints.write(self.state.step, self.state.watched) as folder:
            save_state(folder, self.state, self.engine, self.reference, self.train)
            self._each("on_checkpoint", folder)

    def _load(self, folder: Path) -> State:
        state = load_state(folder, self.engine, self.reference, self.train)
        if state.algorithm:
            self.algorithm.state = state.algorithm
        if state.order and self.order is not None:
            self.order.state = state.order
        return state

    def _resume(self) -> None:
        """Go on from the newest checkpoint where there is one and that is wanted."""
        if self.checkpoints is None:
            return
        found = self.checkpoints.latest() if self.settings.resume == "auto" and self.processes.is_main else None
        # The main process looks, after it has cleared away what a killed one left; all do what it found.
        mine = (found, self.checkpoints.problems, self.budget.found())
        folder, problems, self.budget.tokens = self.processes.gather(mine)[0]
        self.collector.max_tokens_per_microbatch = self.budget.tokens
        if folder is None and problems:
            raise AlignlabError(
                f"no checkpoint in {self.checkpoints.folder} is whole: {'; '.join(problems)}. "
                "Start anew with training.resume=never"
            )
        if folder is not None:
            self.state = self._load(folder)
            self.stopped = self.state.stopped
            self.checkpoints.discard_after(self.state.step)

    def load_best(self) -> None:
        """Make the weights of the best checkpoint the run's, where there is one. Called by all processes."""
        best = self.checkpoints.best() if self.checkpoints is not None else None
        if best is not None:
            self._load(best)

    # ------------------------------------------------------------------ reference

    def _reference_cache(self, reference: Reference | None, rollout: RolloutEngine | None) -> ReferenceCache | None:
        """Where what the reference says of the data is kept for other runs, if it can be."""
        folder = self.settings.reference_cache
        if reference is None or folder is None or rollout is not None or self.source.ref_update_interval:
            return None
        known = identity(reference, 1.0, self.settings.mixed_precision) if self.processes.is_main else ""
        return ReferenceCache(Path(folder), self.processes.gather(known)[0])


def wants_reference(algorithm: Algorithm, source: SourceSettings) -> bool:
    """Whether a run needs the policy as it was."""
    return "ref_logp" in algorithm.needs or (source.kind == "rollout" and source.policy == "reference")


def _model_for(policy: Any, algorithm: Algorithm) -> PackedModel:
    """The model inside a policy, which must be of the kind that the algorithm trains."""
    model = policy if isinstance(policy, PackedModel) else getattr(policy, "model", None)
    if not isinstance(model, PackedModel):
        raise ConfigError(f"policy: a model from alignlab.load is wanted, this is {type(policy).__name__}")
    if model.kind != algorithm.model:
        name = type(algorithm).__name__
        raise ConfigError(
            f"policy: {name} trains a {algorithm.model} model, this is a {model.kind} model: "
            f"load it with alignlab.load(…, kind={algorithm.model!r})"
        )
    return model


def _optimizer(model: PackedModel, lr: float | None, make: MakeOptimizer | None) -> torch.optim.Optimizer:
    groups = parameter_groups([p for p in model.parameters() if p.requires_grad])
    if make is not None:
        if lr is not None:
            raise ConfigError("lr: the optimizer has a learning rate already: give one of them")
        return make(groups)
    if lr is None:
        raise ConfigError("lr: must be given, as in lr=1e-5; or give an optimizer")
    return torch.optim.AdamW(groups, lr=lr, weight_decay=0.0)
