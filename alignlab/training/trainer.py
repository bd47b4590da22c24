"""The one training loop. Every algorithm, source and mode of distribution goes through it."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path

from alignlab.core import Algorithm, AlignlabError, Group, Interrupted, NonFiniteError, Sampler, Scorer, StartAgain
from alignlab.core.memory import release_memory
from alignlab.models import PackedModel, Reference
from alignlab.training.callbacks.progress import ProgressDisplay
from alignlab.training.callbacks.pruning import Pruning
from alignlab.training.callbacks.tracking import Tracker
from alignlab.training.checkpoints.state import State, load_state, save_state
from alignlab.training.checkpoints.store import Checkpoints
from alignlab.training.collect import Collector
from alignlab.training.distributed.engine import Engine
from alignlab.training.micro_batch_budget import OutOfMemory, TokenBudget, random_state, set_random_state
from alignlab.training.order import Order, iteration_seed
from alignlab.training.reference_cache import ReferenceCache
from alignlab.training.run_lock import RunLock
from alignlab.training.schedule import learning_rate_factor
from alignlab.training.settings import SourceSettings, TrainingSettings
from alignlab.training.signals import StopRequest
from alignlab.training.step import Pass, run_batch

log = logging.getLogger(__name__)

EMPTY_ITERATIONS = 20
"""Iterations in a row that may leave nothing to train on before the run is stopped."""

Samples = Callable[[int, int, Sequence[Group]], None]
"""Called with the iteration, the step and the sampled groups, to keep some for people to read."""


@dataclass
class Trainer:
    """Everything a run consists of. `run` trains until a limit of `settings` is reached.

    Attributes:
        train: the records, or the prompts to sample for.
        validation: held-out records or prompts.
        scorers: what fills columns, in order.
        sampler: draws responses from a model, for a rollout source.
        temperature: log-probs are of softmax(logits / temperature); that of the sampler, for a rollout source.
        cache: keeps what the reference says of the data, for other runs too.
        pruning: of a trial of a search, on the main process: says whether to end it early.
        pruned: whether it was ended early; there is no model then.
        owner: of the run's folder, on the main process: ends the run where it has lost it.
    """

    algorithm: Algorithm
    engine: Engine
    settings: TrainingSettings
    source: SourceSettings
    train: list[Group]
    checkpoints: Checkpoints
    tracker: Tracker
    progress: ProgressDisplay
    validation: list[Group] = field(default_factory=list)
    scorers: Sequence[Scorer] = ()
    reference: Reference | None = None
    sampler: Callable[[PackedModel], Sampler] | None = None
    temperature: float = 1.0
    cache: ReferenceCache | None = None
    keep_samples: Samples | None = None
    pruning: Pruning | None = None
    pruned: bool = False
    owner: RunLock | None = None

    def __post_init__(self) -> None:
        per_iteration = self.settings.batch_size
        if self.source.kind == "rollout":
            per_iteration = self.source.rollout_batch_size or self.settings.batch_size
        self.order = Order(len(self.train), per_iteration, self.settings.seed)
        self.model, self.processes = self.engine.model, self.engine.processes
        self.state = State()
        self.budget = TokenBudget(
            self.checkpoints.folder.parent, self.settings.max_tokens_per_microbatch, self.processes.device
        )
        self.collector = Collector(
            algorithm=self.algorithm,
            engine=self.engine,
            source=self.source,
            scorers=self.scorers,
            reference=self.reference,
            sampler=self.sampler,
            max_tokens_per_microbatch=self.budget.tokens,
            temperature=self.temperature,
            cache=self.cache,
        )
        self.evaluation: dict[str, float] = {}
        self._figures: dict[str, float] = {}  # of this step
        self._tokens, self._logged_at = 0, 0.0

    # ------------------------------------------------------------------ the loop

    def run(self) -> State:
        """Train to the end and return where the run stands.

        Raises:
            Interrupted: asked to stop by a signal; a checkpoint has been written.
            NonFiniteError: a loss or gradient is not finite; nothing has been changed by that step.

        A trial that is pruned returns early, with `pruned` set.
        """
        self._resume()
        self._logged_at = self.state.seconds
        started = time.monotonic() - self.state.seconds
        empty = 0
        with StopRequest() as stop:
            while not self._finished():
                if not self.state.pending:
                    self.state.pending = self._next_iteration()
                    self.state.position = 0
                    empty = empty + 1 if not self.state.pending else 0
                    if empty >= EMPTY_ITERATIONS:
                        raise AlignlabError(
                            f"{empty} iterations in a row left nothing to train on: {type(self.algorithm).__name__} "
                            "dropped every group (do all responses to a prompt get the same reward?)"
                        )
                    continue
                passed, lr, norm = self._step(self._minibatch())
                self._advance(enough=self.algorithm.enough(passed.metrics))
                self.state.seconds = time.monotonic() - started
                self._figures = {}
                self._log(passed, lr, norm)
                metric, better = self._evaluate_if_due()
                if self.owner is not None:
                    self.owner.check_now_and_then()
                asked = self.processes.gather((stop.signal, self._should_prune()))
                stopping = next((s for s, _ in asked if s), None)
                if any(should_prune for _, should_prune in asked):
                    self.pruned = True
                    return self.state
                keep_best = better and self.settings.keeps_best
                if stopping or keep_best or self._due(self.settings.checkpoint_every):
                    self.checkpoint(metric)
                if stopping:
                    raise Interrupted(stopping, f"checkpoint of step {self.state.step} saved: the same command goes on")
        self.state.seconds = time.monotonic() - started
        self._finish()
        return self.state

    def _step(self, groups: Sequence[Group]) -> tuple[Pass, float, float]:
        lr = self.engine.scale_lr(learning_rate_factor(self.settings, self.done))
        self.model.train()
        try:
            passed = self._run(groups, train=True)
        except NonFiniteError as error:
            if self.settings.non_finite == "stop":
                raise
            self.engine.discard()
            return self._skip(str(error)), lr, math.inf
        if not passed.units:
            self.engine.discard()
            return passed, lr, 0.0
        norm = self.engine.step()
        if not math.isfinite(norm) and self.processes.accelerator.scaler is None:  # float16 scales less from now on
            origins = ", ".join(g.origin for g in groups[:5])
            problem = (
                f"the gradient of step {self.state.step + 1} is not finite; the records of its batch: {origins}"
                f"{' …' if len(groups) > 5 else ''}. Lower the learning rate or use a wider precision"
            )
            if self.settings.non_finite == "stop":
                raise NonFiniteError(problem)
            return self._skip(problem), lr, norm
        self.state.trained_tokens += passed.trained_tokens
        return passed, lr, norm

    def _skip(self, problem: str) -> Pass:
        """Leave a step out, loudly: nothing was changed by it."""
        self.state.skipped += 1
        if self.processes.is_main:
            log.warning("step %d left out (training.non_finite=skip): %s", self.state.step + 1, problem)
        return Pass({}, 0, 0, 0)

    def _run(self, groups: Sequence[Group], train: bool) -> Pass:
        """As often as memory runs out, with a smaller budget each time; nothing else is other than the first time."""
        device = self.processes.device
        while True:
            random = random_state(device)
            try:
                return run_batch(
                    groups,
                    algorithm=self.algorithm,
                    engine=self.engine,
                    max_tokens_per_microbatch=self.budget.tokens,
                    temperature=self.temperature,
                    train=train,
                )
            except OutOfMemory as error:
                shortages = error.shortages
            self.budget.halve(shortages, write=self.processes.is_main or self.engine.together)
            if self.engine.together:
                again = " (with training.resume=auto)" if self.settings.resume == "never" else ""
                raise StartAgain(
                    f"out of memory, after which {self.engine.name} cannot go on in these processes: the same command"
                    f"{again} goes on from the last checkpoint, with "
                    f"training.max_tokens_per_microbatch={self.budget.tokens}"
                )
            self.engine.discard()
            release_memory()
            set_random_state(random, device)
            self.collector.max_tokens_per_microbatch = self.budget.tokens

    # ------------------------------------------------------------------ groups

    def _next_iteration(self) -> list[Group]:
        """Draw, sample, score and prepare the next iteration's groups; the same list on every process."""
        index, state = self.state.iteration, self.state
        if (
            index
            and self.source.ref_update_interval
            and index % self.source.ref_update_interval == 0
            and state.refreshed != index
        ):
            self._refresh_reference()
            state.refreshed = index  # sampling may fail, and be done again after a resume
        found = self.collector.collect(*self._drawn(index), step=state.step, following=lambda: self._drawn(index + 1))
        state.iteration += 1
        state.report, state.algorithm = {**self.algorithm.report, **found.report}, dict(self.algorithm.state)
        if self.source.kind == "rollout":
            state.sampled = found.generated_tokens
            state.generated_tokens += found.generated_tokens
            state.reward = found.reward
            if self.keep_samples is not None and self.processes.is_main:
                self.keep_samples(state.iteration, state.step, found.sampled)
        return found.groups

    def _drawn(self, index: int) -> tuple[list[Group], int]:
        """Records of an iteration, and the seed of what is sampled for them."""
        return [self.train[i] for i in self.order.batch(index)], iteration_seed(self.settings.seed, index)

    def _refresh_reference(self) -> None:
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
        if self.passes == 1 and per_pass == 1:
            return groups
        order = Order(len(groups), size, iteration_seed(self.settings.seed + 1, self.state.iteration))
        return [groups[i] for i in order.batch(pass_ * per_pass + place)]

    @property
    def passes(self) -> int:
        return self.source.ppo_epochs if self.source.kind == "rollout" else 1

    def _advance(self, enough: bool) -> None:
        self.state.step += 1
        self.state.position += 1
        if enough or self.state.position >= self.passes * math.ceil(len(self.state.pending) / self.settings.batch_size):
            self.state.pending = []

    # ------------------------------------------------------------------ limits

    @property
    def done(self) -> float:
        """Share of the run that is over, by the limit that is nearest."""
        return max((consumed / limit for consumed, limit in self._limits()), default=0.0)

    def _limits(self) -> list[tuple[float, float]]:
        s, state = self.settings, self.state
        ahead = 0.0  # share of the current iteration that is still to be trained on
        if state.pending:
            ahead = 1 - state.position / (self.passes * math.ceil(len(state.pending) / s.batch_size))
        limits: list[tuple[float, float | None]] = [
            (state.step, s.steps),
            (state.trained_tokens, s.max_trained_tokens),
            # What was sampled is trained on, also where it reaches the limit.
            (state.generated_tokens - ahead * state.sampled, s.max_generated_tokens),
            (state.seconds, s.max_seconds),
        ]
        if s.epochs is not None:
            limits.append((state.iteration - ahead, math.ceil(s.epochs * self.order.batches_per_epoch)))
        return [(float(c), float(limit)) for c, limit in limits if limit is not None]

    def _finished(self) -> bool:
        finished = self.done >= 1 or self._out_of_patience()
        # Time differs between processes: all do what the first one does.
        return self.processes.gather(finished)[0] if self.settings.max_seconds else finished

    def _due(self, every: int | None) -> bool:
        return every is not None and self.state.step % every == 0

    # ------------------------------------------------------------------ watching

    def _log(self, passed: Pass, lr: float, norm: float) -> None:
        self._tokens += passed.tokens
        if not self._due(self.settings.log_every) and not self._finished():
            return
        speed = self._tokens / max(self.state.seconds - self._logged_at, 1e-9)
        self._tokens, self._logged_at = 0, self.state.seconds
        metrics = {
            **passed.metrics,
            **self.state.report,
            "lr": lr,
            "grad_norm": norm,
            "tokens_per_second": speed,
            "trained_tokens": float(self.state.trained_tokens),
            "generated_tokens": float(self.state.generated_tokens),
            "seconds": self.state.seconds,
            "epoch": self.state.iteration / self.order.batches_per_epoch,
        }
        if not passed.units:
            metrics["skipped"] = 1.0
        if self.state.skipped:
            metrics["non_finite_steps"] = float(self.state.skipped)
        if self.state.reward is not None:
            metrics["reward"] = self.state.reward
        self._figures |= metrics
        self.tracker.log(self.state.step, metrics)
        self.progress.update(self.state.step, {**metrics, "done": self.done})

    def evaluate(self) -> dict[str, float]:
        """Loss and metrics on the validation records, under `eval/` names."""
        state, report = self.algorithm.state, self.algorithm.report
        found = self.collector.collect(list(self.validation), iteration_seed(self.settings.seed, 2**31))
        self.algorithm.state, self.algorithm.report = state, report  # watching a run does not steer it
        self.model.eval()
        passed = self._run(found.groups, train=False)
        return {f"eval/{name}": value for name, value in passed.metrics.items()}

    def _evaluate_if_due(self) -> tuple[float | None, bool]:
        """The watched metric, where it is time to evaluate, and whether it is the best so far."""
        if not self.validation or not self._due(self.settings.eval_every):
            return None, False
        self.evaluation = self.evaluate()
        self._figures |= self.evaluation
        self.tracker.log(self.state.step, self.evaluation)
        self.progress.update(self.state.step, {**self.evaluation, "done": self.done})
        name = self.settings.metric
        if name not in self.evaluation:
            raise AlignlabError(f"training.metric={name}: an evaluation gives {', '.join(sorted(self.evaluation))}")
        value, best = self.evaluation[name], self.state.best
        better = best is None or (value < best if self.settings.metric_mode == "min" else value > best)
        self.state.best = value if better else best
        self.state.bad_evaluations = 0 if better else self.state.bad_evaluations + 1
        return value, better

    def _should_prune(self) -> bool:
        if self.pruning is None:
            return False
        return self.pruning.should_prune(self.state.step, self._figures) and self.done < 1

    def _out_of_patience(self) -> bool:
        return self.settings.patience is not None and self.state.bad_evaluations >= self.settings.patience

    # ------------------------------------------------------------------ disk

    def checkpoint(self, metric: float | None = None) -> None:
        """Save where the run stands. Called by all processes."""
        if self.owner is not None:
            self.owner.check()
        with self.checkpoints.write(self.state.step, metric) as folder:
            save_state(folder, self.state, self.engine, self.reference, self.train)

    def _load(self, folder: Path) -> State:
        state = load_state(folder, self.engine, self.reference, self.train)
        if state.algorithm:
            self.algorithm.state = state.algorithm
        return state

    def _resume(self) -> None:
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
            self.checkpoints.discard_after(self.state.step)
        self.tracker.resume(self.state.step)
        if self.keep_samples is not None and self.processes.is_main:
            self.keep_samples(self.state.iteration, self.state.step, [])

    def _finish(self) -> None:
        """Leave the weights that become the run's model."""
        if self.validation and self.settings.eval_every and not self._due(self.settings.eval_every):
            self.evaluation = self.evaluate()
            self.tracker.log(self.state.step, self.evaluation)
        best = self.checkpoints.best() if self.settings.final == "best" else None
        if best is not None:
            self._load(best)
