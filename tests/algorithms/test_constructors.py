"""Every algorithm can be made directly, with the values of its config as defaults, and refuses impossible ones."""

from __future__ import annotations

import importlib
import inspect
import math
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest
import yaml

import alignlab
from alignlab.config import config_folder
from alignlab.core import Algorithm, ConfigError, require_choice

CONFIGS = sorted((config_folder() / "algorithm").glob("*.yaml"))


def read(path: Path) -> tuple[type[Algorithm], dict[str, Any]]:
    """The class that a config names, and the config's other values."""
    values = yaml.safe_load(path.read_text())
    values.pop("defaults", None)  # that it samples
    module, _, name = values.pop("_target_").rpartition(".")
    return getattr(importlib.import_module(module), name), values


KINDS = [read(path)[0] for path in CONFIGS]

OUT_OF_RANGE = {
    "aggregation": "batch", "baseline": None, "beta": 0.0, "center": -1.0, "clip": 1.0, "critic": "none", "delta": -1.0,
    "entropy_weight": -1.0, "gamma": -1.0, "keep": 0, "kl_coef": -0.1, "kl_estimator": "k4",
    "kl_horizon": 0, "kl_target": 0.0, "value_clip": 0.0,
    "label_smoothing": 0.5, "lam": 1.1, "length_penalty": -1.0, "lm_weight": -1.0, "margin": -1.0, "max_length": 3,
    "mean_over": "groups", "minimum": None, "missing_eos_score": None, "neutral": "yes", "normalize": None,
    "ratio_weight": 0.0, "rewards": "none", "separator": None, "sft_weight": -1.0, "supervise": "none",
    "target": "worst", "target_kl": 0.0, "threshold": None, "value_weight": -1.0, "weight_desirable": 0.0,
    "weight_undesirable": 0.0, "whiten_rewards": None,
}  # fmt: skip
"""A value that each argument refuses; None: there is no range (any number, a switch, or a text)."""

REFUSED = [
    (kind, name) for kind in KINDS for name in inspect.signature(kind).parameters if OUT_OF_RANGE[name] is not None
]


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_defaults_equal_the_values_of_the_config(path: Path) -> None:
    kind, values = read(path)
    assert {name: p.default for name, p in inspect.signature(kind).parameters.items()} == values


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_the_public_api_has_the_class_of_every_config(kind: type[Algorithm]) -> None:
    assert getattr(alignlab, kind.__name__) is kind
    assert kind.__name__ in alignlab.__all__


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_every_argument_can_be_given_by_keyword_and_is_documented(kind: type[Algorithm]) -> None:
    parameters = inspect.signature(kind).parameters
    assert isinstance(kind(**{name: p.default for name, p in parameters.items()}), Algorithm)
    assert kind.__doc__ is not None
    described = kind.__doc__.partition("Args:")[2]
    assert [name for name in parameters if f"\n        {name}: " not in described] == []


@pytest.mark.parametrize(("kind", "name"), REFUSED, ids=lambda value: getattr(value, "__name__", value))
def test_a_value_out_of_range_is_refused_by_name(kind: type[Algorithm], name: str) -> None:
    with pytest.raises(ConfigError, match=rf"^algorithm\.{name}="):
        kind(**{name: OUT_OF_RANGE[name]})


@pytest.mark.parametrize(("kind", "name"), REFUSED, ids=lambda value: getattr(value, "__name__", value))
def test_not_a_number_is_refused_by_name(kind: type[Algorithm], name: str) -> None:
    if float in (hint := get_type_hints(kind.__init__)[name], *get_args(hint)):
        with pytest.raises(ConfigError, match=rf"^algorithm\.{name}=nan"):
            kind(**{name: math.nan})


def test_an_algorithm_says_that_it_corrects_off_policy_samples_if_and_only_if_its_loss_weighs_them() -> None:
    weighing = {kind for kind in KINDS if "weighted(" in inspect.getsource(kind)}
    assert {kind.__name__ for kind in weighing} == {"PPO", "GRPO", "RLOO", "ReinforcePP"}
    assert weighing == {kind for kind in KINDS if kind.off_policy_correction}


def test_a_choice_is_refused_with_those_there_are() -> None:
    require_choice("algorithm.critic", "own", ("shared", "own"))
    with pytest.raises(ConfigError, match=r"^algorithm\.critic='owm': must be 'shared' or 'own'$"):
        require_choice("algorithm.critic", "owm", ("shared", "own"))
    with pytest.raises(ConfigError, match=r"must be 'a', 'b' or 'c'$"):
        require_choice("key", "d", ("a", "b", "c"))
