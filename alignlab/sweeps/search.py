"""`sweeper=optuna`: a search over a study on disk, whatever kills it.

The plugin hydra-optuna-sweeper is not used: it holds Optuna at 2.10 and SQLAlchemy below 2, keeps its study in a
database, cannot take up trials that were running when it was killed, and knows no pruning.

A trial is drawn with a sampler made for it alone, seeded by the search's seed and the trial's number, and is written to
the study whole. So what is drawn depends on the trials before it that have ended and on nothing else, and a search that
was killed and repeated, one trial at a time, is the search that was left alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from alignlab.core import ConfigError
from alignlab.sweeps.combinations import Combination, Composer
from alignlab.sweeps.results import USUAL, chosen_metric, direction_of, metrics_of, note, state_of
from alignlab.sweeps.settings import OptunaSettings
from alignlab.training.callbacks.pruning import Trial, open_study
from alignlab.training.run_folder import fingerprint

STUDY, NAME = "study.log", "sweep"


class Search:
    """The study in the sweep's folder, and what its trials are as runs.

    Args:
        composer: Hydra, with the search space among its overrides.

    Raises:
        ConfigError: there is nothing to search for or over, or the folder holds another search.
    """

    def __init__(self, composer: Composer, settings: OptunaSettings) -> None:
        self.composer = composer
        self.space = {o.get_key_element(): distribution(o) for o in composer.overrides if o.is_sweep_override()}
        if not self.space:
            raise ConfigError("sweeper=optuna: no setting varies: give one, as in optimizer.lr='interval(1e-5,1e-3)'")
        config = composer.combination(self._first(), _folder(0)).config
        metric = settings.metric or _metric(composer.command, config)
        if composer.command == "train" and metric.startswith("eval/") and config["training"]["eval_every"] is None:
            raise ConfigError(f"sweeper.metric={metric}: there are no evaluations: give training.eval_every, in steps")
        if composer.command == "compare" and settings.pruner != "none":
            raise ConfigError(f"sweeper.pruner={settings.pruner}: comparisons are not pruned: their metrics come last")
        direction = settings.direction or direction_of(metric)
        self.settings = settings.model_copy(update={"metric": metric, "direction": direction})
        self.metric = metric
        composer.folder.mkdir(parents=True, exist_ok=True)
        self.path = (composer.folder / STUDY).resolve()
        self.study = open_study(self.path, NAME, direction)
        self._same_as_before(config)
        self._known: dict[int, Combination] = {}

    def run(self, launch: Callable[..., None]) -> None:
        """Launch batch after batch, until there are as many trials as are wanted."""
        given_up: set[int] = set()  # failed in this session: the next one tries again
        while batch := self._batch(given_up):
            self._note()
            over = sum(t.state.is_finished() for t in self.study.get_trials(deepcopy=False))
            launch(batch, self._prepare, over + len(given_up), self.settings.trials)
            for combination in batch:
                if not self._tell(combination):
                    given_up.add(_number(combination))
        self._note()

    def _batch(self, given_up: set[int]) -> list[Combination]:
        """What was running when the search was killed, and new trials; none where all are over."""
        import optuna

        trials = self.study.get_trials(deepcopy=False)
        numbers = [t.number for t in trials if t.state == optuna.trial.TrialState.RUNNING and t.number not in given_up][
            : self.settings.batch
        ]
        while len(numbers) < self.settings.batch and len(trials) < self.settings.trials:
            numbers.append(self._draw())
            trials = self.study.get_trials(deepcopy=False)
        return [self._combination(trials[n]) for n in numbers]

    def _draw(self) -> int:
        """Add a trial to the study; its number."""
        import optuna

        settings, number = self.settings, len(self.study.get_trials(deepcopy=False))
        sampler: optuna.samplers.BaseSampler = optuna.samplers.RandomSampler(seed=settings.seed + number)
        if settings.sampler == "tpe":
            sampler = optuna.samplers.TPESampler(
                seed=settings.seed + number,
                n_startup_trials=settings.startup_trials,
                constant_liar=settings.batch > 1,  # do not draw a place that is being tried
            )
        trial = optuna.trial.create_trial(state=optuna.trial.TrialState.RUNNING)
        trial.number = number
        values: dict[str, Any] = {}
        for key, found in self.space.items():
            values[key] = _only(found) if found.single() else sampler.sample_independent(self.study, trial, key, found)
        template = optuna.trial.create_trial(
            state=optuna.trial.TrialState.RUNNING, params=values, distributions=self.space
        )
        self.study.add_trial(template)
        return number

    def _combination(self, trial: Any) -> Combination:
        if trial.number not in self._known:
            values = {key: _word(trial.params[key]) for key in self.space}
            self._known[trial.number] = self.composer.combination(values, _folder(trial.number), trial.number)
        return self._known[trial.number]

    def _prepare(self, combination: Combination) -> None:
        """Tell the run, wherever it will be, that it is a trial."""
        s = self.settings
        Trial(
            str(self.path), NAME, _number(combination), self.metric, s.pruner, s.startup_trials, s.warmup_steps
        ).write(combination.folder)

    def _tell(self, combination: Combination) -> bool:
        """Tell the study what a trial has come to; whether it has come to anything."""
        import optuna

        number, command, node = _number(combination), self.composer.command, combination.node
        state = state_of(command, node.folder, node.key).state
        if state not in ("finished", "pruned"):
            return False
        if state == "pruned":
            self.study.tell(number, state=optuna.trial.TrialState.PRUNED)
            return True
        measured = metrics_of(command, node.folder)
        chosen_metric([measured], self.metric)
        value = measured.get(self.metric)
        if value is None or math.isnan(value):
            self.study.tell(number, state=optuna.trial.TrialState.FAIL)
        else:
            self.study.tell(number, value)
        return True

    def _note(self) -> None:
        trials = [self._combination(t) for t in self.study.get_trials(deepcopy=False)]
        note(self.composer.folder, self.composer.command, self.composer.own, self.settings, trials)

    def _first(self) -> dict[str, str]:
        """Some values, to see what the config is like."""
        return {key: _word(_only(found)) for key, found in self.space.items()}

    def _same_as_before(self, config: Mapping[str, Any]) -> None:
        """A study is for one search: its space, its metric, and the settings that do not vary.

        Raises:
            ConfigError: the folder holds another search.
        """
        from optuna.distributions import distribution_to_json

        varied = {key.lstrip("+") for key in self.space}
        now = {
            "space": {key: distribution_to_json(found) for key, found in self.space.items()},
            "metric": [self.metric, self.settings.direction],
            **{f"setting {k}": v for k, v in _plain(fingerprint(dict(config))).items() if not _within(k, varied)},
        }
        before = self.study.user_attrs.get("search")
        if before is None:
            self.study.set_user_attr("search", now)
            return
        different = sorted(
            k.removeprefix("setting ") for k in before.keys() | now.keys() if before.get(k) != now.get(k)
        )
        if different:
            raise ConfigError(
                f"out={self.composer.folder}: this folder holds a search with another {', '.join(different[:5])}: "
                "choose another out=DIR"
            )


def distribution(override: Any) -> Any:
    """What Hydra says varies, as a distribution of Optuna's.

    `a,b,c` and `choice(…)`: one of these. `range(a,b)`, `range(a,b,step)`: as Hydra counts, b left out.
    `interval(a,b)`: any number in it; `int(interval(a,b))`: whole ones, b included. `tag(log,…)`: on a logarithmic
    scale.

    Raises:
        ConfigError: it is impossible.
    """
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    value, word = override.value(), override.input_line
    tags = set(getattr(value, "tags", ()) or ())
    if tags - {"log"}:
        raise ConfigError(f"{word}: the tag '{sorted(tags - {'log'})[0]}' means nothing here; known: log")
    log = "log" in tags
    try:
        if override.is_interval_sweep():
            whole = isinstance(value.start, int) and isinstance(value.end, int)
            kind = IntDistribution if whole else FloatDistribution
            return kind(value.start, value.end, log=log)
        if override.is_range_sweep() and not log:
            numbers = list(value.range())
            if numbers and all(isinstance(n, int) for n in numbers):
                low, high = min(numbers), max(numbers)
                return IntDistribution(low, high, step=abs(int(value.step)))
        if log:
            raise ConfigError(f"{word}: a logarithmic scale is for interval(a,b)")
        return CategoricalDistribution(list(override.sweep_string_iterator()))
    except ValueError as error:
        raise ConfigError(f"{word}: {str(error).rstrip('.')}") from error


def _metric(command: str, config: Mapping[str, Any]) -> str:
    """What is searched for where nothing is said."""
    if command == "compare":
        exact = "exact" in str(config["benchmark"]["_target_"]).lower()
        return USUAL[0] if exact else USUAL[1]
    if config["training"]["eval_every"] is not None:
        return str(config["training"]["metric"])
    return "reward" if config["source"]["kind"] == "rollout" else "loss"


def _only(found: Any) -> Any:
    """A value of a distribution."""
    return found.choices[0] if hasattr(found, "choices") else found.low


def _word(value: Any) -> str:
    """As it is written on the command line; a choice is so already."""
    return value if isinstance(value, str) else repr(value)


def _folder(number: int) -> str:
    return f"trial-{number:04}"


def _number(combination: Combination) -> int:
    assert combination.trial is not None
    return combination.trial


def _plain(values: Mapping[str, Any]) -> dict[str, Any]:
    """As JSON gives it back."""
    import json

    return dict(json.loads(json.dumps(values, default=str)))


def _within(key: str, varied: Sequence[str] | set[str]) -> bool:
    """Whether a setting is one that varies, or of a group whose option does."""
    return any(key == k or key.startswith(f"{k}.") for k in varied)
