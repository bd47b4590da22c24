"""The seams: whatever a user may replace is a Protocol here and a `_target_` in the config.

A class of the user's needs the methods, not a base class of ours. What only some of them need is a small Protocol of
its own (`NeedsPolicy`, `Reports`), asked for by `isinstance`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from alignlab.core.example import Example
from alignlab.core.group import Group
from alignlab.core.sampling import Sampler

if TYPE_CHECKING:
    from torch import nn

    from alignlab.core.algorithm import ModelKind


# ---------------------------------------------------------------------------------------------- scoring


@runtime_checkable
class Scorer(Protocol):
    """Fills in columns of groups: rewards, labels, log-probs of another model. Config: `scoring`."""

    @property
    def fills(self) -> tuple[str, ...]:
        """Names of the columns it fills, without axis suffix."""
        ...

    def score(self, groups: Sequence[Group]) -> None:
        """Set `response.columns[name]` for every name in `fills` and every response. In place."""
        ...


@runtime_checkable
class NeedsPolicy(Protocol):
    """A scorer, environment or benchmark that works with the policy that is trained."""

    def bind(self, policy: Any, tokenizer: Any) -> None:
        """Called once, before anything else, with the policy that is trained and its tokenizer.

        Args:
            policy: an `alignlab.Policy`: `log_probs(groups)`, `sample(prompts, n)`, and the `model` behind them. In
                mode fsdp or zero3 all processes must ask it the same, and it cannot sample.
            tokenizer: of transformers.
        """
        ...


@runtime_checkable
class NeedsSampler(Protocol):
    """A scorer that draws responses itself, such as completions of the beginning of a solution."""

    def bind_sampler(self, sampler: Sampler) -> None:
        """Called before `score`, with a sampler of the policy as it is now."""
        ...


@runtime_checkable
class Reports(Protocol):
    """A scorer or environment that has metrics of its own."""

    @property
    def report(self) -> Mapping[str, float]:
        """Metrics of the last call, by name; logged with the iteration's own, their mean over the processes."""
        ...


# ---------------------------------------------------------------------------------------------- training


@runtime_checkable
class Callback(Protocol):
    """Does something at certain points of a run: logs, evaluates, saves, ends it. Config: `callbacks`.

    As a base class its methods do nothing: override those you need. Every process has one and calls it at the same
    points; `trainer.processes.is_main` tells the first of them. `trainer` is the `Trainer`: its `state`, `model`,
    `algorithm`, `processes`; `trainer.metrics` are those of this step so far; `trainer.request_checkpoint()` and
    `trainer.request_stop(reason)` are heeded after the step, on whichever of the processes they were called.
    """

    def on_start(self, trainer: Any) -> None:
        """Before the first step, after a checkpoint was loaded where there is one: `trainer.state.step` tells."""
        return

    def on_iteration(self, trainer: Any, sampled: Sequence[Group]) -> None:
        """The groups of an iteration are there, sampled and scored; before the algorithm chose from them."""
        return

    def on_step(self, trainer: Any) -> None:
        """An optimiser step is done."""
        return

    def on_evaluate(self, trainer: Any, metrics: Mapping[str, float]) -> None:
        """An evaluation is done; its metrics have names that begin with `eval/`."""
        return

    def on_checkpoint(self, trainer: Any, folder: Path) -> None:
        """A checkpoint is being written: files put into `folder` become part of it."""
        return

    def on_resume(self, trainer: Any, folder: Path) -> None:
        """The run goes on from the checkpoint in `folder`: read back what `on_checkpoint` put there. Before
        `on_start`."""
        return

    def on_end(self, trainer: Any, error: BaseException | None) -> None:
        """Training is over, or `error` ended it. The last callback of the list is called first."""
        return


@runtime_checkable
class Schedule(Protocol):
    """A learning-rate schedule. Config: `schedule`."""

    def __call__(self, done: float) -> float:
        """Factor on the peak learning rate, >= 0, when a share `done` in [0, 1] of the run is over."""
        ...


@runtime_checkable
class DataOrder(Protocol):
    """In which order records are trained on; a curriculum, where it looks at what they brought. Config: `order`.

    Made as `target(groups=…, batch_size=…, seed=…, **settings)`.
    """

    @property
    def batches_per_epoch(self) -> int:
        """How many batches make an epoch."""
        ...

    def batch(self, index: int) -> Sequence[int]:
        """Indices of the records of batch `index`, from 0, counted over all epochs. The same on every process."""
        ...

    def observe(self, index: int, records: Sequence[int], groups: Sequence[Group]) -> None:
        """What became of batch `index`: the groups of its `records`, sampled and scored. Called in order."""
        ...

    @property
    def state(self) -> Mapping[str, Any]:
        """What must survive a resume: numbers, strings, lists and mappings of them."""
        ...

    @state.setter
    def state(self, state: Mapping[str, Any]) -> None: ...


@runtime_checkable
class Tracker(Protocol):
    """Where metrics go besides `metrics.jsonl`: wandb, TensorBoard, MLflow, trackio, … Config: `tracker`. It is made
    and called on the main process alone, and what it raises never ends a run."""

    def start(self, folder: Path, config: Mapping[str, Any], lines: int) -> int | None:
        """Begin, or go on with the run that has begun in this folder.

        Args:
            config: the run's, without secrets.
            lines: how many lines `metrics.jsonl` has.

        Returns:
            How many of them it has already, so that it is told the others; None: as many as it was ever told.
        """
        ...

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Metrics of a step."""
        ...

    def summarize(self, metrics: Mapping[str, float]) -> None:
        """Metrics of the run as a whole, such as those of an evaluation."""
        ...

    def finish(self, failed: bool) -> None:
        """The run is over."""
        ...


# ---------------------------------------------------------------------------------------------- models, data, measuring


@runtime_checkable
class AdapterKind(Protocol):
    """What of a model is trained. Config: `adapter`. Only models that are trained get one."""

    @property
    def trains_base(self) -> bool:
        """Whether the model's own weights are trained, all or some. Then the whole model is saved, the reference is a
        copy of it, `model.freeze` applies, and the base cannot be quantised. Else `apply` returns a PEFT model, the
        adapter alone is saved, and the reference is the base with the adapter off, or with a frozen copy of it."""
        ...

    def apply(self, network: nn.Module, kind: ModelKind) -> nn.Module:
        """The network with something to train in it, and everything else frozen.

        Args:
            network: a transformers model as loaded, its head new or not.
            kind: "policy", "score" or "step".
        """
        ...


class Parser(Protocol):
    """Reads one kind of record; a plain function is one. Config: `data.parser`."""

    def __call__(self, record: Mapping[str, Any], /) -> Example:
        """The prompt and the responses that a record holds.

        Args:
            record: its fields by name, as they stand in the file.

        Raises:
            BadRecord: the record cannot be used, and why. File and line are added to it; any other error is reported
                as one of the parser, with file and line.
        """
        ...


@runtime_checkable
class Benchmark(Protocol):
    """What policies are measured on. Config: `benchmark`. Enough for `alignlab evaluate`.

    `alignlab.benchmarks.Benchmark` is a base class with defaults for all that follows; nothing needs to inherit it.
    """

    @property
    def name(self) -> str:
        """As leaderboards show it."""
        ...

    def evaluate(self, subject: Any) -> Mapping[str, Any]:
        """Metrics of a policy: numbers by name.

        Some names have a meaning: `reward`; `kl`, in nats per response, to the reference; `win_rate`, against the
        reference. One that is not measured is None or left out. With `NAME_per_prompt`, a list of the same metric for
        each held-out prompt, intervals are over prompts too. For the report: `samples`, a list of {"prompt",
        "answer"}; `frontier`, a list of [kl, highest reward]; `note`, a sentence that stands below the table.

        Args:
            subject: the policy, its reference, and how to sample: `alignlab.benchmarks.Subject`.
        """
        ...


@runtime_checkable
class TrainingBenchmark(Benchmark, Protocol):
    """A benchmark for comparisons: it also writes what policies are trained on. With `metrics`, the names of all that
    it may measure, a comparison's `sort_by` is checked before anything is trained."""

    @property
    def files(self) -> tuple[str, ...]:
        """Names of the files that `write_data` writes, without `.jsonl`; may be empty. In a comparison's overrides,
        `{prompts}` stands for the path of `prompts.jsonl`, and so on."""
        ...

    def write_data(self, folder: Path, model: str) -> None:
        """Write the `files` into a folder, such as `demonstrations.jsonl` of {"prompt", "completion"} and
        `prompts.jsonl` of {"prompt"}.

        Args:
            model: the base model's path, for its tokenizer.
        """
        ...


@runtime_checkable
class HasReward(Protocol):
    """A benchmark whose reward can also label pairs and score samples: `{gold}` in a comparison's overrides."""

    def gold(self) -> Scorer:
        """The true reward; fills `reward`."""
        ...


@runtime_checkable
class HasBaseModel(Protocol):
    """A benchmark that brings along the model that all runs start from."""

    def base_path(self) -> str | None:
        """The model's folder, made or not; None where the user names a model."""
        ...

    def base_model(self) -> str | None:
        """The same folder, after the model in it was made if need be."""
        ...


@runtime_checkable
class MeasuresBestOf(Protocol):
    """A benchmark that may measure the best of N samples, by `subject.answers` or else by `subject.best_of`."""

    @property
    def supports_best_of(self) -> bool:
        """Whether it does."""
        ...
