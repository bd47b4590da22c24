"""The configs say what the settings classes and constructors say, and explain every key."""

from __future__ import annotations

import inspect
import re
from copy import deepcopy
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml

from alignlab.benchmarks.evaluate import EvaluateSettings
from alignlab.build import build, locate
from alignlab.comparison.settings import Budget, ComparisonSettings, Pairs
from alignlab.config import compose, config_folder, resolve
from alignlab.core.settings import Settings
from alignlab.data import DataSettings
from alignlab.launch.slurm.settings import SlurmSettings
from alignlab.models import ModelSettings, QuantizationSettings
from alignlab.rollout import LocalRollout, VllmRollout, VllmSettings
from alignlab.rollout.produce import ProduceSettings
from alignlab.sweeps.settings import GridSettings, LocalSettings, OptunaSettings
from alignlab.training.run_config import check
from alignlab.training.settings import DistributedSettings, SourceSettings, TrainingSettings

FOLDER = config_folder()
COMMANDS = sorted(p.stem for p in FOLDER.glob("*.yaml"))
FILES = sorted(FOLDER.glob("*/*.yaml"))

SWEEPS: dict[str, type[Settings]] = {
    "launcher/local": LocalSettings,
    "launcher/slurm": SlurmSettings,
    "sweeper/grid": GridSettings,
    "sweeper/optuna": OptunaSettings,
}
"""Options of the groups of sweeps: each has a class of its own."""

CLASSES: dict[str, type[Settings]] = {
    "data": DataSettings,
    "distributed": DistributedSettings,
    "model": ModelSettings,
    "quantization": QuantizationSettings,
    "source": SourceSettings,
    "training": TrainingSettings,
}
"""Groups whose options are settings of a class; the other groups' name a `_target_`."""

GIVEN = {"model": ["model.path=m"], "data": []}


def name(path: Path) -> str:
    return path.relative_to(FOLDER).as_posix()


def entries(path: Path) -> dict[str, str]:
    """Group → option of a config's defaults list."""
    found = {}
    for entry in (yaml.safe_load(path.read_text()) or {}).get("defaults", []):
        if isinstance(entry, dict):
            found |= {str(k).removeprefix("override /"): str(v) for k, v in entry.items()}
    return found


def composed(command: str, *words: str) -> dict[str, Any]:
    """A command's config as plain values, with what must be given still missing."""
    return deepcopy(_composed(command, *words))


@cache
def _composed(command: str, *words: str) -> dict[str, Any]:
    from omegaconf import OmegaConf

    plain = OmegaConf.to_container(compose(command, list(words)), resolve=False)
    assert isinstance(plain, dict)
    return {str(k): v for k, v in plain.items()}


def test_every_group_belongs_to_a_command() -> None:
    known = {group for command in COMMANDS for group in entries(FOLDER / f"{command}.yaml")}
    assert {path.parent.name for path in FILES} == known


@pytest.mark.parametrize("path", FILES, ids=name)
def test_every_option_composes_in_every_command_that_has_its_group(path: Path) -> None:
    """Those that choose options of other groups in each command; of the others, which Hydra reads as they are wherever
    they are put, it is enough that they compose in one command, and the group's usual option in each."""
    group = path.parent.name
    commands = [c for c in COMMANDS if group in entries(FOLDER / f"{c}.yaml")]
    assert commands
    usual = [c for c in commands if entries(FOLDER / f"{c}.yaml")[group] == path.stem]
    for command in commands if entries(path) else dict.fromkeys([*usual, commands[0]]):
        assert set(composed(command, f"{group}={path.stem}")) >= set(composed(command)) - {group}


FULL = {
    "data": ["base"],
    "distributed": ["ddp"],
    "quantization": ["nf4", "int8"],
    "source": ["rollout"],
}
"""The options of a group that have all keys between them, where the default, for runs without the thing, leaves most
of them out."""


@pytest.mark.parametrize("group", CLASSES)
def test_an_option_of_each_group_has_every_key_and_the_default_one_the_class_s_values(group: str) -> None:
    """Every field has its line, and a run with the config alone is one with the class's own defaults."""
    kind = CLASSES[group]
    usual = entries(FOLDER / "train.yaml")[group]
    keys = [set(composed("train", f"{group}={option}")[group]) for option in FULL.get(group, [usual])]
    assert set.union(*keys) == set(kind.model_fields)
    found = composed("train", f"{group}={'base' if group == 'data' else usual}").get(group, {})
    required = {k for k, field in kind.model_fields.items() if field.is_required()}
    assert {k for k, v in found.items() if v == "???"} == required
    given = dict.fromkeys(required, "given")
    assert kind(**{**found, **given}) == kind(**given)


@pytest.mark.parametrize("path", [p for p in FILES if p.parent.name in CLASSES], ids=name)
def test_options_have_keys_of_the_class(path: Path) -> None:
    group = path.parent.name
    found = composed("train", f"{group}={path.stem}").get(group, {})
    assert set(found) <= set(CLASSES[group].model_fields)
    CLASSES[group](**{k: "given" if v == "???" else v for k, v in found.items()})


@pytest.mark.parametrize("option", SWEEPS)
def test_how_a_sweep_runs(option: str) -> None:
    group, name = option.split("/")
    found = composed("sweep", f"{group}={name}")[group]
    kind = SWEEPS[option]
    assert set(found) == set(kind.model_fields)
    stages = {"stages": {}} if "stages" in found else {}  # examples of what a comparison's parts need
    assert kind(**{**found, **stages}) == kind()


def test_the_commands_own_keys() -> None:
    for command, kind in (("evaluate", EvaluateSettings), ("sample", ProduceSettings)):
        found = {k: v for k, v in composed(command).items() if k in kind.model_fields}
        required = {k for k, field in kind.model_fields.items() if field.is_required()}
        assert set(found) == set(kind.model_fields)
        given = dict.fromkeys(required, "given")
        assert kind(**{**found, **given}) == kind(**given)
    sections = yaml.safe_load((FOLDER / "compare.yaml").read_text())["comparison"]
    assert set(sections) == set(ComparisonSettings.model_fields)
    assert Budget(**sections["budget"]) == Budget()
    assert Pairs(**sections["pairs"]) == Pairs()
    assert set(sections["budget"]) == set(Budget.model_fields)
    assert set(sections["pairs"]) == set(Pairs.model_fields)


@pytest.mark.parametrize(
    ("option", "kind"), [("local", LocalRollout), ("compiled", LocalRollout), ("vllm", VllmRollout)]
)
def test_an_engine_s_section_has_the_class_s_values(option: str, kind: type[Settings]) -> None:
    found = build(composed("train", f"rollout={option}")["rollout"], "rollout")
    assert found == kind(**({"compile": True} if option == "compiled" else {}))


def test_a_server_s_section_has_every_key() -> None:
    found = composed("train", "rollout=vllm")["rollout"]
    assert set(found["vllm"]) == set(VllmSettings.model_fields)
    assert set(found) == {"_target_", *VllmRollout.model_fields}


def targets(value: Any, where: str) -> list[tuple[str, dict[str, Any]]]:
    """Everything in a config that names a `_target_`."""
    if not isinstance(value, dict):
        return []
    found = [(where, value)] if value.get("_target_") else []
    return found + [t for k, v in value.items() for t in targets(v, f"{where}.{k}")]


TARGETS = [
    (name(p), where, values)
    for p in FILES
    for where, values in targets(yaml.safe_load(p.read_text()), p.parent.name)
    if values["_target_"] is not None
]


@pytest.mark.parametrize(("file", "where", "values"), TARGETS, ids=[f"{f}:{w}" for f, w, _ in TARGETS])
def test_keys_of_a_target_are_its_arguments_with_their_defaults(file: str, where: str, values: dict[str, Any]) -> None:
    found = {k: v for k, v in values.items() if k not in ("_target_", "defaults")}
    parameters = inspect.signature(locate(values["_target_"], where)).parameters
    assert set(found) <= set(parameters), f"{file}: no such argument"
    ours = values["_target_"].startswith("alignlab.")
    if where == "algorithm":
        assert set(found) == set(parameters), f"{file}: an algorithm's settings are all in its config"
    for key, value in found.items():
        default = parameters[key].default
        if ours and default is not inspect.Parameter.empty and file != "rollout/vllm.yaml":  # has a test of its own
            assert str(default) == "<factory>" or value == default, f"{file}: {key}"


@pytest.mark.parametrize("path", [*FILES, *FOLDER.glob("*.yaml")], ids=name)
def test_every_key_is_explained(path: Path) -> None:
    """By a comment on its line. Experiments give values to keys that are explained elsewhere."""
    if path.parent.name == "experiment":
        assert path.read_text().startswith("# @package _global_\n# "), "say what it is for"
        return
    inside_defaults = False
    for line in path.read_text().splitlines():
        if re.match(r"\S", line):
            inside_defaults = line.startswith("defaults:")
        key = re.match(r"\s*(\w+): *(\S.*)?$", line)
        if key is None or inside_defaults or key[1] == "_target_" or key[2] is None:
            continue
        assert re.search(r" # \w", line), f"{name(path)}: {line}"


def leaves(value: Any, key: str = "") -> list[str]:
    if isinstance(value, dict):  # a section without keys, of a thing that is not used, is no setting
        return [leaf for k, v in value.items() for leaf in leaves(v, f"{key}.{k}")]
    return [] if key.endswith("._target_") else [key]


@pytest.mark.parametrize("algorithm", sorted(p.stem for p in FOLDER.glob("algorithm/*.yaml")))
def test_a_run_has_fewer_than_a_hundred_settings(algorithm: str) -> None:
    samples = composed("train", f"algorithm={algorithm}")["source"]["kind"] == "rollout"
    scored = ["data=prompts", "scoring=reward_model", "scoring.path=r"] if samples else []
    settings = leaves(resolve(compose("train", [f"algorithm={algorithm}", "model.path=m", *scored])))
    assert len(settings) < 100, settings


RECIPES = sorted(p.stem for p in FOLDER.glob("recipe/*.yaml"))


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipe_is_a_run_that_the_command_line_can_still_change(recipe: str) -> None:
    given = ["scoring.path=r", "scoring.normalize_data.path=s"] if recipe != "none" else []
    config = resolve(compose("train", [f"recipe={recipe}", "model.path=m", "optimizer.lr=0.5", *given]))
    assert config["optimizer"]["lr"] == 0.5
    check(config)
    with_a_rule = ["scoring=function", "scoring.function.path=len"]
    assert "normalize" not in composed("train", f"recipe={recipe}", *with_a_rule)["scoring"]


def test_recipes_have_the_values_of_their_papers() -> None:
    """Huang et al. 2024, table of PPO's hyper-parameters; Ziegler et al. 2019, their launch.py."""
    for recipe, kl_coef, kl_target, lr in (("ppo_tldr", 0.05, None, 3e-6), ("ppo_2019", 0.15, 6.0, 1e-5)):
        found = composed("train", f"recipe={recipe}")
        assert found["scoring"]["normalize"] == {"ppo_tldr": "mean", "ppo_2019": "std"}[recipe]
        algorithm = {k: found["algorithm"][k] for k in ("clip", "value_weight", "gamma", "lam", "kl_coef", "kl_target")}
        assert list(algorithm.values()) == [0.2, 0.1, 1.0, 0.95, kl_coef, kl_target]
        assert (found["optimizer"]["lr"], found["optimizer"]["eps"]) == (lr, 1e-5)
        assert (found["source"]["kind"], found["source"]["ppo_epochs"], found["source"]["rollout_batch_size"]) == (
            "rollout",
            4,
            512,
        )
        assert (found["rollout"]["temperature"], found["algorithm"]["missing_eos_score"]) == (0.7, -1.0)
