"""A comparison's parts: what each runs, and which others it waits for. All that can be wrong is found here.

An algorithm's overrides say by their placeholders what it needs: `{pairs}` stands for the path of the pairs, and
whatever uses it waits for the part that makes them. Every training run starts from the SFT policy, where there is one.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from alignlab.benchmarks.evaluate import check_best_of
from alignlab.build import check_type
from alignlab.comparison.graph.ledger import LOGS, REPORT
from alignlab.comparison.graph.node import Command, Node
from alignlab.comparison.settings import COSTS, ComparisonSettings, Overrides, Pairs
from alignlab.config import compose, resolve
from alignlab.core import ConfigError, HasBaseModel, HasReward, Scorer, TrainingBenchmark, did_you_mean
from alignlab.core.parts import calling
from alignlab.training.callbacks.trackers import named
from alignlab.training.run_config import check
from alignlab.training.run_folder import REFERENCE_CACHE

SHARED = ("model", "adapter", "quantization", "distributed", "rollout", "tracker")
"""Sections of the comparison that hold for every training run."""

STAGES = ("base", "data", "sft", "pairs", "reward_model", "runs", "plots", REPORT, LOGS, REFERENCE_CACHE)
"""Names within a comparison's folder that no further model may take."""


@dataclass(frozen=True)
class Place:
    """What a placeholder stands for, and the nodes to be waited for by those that use it."""

    text: str
    nodes: Sequence[Node] = ()


def plan(
    config: dict[str, Any],
    settings: ComparisonSettings,
    benchmark: TrainingBenchmark,
    out: Path,
    own: Path | None = None,
) -> list[Node]:
    """The comparison's nodes, parents first. Every run's config is composed and checked here, before anything runs.

    Args:
        own: a folder of the user's configs.

    Raises:
        ConfigError: an override of a run is wrong, or something that it needs is not made.
    """
    check_type(TrainingBenchmark, benchmark, f"benchmark._target_={config['benchmark']['_target_']}")
    base = config["model"]["path"]
    if not base and isinstance(benchmark, HasBaseModel):
        with calling(benchmark, "base_path"):
            base = benchmark.base_path()
    if not base:
        raise ConfigError(f"model.path: the benchmark '{benchmark.name}' needs a base model: give model=PATH")
    _check_sort_by(settings, benchmark)
    return _Plan(config, settings, benchmark, out, own, str(base)).nodes


def _check_sort_by(settings: ComparisonSettings, benchmark: TrainingBenchmark) -> None:
    """Refuse a metric that no row can have, where the benchmark says what it measures."""
    measured = {*getattr(benchmark, "metrics", ())}
    if settings.reward_model is None:
        measured -= {"proxy_reward"}
    known = measured | set(COSTS)
    if measured and settings.sort_by is not None and settings.sort_by not in known:
        hint = did_you_mean(settings.sort_by, known)
        what = f"no row has it: the benchmark '{benchmark.name}' does not measure it"
        raise ConfigError(f"comparison.sort_by={settings.sort_by}: {what}{hint}")


class _Plan:
    """The nodes, and what the placeholders stand for, as they come to be known from the first part to the last."""

    def __init__(
        self,
        config: dict[str, Any],
        settings: ComparisonSettings,
        benchmark: TrainingBenchmark,
        out: Path,
        own: Path | None,
        base: str,
    ) -> None:
        tracker = dict(config.get("tracker", {}))
        self.label = tracker.pop("name", None) or config["name"]  # the comparison's, not that of each of its runs
        self.config, self.own = {**config, "tracker": tracker}, own
        self.settings, self.benchmark, self.out = settings, benchmark, out
        self.cache = str(out / REFERENCE_CACHE)
        self.nodes: list[Node] = []
        self.stages: list[Node] = []
        self.start = Place(base, self.stages[:])
        if not config["model"]["path"]:
            made = Command("base", {"benchmark": config["benchmark"], "path": base})
            self.stages.append(self._add(Node("base", out / "base", [made], still_valid=Path(base).is_dir)))
            self.start = Place(base, self.stages[:])
        written = Command("data", {"benchmark": config["benchmark"], "model": base}, self.start.nodes)
        data = self._add(Node("data", out / "data", [written]))
        self.stages.append(data)
        self.places = {
            "base": self.start,
            "data": Place(str(out / "data"), [data]),
            "out": Place(str(out), self.stages),  # whatever will be in it
            **({"gold": Place(quoted(self._gold()))} if isinstance(benchmark, HasReward) else {}),
            **{name: Place(str(out / f"data/{name}.jsonl"), [data]) for name in benchmark.files},
        }
        self._shared_stages()
        for seed in settings.seeds:
            self._runs(seed)
        names = [n.name for n in self.nodes]
        for name in names:
            if names.count(name) > 1:
                raise ConfigError(f"comparison: two of its parts are called {name}: rename an algorithm or drop a seed")

    def _add(self, node: Node) -> Node:
        self.nodes.append(node)
        return node

    def _shared_stages(self) -> None:
        """SFT, the pairs, the reward model, further models: made once."""
        settings = self.settings
        if settings.sft is not None:
            self._stage("sft", self._training("sft", [*settings.sft, "training.save_model=merged"]), "model")
            self.start = self.places["sft"]
        self.places |= {"sft": self.start, "start": self.start}
        if settings.pairs is not None:
            self._stage("pairs", self._sampling(settings.pairs), "groups.jsonl")
        if settings.reward_model is not None:
            self._stage("reward_model", self._training("reward_model", settings.reward_model), "model")
        for name, overrides in settings.models.items():
            if name in self.places or name in STAGES:
                raise ConfigError(f"comparison.models.{name}: this name stands for something else: choose another")
            self._stage(name, self._training(name, overrides), "model")

    def _stage(self, name: str, node: Node, result: str) -> None:
        """Add a node that is part of what all algorithms start from; `{name}` then stands for its result."""
        self.stages.append(self._add(node))
        self.places[name] = Place(str(node.folder / result), [node])

    def _runs(self, seed: int) -> None:
        """What gets rows of the leaderboard."""
        settings, start = self.settings, self.start
        if settings.baseline and settings.sft is not None:
            self._measure(f"runs/sft-seed{seed}", seed, start)
        for n in settings.best_ofs:
            temperature = self.config["rollout"].get("temperature", 1.0)
            check_best_of("comparison.best_of", n, self.benchmark, settings.reward_model, temperature)
            self._measure(f"runs/best_of_{n}-seed{seed}", seed, start, n)
        for algorithm, own in settings.algorithms.items():
            overrides = [*settings.budget.overrides(), *own, f"training.seed={seed}"]
            self._add(self._training(f"runs/{algorithm}-seed{seed}", overrides, seed))

    # ------------------------------------------------------------------ nodes

    def _training(self, name: str, overrides: Overrides, evaluation: int | None = None) -> Node:
        """A training run, with its evaluation where a seed for it is given."""
        folder = self.out / name
        used = [self.start]
        filled = [self._filled(override, name, used) for override in [*self.settings.common, *overrides]]
        # A stage's `adapter=none` replaces the shared section.
        chosen = {override.partition("=")[0] for override in filled}
        common = {k: self.config[k] for k in SHARED if k in self.config and k not in chosen}
        try:
            start = f"model.path={quoted(self.start.text)}"
            composed = resolve(compose("train", [*as_overrides(common), *filled, start], self.own))
            composed |= {"name": name, "out": str(folder)}
            composed["training"]["reference_cache"] = composed["training"]["reference_cache"] or self.cache
            check(composed)
            composed["tracker"] = self._tracked(composed["tracker"], name)
        except ConfigError as error:
            raise ConfigError(f"comparison: {name}: {error}") from error
        commands = [Command("train", composed, self._in_order(used))]
        if evaluation is not None:
            commands.append(self._evaluation(folder, evaluation, composed["tracker"]))
        return Node(name, folder, commands, group=_group(name))

    def _measure(self, name: str, seed: int, policy: Place, best_of: int = 1) -> None:
        """A node that measures a policy as it is."""
        folder = self.out / name
        tracker = self._tracked(self.config["tracker"], name, "evaluate")
        evaluation = self._evaluation(folder, seed, tracker, policy, best_of)
        self._add(Node(name, folder, [evaluation], group=_group(name)))

    def _sampling(self, pairs: Pairs) -> Node:
        """Pairs for the reward model and for DPO, labelled as a noisy annotator would."""
        if "prompts" not in self.places:
            raise ConfigError(f"comparison.pairs: the benchmark '{self.benchmark.name}' has no prompts: give null")
        if "gold" not in self.places:
            raise ConfigError(
                f"comparison.pairs: the benchmark '{self.benchmark.name}' has no reward to label them by: give null"
            )
        used = [self.places["prompts"], self.start]
        prompts, start = (quoted(place.text) for place in used)
        composed = resolve(compose("sample", ["data=prompts", f"data.path={prompts}", f"model.path={start}"]))
        labels: dict[str, Any] = {"_target_": "alignlab.scoring.BradleyTerryLabels", "reward": self._gold()}
        labels |= {"temperature": pairs.temperature, "certain": pairs.certain, "seed": pairs.seed}
        folder = self.out / "pairs"
        composed |= {
            "quantization": self.config.get("quantization", {}),
            "rollout": self.config["rollout"],
            "scoring": labels,
            "group_size": pairs.group_size,
            "rounds": pairs.rounds,
            "seed": pairs.seed,
            "name": "pairs",
            "out": str(folder),
        }
        return Node("pairs", folder, [Command("sample", composed, self._in_order(used))])

    def _evaluation(
        self, folder: Path, seed: int, tracker: dict[str, Any], policy: Place | None = None, best_of: int = 1
    ) -> Command:
        """How a policy is measured, that in `folder` or a given one."""
        judge = self.places.get("reward_model")
        used = [self.places["base"], self.places["sft"], *([judge] if judge else []), *([policy] if policy else [])]
        config = {
            **{k: self.config.get(k, {}) for k in ("benchmark", "model", "quantization", "rollout")},
            "run": policy.text if policy else str(folder),
            "out": str(folder),
            "reference": self.places["sft"].text,
            "base": self.places["base"].text,
            "reward_model": judge.text if judge else None,
            "best_of": best_of,
            "max_tokens_per_microbatch": 16384,
            "threads": None,
            "seed": seed,
            "tracker": tracker,
        }
        return Command("evaluate", config, self._in_order(used))

    def _tracked(self, tracker: dict[str, Any], name: str, job_type: str | None = None) -> dict[str, Any]:
        """The section `tracker` of a part: by default all are a group, and each is called after its place in it."""
        part = name.removeprefix("runs/")
        kind = job_type or part.rsplit("-seed", 1)[0]
        return named(tracker, group=self.label, job_type=kind, name=f"{self.label}/{part}")

    def _in_order(self, used: Sequence[Place]) -> list[Node]:
        """The nodes of these places, each once, in the order of the plan."""
        names = {node.name for place in used for node in place.nodes}
        return [node for node in self.nodes if node.name in names]

    # ------------------------------------------------------------------ overrides

    def _gold(self) -> dict[str, Any]:
        return {"_target_": "alignlab.comparison.planning.gold", "benchmark": self.config["benchmark"]}

    def _filled(self, override: str, name: str, used: list[Place]) -> str:
        """An override with `{sft}` and the like replaced, which are added to `used`; other braces, as of a dictionary,
        are left alone."""

        def text(found: re.Match[str]) -> str:
            place = self.places.get(found[1])
            if place is None:
                known = ", ".join(self.places)
                what = f"'{override}': {found[0]} stands for nothing here; known: {known}"
                raise ConfigError(f"comparison: {name}: {what}")
            used.append(place)
            return place.text

        filled = re.sub(r"(?<!\$)\{(\w+)\}", text, override)
        key, _, value = filled.partition("=")
        # The folder of a comparison in a sweep is called after settings: `beta=0.1,seed=2`.
        return (
            f"{key}={quoted(value)}"
            if filled != override and re.fullmatch(r"[^'\"\[\]{}]*[=,][^'\"\[\]{}]*", value)
            else filled
        )


def gold(benchmark: HasReward) -> Scorer:
    """The benchmark's own reward: `{_target_: alignlab.comparison.planning.gold, benchmark: {_target_: …}}`."""
    with calling(benchmark, "gold"):
        return benchmark.gold()


def _group(name: str) -> str:
    """Runs that differ in seed alone are a group, called after their algorithm."""
    return name.removeprefix("runs/").rsplit("-seed", 1)[0] if name.startswith("runs/") else name


def as_overrides(sections: dict[str, Any], prefix: str = "") -> Overrides:
    """Settings as overrides; what is null in the comparison is left to the run's own default."""
    found: Overrides = []
    for key, value in sections.items():
        name = f"{prefix}{key}"
        if isinstance(value, dict):
            found += as_overrides(value, f"{name}.")
        elif value is not None:
            found.append(f"++{name}={quoted(value)}")
    return found


def quoted(value: Any) -> str:
    """A value as Hydra reads it in an override."""
    if isinstance(value, str):
        escaped = value.replace("\\", "\\\\").replace("'", "\\'")
        return f"'{escaped}'"
    if isinstance(value, list):
        return f"[{','.join(quoted(v) for v in value)}]"
    if isinstance(value, dict):
        return f"{{{','.join(f'{k}: {quoted(v)}' for k, v in value.items())}}}"
    return str(value).lower() if isinstance(value, bool) else "null" if value is None else str(value)
