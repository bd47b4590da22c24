"""The one trainer: a policy, an algorithm, and steps. Every algorithm, source and mode of distribution goes through it.

`Trainer.step(groups)` takes one optimiser step on groups of one's own. `Trainer.run()` takes as many as the settings
say, on records or on responses that it samples. Callbacks do what happens beside the steps: logging, evaluations,
checkpoints, samples for people to read, pruning.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary

from alignlab.build import check_objects
from alignlab.core import (
    Algorithm,
    AlignlabError,
    Callback,
    DataOrder,
    Environment,
    Group,
    NonFiniteError,
    Response,
    RolloutEngine,
    Schedule,
    Scorer,
)
from alignlab.core.parts import bind_all, calling, check_algorithm, check_columns, complaint, numbers_of
from alignlab.models import Reference, add_value_head, save_model
from alignlab.rollout.policy import Policy, model_for
from alignlab.training.checkpoints.state import State, load_state, save_state
from alignlab.training.checkpoints.store import Checkpoints
from alignlab.training.collect import Collector
from alignlab.training.distributed.engine import Engine, make_engine
from alignlab.training.distributed.processes import Processes, launched
from alignlab.training.loop import Loop
from alignlab.training.micro_batch_budget import TokenBudget
from alignlab.training.optimizer import MakeOptimizer, check_mode, optimizer_of
from alignlab.training.order import Shuffled, iteration_seed
from alignlab.training.precision import (
    Precision,
    check_states,
    observe,
    scaling,
    set_float32_products,
    warn_of_rounding,
)
from alignlab.training.reference_cache import cache_of, wants_reference
from alignlab.training.schedule import Constant
from alignlab.training.settings import DistributedSettings, SourceSettings, TrainingSettings
from alignlab.training.step import Pass, run_with_memory

log = logging.getLogger(__name__)


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
        computes: dtypes of weights, products and reductions, as they were found to be; see `precision.observe`.

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
        check_algorithm(algorithm)
        self.algorithm = algorithm
        self.settings, self.source = settings or TrainingSettings(), source or SourceSettings()
        self.model = model = model_for(policy, algorithm)
        distributed = distributed or DistributedSettings(mode="ddp" if (launched() or 1) > 1 else "single")
        self.processes = processes or Processes(scaling(self.settings.mixed_precision, model.base.dtype), distributed)
        self.train, self.validation = list(train), list(validation)
        self.callbacks = check_objects(Callback, callbacks, "callbacks")
        self.schedule = schedule or Constant()
        per_iteration = self.settings.batch_size
        if self.source.kind == "rollout":
            per_iteration = self.source.rollout_batch_size or self.settings.batch_size
        self.order: DataOrder | None = None
        if self.train:
            make_order = order or Shuffled
            self.order = make_order(groups=self.train, batch_size=per_iteration, seed=self.settings.seed)

        set_float32_products(self.settings, self.processes.device)
        self.precision = Precision.of(
            self.settings.mixed_precision, distributed.mode, model.base.dtype, self.processes.device
        )
        # The reference is the policy as it is now: before a value head is added, and before weights are divided.
        reference = None
        if wants_reference(algorithm, self.source):
            reference = Reference(model, model.fresh_adapter, moves=self.source.ref_update_interval is not None)
        if "value" in algorithm.reads and model.value_head is None:
            add_value_head(model, algorithm.critic, self.settings.seed)
        softly = self.source.ref_update_interval is not None and self.source.ref_update_tau < 1
        self.precision.apply(model, reference, softly)
        keeps = None if rollout is not None or self.source.ref_update_interval else self.settings.reference_cache
        cache = cache_of(reference, keeps, self.precision.name, self.processes)
        made = optimizer_of(model, lr, optimizer)
        check_mode(distributed.mode, self.settings.mixed_precision, made)
        if (lost := warn_of_rounding(model, made)) and self.processes.is_main:
            log.warning(lost)
        with self.processes.peers():
            self.engine: Engine = make_engine(
                distributed, model, made, self.processes, self.settings.max_grad_norm, self.precision
            )
            self.processes.same_timeout()
        if reference is not None and not reference.shares_weights:
            self.engine.divide(reference.held_in)
        self.reference = reference
        self.computes = observe(self.engine, algorithm.reads)
        check_columns({f"scorers[{i}], {type(s).__name__}": s for i, s in enumerate(scorers)})
        bind_all((*scorers, environment), Policy(model))

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
        self.state, self.loop = State(), Loop(self)
        self.metrics: dict[str, float] = {}
        self.evaluation: dict[str, float] = {}
        self.last = Pass({}, 0, 0, 0)  # of the last step
        self.stopped: str | None = None
        self._read_here: WeakValueDictionary[int, Response] = WeakValueDictionary()  # by its reference, by `id`
        self.checkpoint_asked = False
        self.discarded = self._states_checked = False

    # ------------------------------------------------------------------ one step

    def step(self, groups: Sequence[Group], lr: float | None = None) -> dict[str, float]:
        """One optimiser step on all of these groups: fill in the columns that the algorithm needs, let it prepare them,
        compute the loss, update.

        Args:
            groups: with responses, and with the columns that nothing here fills in, such as rewards. Under torchrun the
                same on every process. A `ref_logp` that another trainer, or a record, brought is computed anew.
            lr: the learning rate of this step; by default the peak.

        Returns:
            Metrics by name: `loss`, `grad_norm`, `lr`, and those of the algorithm. Empty where the algorithm left
            nothing to train on.

        Raises:
            AlignlabError: a column is missing, with the record's origin.
            NonFiniteError: the loss or the gradient is not finite; nothing has been changed.
        """
        for group in groups:
            if (reason := complaint(self.algorithm, group)) is not None:
                raise AlignlabError(f"{group.origin or 'a group'}: {reason}")
        self._forget_other_references(groups)
        state = self.state
        found = self.collector.collect(list(groups), iteration_seed(self.settings.seed, state.iteration), state.step)
        state.iteration += 1
        self.remember(found.report, found.reward)
        for response in (r for g in groups for r in g.responses if "ref_logp" in r.columns):
            self._read_here[id(response)] = response
        if not found.groups:
            return {}
        peak = float(self.engine.optimizer.param_groups[0]["initial_lr"])
        self.update(found.groups, 1.0 if lr is None else lr / peak)
        state.step += 1
        self.each("on_step")
        return dict(self.metrics)

    def _forget_other_references(self, groups: Sequence[Group]) -> None:
        """Drop `ref_logp` where it is not this trainer's reference that said it, but that of a trainer before it."""
        if self.reference is None:
            return
        for response in (r for g in groups for r in g.responses if self._read_here.get(id(r)) is not r):
            response.columns.pop("ref_logp", None)

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
            for note in notes:
                log.warning(note)
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
        return self.loop.run()

    @property
    def done(self) -> float:
        """Share of the run that is over, by the limit that is nearest, in [0, 1]; 0 without a limit."""
        return self.loop.done

    @property
    def epoch(self) -> float:
        """How often all records have been drawn."""
        return self.loop.epoch

    def request_stop(self, reason: str, discard: bool = False) -> None:
        """End the run after this step; to be called by callbacks, on any of the processes.

        Args:
            reason: in a few words; `stopped` has it afterwards.
            discard: nothing more is done with the run: no last evaluation, no best weights.
        """
        self.stopped, self.discarded = self.stopped or reason, self.discarded or discard

    def request_checkpoint(self) -> None:
        """Write a checkpoint after this step; to be called by callbacks, on any of the processes."""
        self.checkpoint_asked = True

    # ------------------------------------------------------------------ updates

    def update(self, groups: Sequence[Group], factor: float) -> None:
        """One optimiser step; `metrics` are its metrics afterwards.

        Args:
            factor: on the peak learning rate.
        """
        lr = self.engine.scale_lr(factor)
        self.state.watched = None
        self.model.train()
        self.last, norm = self._take_step(groups)
        self.model.fresh_adapter = False
        self._states_checked = self._states_checked or check_states(self.engine)
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
            resumes=self.settings.resumes,
        )
        self.collector.max_tokens_per_microbatch = self.budget.tokens
        return passed

    def remember(self, report: Mapping[str, float], reward: float | None) -> None:
        """What the steps on an iteration's groups report."""
        self.state.report = {**numbers_of(self.algorithm, "report", self.algorithm.report), **report}
        with calling(self.algorithm, "state"):
            kept = self.algorithm.state
        self.state.algorithm = numbers_of(self.algorithm, "state", kept)
        self.state.reward = reward

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
        self.each("on_evaluate", metrics)

    # ------------------------------------------------------------------ callbacks

    def each(self, point: str, *arguments: Any) -> None:
        for callback in self.callbacks:
            with calling(callback, point):
                getattr(callback, point)(self, *arguments)

    def end(self, error: BaseException | None) -> None:
        """Let every callback end, the last one first, whatever one of them raises; the first error is the run's."""
        failed: BaseException | None = None
        for callback in reversed(self.callbacks):
            try:
                with calling(callback, "on_end"):
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
        self.checkpoint_asked = False
        with self.checkpoints.write(self.state.step, self.state.watched) as folder:
            save_state(folder, self.state, self.engine, self.reference, self.train)
            self.each("on_checkpoint", folder)

    def load_checkpoint(self, folder: Path) -> State:
        state = load_state(folder, self.engine, self.reference, self.train)
        if state.algorithm:
            self.algorithm.state = state.algorithm
        if state.order and self.order is not None:
            self.order.state = state.order
        return state

    def load_best(self) -> None:
        """Make the weights of the best checkpoint the run's, where there is one. Called by all processes."""
        best = self.checkpoints.best() if self.checkpoints is not None else None
        if best is not None:
            self.load_checkpoint(best)
