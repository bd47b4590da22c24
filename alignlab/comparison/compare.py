"""The main job: from one base model to a leaderboard.

data → SFT → preference pairs → reward model → every algorithm × seeds → benchmark → leaderboard and report. All
algorithms start from the same SFT checkpoint, see the same prompts and pairs, and stop at the same budget.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import Field

from alignlab.benchmarks.base import Benchmark
from alignlab.benchmarks.evaluate import build_benchmark
from alignlab.comparison.collect import collect
from alignlab.comparison.execute import execute
from alignlab.comparison.graph import Node, write_plan
from alignlab.config import compose, resolve, section
from alignlab.core import AlignlabError, ConfigError
from alignlab.core.files import write_text
from alignlab.core.settings import Settings
from alignlab.training.run import check
from alignlab.training.storage import storage_errors

Words = list[str]
"""Overrides as one writes them after `alignlab train`; `{sft}`, `{pairs}`, … stand for what earlier parts made."""


class Budget(Settings):
    """What each algorithm may spend after SFT; whatever is given is a limit, and the nearest ends a run."""

    steps: int | None = Field(None, ge=1)
    trained_tokens: int | None = Field(None, ge=1)
    generated_tokens: int | None = Field(None, ge=1)
    seconds: float | None = Field(None, gt=0)

    def words(self) -> Words:
        limits = {
            "steps": self.steps,
            "max_trained_tokens": self.trained_tokens,
            "max_generated_tokens": self.generated_tokens,
            "max_seconds": self.seconds,
        }
        given = [f"training.{name}={value}" for name, value in limits.items() if value is not None]
        return [*given, *(["training.epochs=null"] if given else [])]


class Pairs(Settings):
    """Preference pairs sampled from the SFT policy and labelled by the true reward with Bradley-Terry noise."""

    rounds: int = Field(1, ge=1)
    samples: int = Field(2, ge=2)
    temperature: float = Field(1.0, gt=0)
    certain: bool = True
    seed: int = 0


class ComparisonSettings(Settings):
    """What is compared, and how."""

    seeds: list[int] = Field(min_length=1)
    budget: Budget
    common: Words
    sft: Words | None
    pairs: Pairs | None
    reward_model: Words | None
    algorithms: dict[Annotated[str, Field(pattern=r"^[\w.+-]+$")], Words] = Field(min_length=1)
    workers: int = Field(ge=1)
    threads: int | None = Field(ge=1)
    sort_by: str | None
    baseline: Literal["sft"] | None = "sft"


def compare(config: dict[str, Any], out: Path, own: Path | None = None) -> int:
    """Run a comparison, write its leaderboard and report in `out`, print the leaderboard.

    Args:
        own: a folder of the user's configs, searched for those of the runs too.

    Returns:
        0, or 1 where parts failed; then the leaderboard is of those that did not.
    """
    settings = section(ComparisonSettings, config["comparison"], "comparison")
    benchmark = build_benchmark(config["benchmark"])
    nodes = plan(config, settings, benchmark, out, own)
    with storage_errors(out, "the comparison could not be written"):
        out.mkdir(parents=True, exist_ok=True)
        write_text(out / "config.yaml", yaml.safe_dump(config, sort_keys=False, allow_unicode=True))
        write_plan(out, nodes)
    failed = execute(nodes, settings.workers, settings.threads)
    runs = [n for n in nodes if n.name.startswith("runs/")]
    if all(n.name in failed for n in runs):
        name, reason = next(iter(failed.items()))
        raise AlignlabError(f"no run finished; the first failure: {name}: {reason}")
    collect(out).print()
    for name, reason in failed.items():
        print(f"failed: {name}: {reason}")
    return 1 if failed else 0


def plan(
    config: dict[str, Any], settings: ComparisonSettings, benchmark: Benchmark, out: Path, own: Path | None = None
) -> list[Node]:
    """The comparison's nodes, parents first. Every run's config is composed and checked here, before anything runs."""
    base = config["model"]["path"] or benchmark.base_model()
    if not base:
        raise ConfigError(f"model.path: the benchmark '{benchmark.name}' needs a base model: give model=PATH")
    gold = {"_target_": "alignlab.comparison.pairs.gold", "benchmark": config["benchmark"]}
    places = {"base": str(base), "data": str(out / "data"), "out": str(out), "gold": _quoted(gold)}
    shared = {k: config[k] for k in ("model", "adapter", "rollout", "tracker")}

    def training(name: str, words: Words, start: str, parents: Sequence[Node], evaluations: Sequence[int] = ()) -> Node:
        folder = out / name
        filled = [_filled(word, places, name) for word in [*settings.common, *words]]
        try:
            chosen = {word.partition("=")[0] for word in filled}  # a stage's `adapter=none` replaces the shared section
            common = {k: v for k, v in shared.items() if k not in chosen}
            words = [*_as_words(common), *filled, f"model.path={_quoted(start)}"]
            composed = resolve(compose("train", words, own)) | {"name": name, "out": str(folder)}
            check(composed)
        except ConfigError as error:
            raise ConfigError(f"comparison: {name}: {error}") from error
        evaluate = [("evaluate", _evaluation(config, seed, folder, places)) for seed in evaluations]
        return Node(name, folder, [("train", composed), *evaluate], parents)

    data = Node("data", out / "data", [("data", {"benchmark": config["benchmark"], "model": str(base)})])
    nodes, parents, start = [data], [data], str(base)
    places |= {"demonstrations": str(out / "data/demonstrations.jsonl"), "prompts": str(out / "data/prompts.jsonl")}
    if settings.sft is not None:
        sft = training("sft", [*settings.sft, "training.save_model=merged"], start, parents)
        start = places["sft"] = str(out / "sft/model")
        nodes.append(sft)
        parents = [*parents, sft]
    else:
        places["sft"] = start
    if settings.pairs is not None:
        sampling = _sampling(config, settings.pairs, start, places, out / "pairs")
        pairs = Node("pairs", out / "pairs", [("sample", sampling)], parents)
        places["pairs"] = str(out / "pairs/groups.jsonl")
        nodes.append(pairs)
        parents = [*parents, pairs]
    if settings.reward_model is not None:
        judge = training("reward_model", settings.reward_model, start, parents)
        places["reward_model"] = str(out / "reward_model/model")
        nodes.append(judge)
        parents = [*parents, judge]
    places["start"] = start
    for seed in settings.seeds:
        if settings.baseline and settings.sft is not None:
            folder = out / f"runs/sft-seed{seed}"
            evaluation = _evaluation(config, seed, folder, places) | {"run": start}
            nodes.append(Node(f"runs/sft-seed{seed}", folder, [("evaluate", evaluation)], parents))
        for algorithm, words in settings.algorithms.items():
            words = [*settings.budget.words(), *words, f"training.seed={seed}"]
            nodes.append(training(f"runs/{algorithm}-seed{seed}", words, start, parents, [seed]))
    names = [n.name for n in nodes]
    for name in names:
        if names.count(name) > 1:
            raise ConfigError(f"comparison: two of its parts are called {name}: rename an algorithm or drop a seed")
    return nodes


def _filled(word: str, places: dict[str, str], name: str) -> str:
    """A word with `{sft}` and the like replaced; other braces, as of a dictionary, are left alone."""

    def place(found: re.Match[str]) -> str:
        if found[1] not in places:
            known = ", ".join(places)
            raise ConfigError(f"comparison: {name}: '{word}': {found[0]} stands for nothing here; known: {known}")
        return places[found[1]]

    return re.sub(r"(?<!\$)\{(\w+)\}", place, word)


def _as_words(sections: dict[str, Any], prefix: str = "") -> Words:
    """Settings as overrides; what is null in the comparison is left to the run's own default."""
    found: Words = []
    for key, value in sections.items():
        name = f"{prefix}{key}"
        if isinstance(value, dict):
            found += _as_words(value, f"{name}.")
        elif value is not None:
            found.append(f"++{name}={_quoted(value)}")
    return found


def _quoted(value: Any) -> str:
    if isinstance(value, str):
        escaped = value.replace("\\", "\\\\").replace("'", "\\'")
        return f"'{escaped}'"
    if isinstance(value, list):
        return f"[{','.join(_quoted(v) for v in value)}]"
    if isinstance(value, dict):
        return f"{{{','.join(f'{k}: {_quoted(v)}' for k, v in value.items())}}}"
    return str(value).lower() if isinstance(value, bool) else "null" if value is None else str(value)


def _evaluation(config: dict[str, Any], seed: int, folder: Path, places: dict[str, str]) -> dict[str, Any]:
    return {
        "benchmark": config["benchmark"],
        "model": config["model"],
        "rollout": config["rollout"],
        "run": str(folder),
        "out": str(folder),
        "reference": places["sft"],
        "base": places["base"],
        "reward_model": places.get("reward_model"),
        "token_budget": 16384,
        "threads": None,
        "seed": seed,
    }


def _sampling(config: dict[str, Any], pairs: Pairs, start: str, places: dict[str, str], folder: Path) -> dict[str, Any]:
    """Pairs for the reward model and for DPO, labelled as a noisy annotator would."""
    composed = resolve(compose("sample", ["data=prompts", f"data.path='{places['prompts']}'", f"model.path='{start}'"]))
    gold = {"_target_": "alignlab.comparison.pairs.gold", "benchmark": config["benchmark"]}
    labels: dict[str, Any] = {"_target_": "alignlab.scoring.BradleyTerryLabels", "reward": gold}
    labels |= {"temperature": pairs.temperature, "certain": pairs.certain, "seed": pairs.seed}
    return composed | {
        "rollout": config["rollout"],
        "scoring": labels,
        "samples": pairs.samples,
        "rounds": pairs.rounds,
        "seed": pairs.seed,
        "name": "pairs",
        "out": str(folder),
    }
