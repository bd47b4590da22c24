"""The one training loop: iterations, minibatches, limits, and what is heeded after each step."""

from __future__ import annotations

import logging
import math
import sys
import time
from contextlib import nullcontext
from typing import TYPE_CHECKING

from alignlab.core import AlignlabError, Group, Interrupted, PeerLost, SamplerLost
from alignlab.core.parts import calling
from alignlab.core.storage import StorageError
from alignlab.training.checkpoints.state import State
from alignlab.training.order import Shuffled, iteration_seed
from alignlab.training.parts import batch_of, check_order, factor_of, plain_of
from alignlab.training.signals import StopRequest

if TYPE_CHECKING:
    from alignlab.training.trainer import Trainer

log = logging.getLogger(__name__)

EMPTY_ITERATIONS = 20
"""Iterations in a row that may leave nothing to train on before the run is stopped."""


class Loop:
    """Takes a trainer's steps until a limit of its settings is reached, or a callback or a signal ends the run.

    An iteration is a batch of records, or of prompts with the responses that are sampled for them. It is trained on in
    minibatches, `source.ppo_epochs` times over where its responses were sampled.
    """

    def __init__(self, trainer: Trainer) -> None:
        self.trainer = trainer
        self._records: dict[int, list[int]] = {}  # by iteration: a curriculum says it once, perhaps ahead of time

    def run(self) -> State:
        """Train until a limit of the settings is reached, or a callback stops it; go on from the newest checkpoint.

        Raises:
            Interrupted: asked to stop by a signal; a checkpoint has been written.
            NonFiniteError: a loss or gradient is not finite; nothing has been changed by that step.
            SamplerLost: what samples is gone; a checkpoint has been written.
        """
        trainer = self.trainer
        if trainer.order is None:
            raise AlignlabError("there are no records to train on: give Trainer(train=…), or call step(groups)")
        check_order(trainer.order)
        error: BaseException | None = None
        try:
            self._resume()
            trainer.each("on_start")
            self._train()
        except BaseException as raised:
            error = raised
            raise
        finally:
            trainer.end(error)
        return trainer.state

    def _train(self) -> None:
        trainer = self.trainer
        started = time.monotonic() - trainer.state.seconds
        empty = 0
        try:
            with StopRequest() as stop:
                while not self._finished():
                    if not trainer.state.pending:
                        trainer.state.pending, trainer.state.position = self._next_iteration(), 0
                        empty = empty + 1 if not trainer.state.pending else 0
                        if empty >= EMPTY_ITERATIONS:
                            raise AlignlabError(
                                f"{empty} iterations in a row left nothing to train on: "
                                f"{type(trainer.algorithm).__name__} dropped every group (do all responses to a prompt "
                                "get the same reward?)"
                            )
                        continue
                    trainer.update(self._minibatch(), factor_of(trainer.schedule, self.done))
                    with calling(trainer.algorithm, "enough"):
                        enough = bool(trainer.algorithm.enough(trainer.last.metrics))
                    self._advance(enough)
                    trainer.state.seconds = time.monotonic() - started
                    trainer.each("on_step")
                    self._heed(stop.signal)
        except SamplerLost as lost:
            if not trainer.state.step or trainer.checkpoints is None:
                raise
            trainer.checkpoint()
            kept = f"checkpoint of step {trainer.state.step} saved: the same command goes on"
            raise type(lost)(f"{lost}; {kept}") from lost
        trainer.state.seconds = time.monotonic() - started
        if trainer.state.step and not trainer.state.trained_tokens and not trainer.discarded:
            skipped = trainer.state.skipped
            why = (
                f"{skipped} of them were left out because they were not finite (training.non_finite=skip): lower the "
                "learning rate, or use a wider precision"
                if skipped
                else "there was nothing to learn from (do prompts have responses, pairs a winner? see data and source)"
            )
            raise AlignlabError(
                f"nothing was trained in {trainer.state.step} steps: {why}; no model was written, its weights would be "
                "those of the base"
            )
        self._keep_last_state()

    def _keep_last_state(self) -> None:
        """One checkpoint before the model is saved, which may fail, and for a run that is to be longer."""
        trainer = self.trainer
        known = trainer.checkpoints is None or trainer.checkpoints.at == trainer.state.step
        if known or trainer.discarded or trainer.settings.checkpoint_every is None:
            return
        try:
            trainer.checkpoint()
        except (StorageError, PeerLost) as error:  # perhaps there is room for the model
            if trainer.processes.is_main:
                log.warning("%s. The model is saved all the same, if it can be; the run cannot be made longer", error)

    def _heed(self, signal: str | None) -> None:
        """Do what signals and callbacks have asked for in any of the processes."""
        trainer = self.trainer
        asked = trainer.processes.gather((signal, trainer.stopped, trainer.discarded, trainer.checkpoint_asked))
        signal = next((s for s, *_ in asked if s), None)
        trainer.stopped = next((reason for _, reason, *_ in asked if reason), None)
        trainer.discarded = any(discard for _, _, discard, _ in asked)
        if trainer.discarded:
            return
        trainer.state.stopped = trainer.stopped
        if trainer.checkpoints is not None and (signal or any(save for *_, save in asked)):
            trainer.checkpoint()
        if signal:
            saved = f"checkpoint of step {trainer.state.step} saved: the same command goes on"
            raise Interrupted(signal, saved if trainer.checkpoints is not None else "nothing was saved")

    def _resume(self) -> None:
        """Go on from the newest checkpoint where there is one and that is wanted."""
        trainer = self.trainer
        if trainer.checkpoints is None:
            return
        found = trainer.checkpoints.latest() if trainer.settings.resumes and trainer.processes.is_main else None
        # The main process looks, after it has cleared away what a killed one left; all do what it found.
        mine = (found, trainer.checkpoints.problems, trainer.budget.found())
        folder, problems, trainer.budget.tokens = trainer.processes.gather(mine)[0]
        trainer.collector.max_tokens_per_microbatch = trainer.budget.tokens
        if folder is None and problems:
            raise AlignlabError(
                f"no checkpoint in {trainer.checkpoints.folder} is whole: {'; '.join(problems)}. "
                "Start anew with training.resume=never"
            )
        if folder is not None:
            trainer.state = trainer.load_checkpoint(folder)
            trainer.stopped = trainer.state.stopped
            trainer.checkpoints.discard_after(trainer.state.step)
            trainer.each("on_resume", folder)
            if self._ended and trainer.processes.is_main:
                print(f"note: nothing is left to train at step {trainer.state.step} ({self.ended_by})", file=sys.stderr)

    # ------------------------------------------------------------------ groups

    def _next_iteration(self) -> list[Group]:
        """Draw, sample, score and prepare the next iteration's groups; the same list on every process."""
        trainer = self.trainer
        assert trainer.order is not None
        index, state = trainer.state.iteration, trainer.state
        every = trainer.source.ref_update_interval
        if index and every and index % every == 0 and state.refreshed != index:
            self._update_reference()
            state.refreshed = index  # sampling may fail, and be done again after a resume
        groups, seed = self._drawn(index)
        found = trainer.collector.collect(groups, seed, step=state.step, following=lambda: self._drawn(index + 1))
        with calling(trainer.order, "observe", f"batch {index + 1}"):
            trainer.order.observe(index, self._records.pop(index), found.sampled)
        state.iteration += 1
        with calling(trainer.order, "state"):
            kept = trainer.order.state
        state.order = plain_of(trainer.order, "state", kept)
        trainer.remember(found.report, found.reward if trainer.source.kind == "rollout" else None)
        if trainer.source.kind == "rollout":
            state.sampled = found.generated_tokens
            state.generated_tokens += found.generated_tokens
            trainer.each("on_iteration", found.sampled)
        return found.groups

    def _drawn(self, index: int) -> tuple[list[Group], int]:
        """Records of an iteration, and the seed of what is sampled for them."""
        trainer = self.trainer
        assert trainer.order is not None
        if index not in self._records:
            self._records[index] = batch_of(trainer.order, index, len(trainer.train))
        return [trainer.train[i] for i in self._records[index]], iteration_seed(trainer.settings.seed, index)

    def _update_reference(self) -> None:
        """Move the reference to the policy; what it said of records before no longer holds."""
        trainer = self.trainer
        if trainer.reference is None:
            raise AlignlabError(
                f"source.ref_update_interval: {type(trainer.algorithm).__name__} uses no reference policy"
            )
        held = trainer.reference.held_in
        apart = nullcontext() if held is trainer.model else trainer.engine.whole(held, change=True)
        with trainer.engine.whole(trainer.model, change=True), apart:
            trainer.reference.refresh(trainer.source.ref_update_tau)
        for group in [*trainer.train, *trainer.validation]:
            for response in group.responses:
                response.columns.pop("ref_logp", None)

    def _minibatch(self) -> list[Group]:
        """The groups of the next step: minibatches in a fresh order for each pass over the iteration."""
        trainer = self.trainer
        groups, size = trainer.state.pending, trainer.settings.batch_size
        per_pass = math.ceil(len(groups) / size)
        pass_, place = divmod(trainer.state.position, per_pass)
        if self.ppo_epochs == 1 and per_pass == 1:
            return groups
        order = Shuffled(groups, size, iteration_seed(trainer.settings.seed + 1, trainer.state.iteration))
        return [groups[i] for i in order.batch(pass_ * per_pass + place)]

    @property
    def ppo_epochs(self) -> int:
        """How often an iteration's groups are trained on."""
        trainer = self.trainer
        return trainer.source.ppo_epochs if trainer.source.kind == "rollout" else 1

    def _advance(self, enough: bool) -> None:
        trainer = self.trainer
        trainer.state.step += 1
        trainer.state.position += 1
        steps = self.ppo_epochs * math.ceil(len(trainer.state.pending) / trainer.settings.batch_size)
        if enough or trainer.state.position >= steps:
            trainer.state.pending = []

    # ------------------------------------------------------------------ limits

    @property
    def epoch(self) -> float:
        """How often all records have been drawn."""
        trainer = self.trainer
        return trainer.state.iteration / trainer.order.batches_per_epoch if trainer.order is not None else 0.0

    @property
    def done(self) -> float:
        """Share of the run that is over, by the limit that is nearest; 0 without a limit."""
        return max(self._consumed().values(), default=0.0)

    @property
    def _ended(self) -> bool:
        return self.done >= 1 or self.trainer.stopped is not None

    @property
    def ended_by(self) -> str:
        """What ended the run, as in "training.steps=100", or the reason that a callback gave."""
        trainer = self.trainer
        name, share = max(self._consumed().items(), key=lambda item: item[1], default=("", 0.0))
        if trainer.stopped is not None and share < 1:
            return trainer.stopped
        return f"training.{name}={trainer.settings.limits[name]:.12g}" if name else ""

    def _consumed(self) -> dict[str, float]:
        """By limit: the share of it that is used up."""
        trainer = self.trainer
        state, limits = trainer.state, trainer.settings.limits
        ahead = 0.0  # share of the current iteration that is still to be trained on
        if state.pending:
            ahead = 1 - state.position / (self.ppo_epochs * math.ceil(len(state.pending) / trainer.settings.batch_size))
        used: dict[str, float] = {
            "steps": state.step,
            "max_trained_tokens": state.trained_tokens,
            # What was sampled is trained on, also where it reaches the limit.
            "max_generated_tokens": state.generated_tokens - ahead * state.sampled,
            "max_seconds": state.seconds,
        }
        if trainer.order is not None:
            used["epochs"] = state.iteration - ahead
            if "epochs" in limits:
                limits["epochs"] = math.ceil(limits["epochs"] * trainer.order.batches_per_epoch)
        return {name: float(used[name]) / float(limit) for name, limit in limits.items() if name in used}

    def _finished(self) -> bool:
        trainer = self.trainer
        # Time differs between processes: all do what the first one does.
        return trainer.processes.gather(self._ended)[0] if trainer.settings.max_seconds else self._ended
