"""configs/data says what DataSettings says."""

import re
from pathlib import Path

import pytest
import yaml
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from alignlab.data import DataSettings
from alignlab.data.formats import FORMATS

FOLDER = Path(__file__).parents[2] / "configs" / "data"
VARIANTS = sorted(FORMATS)


def composed(*overrides):
    with initialize_config_dir(str(FOLDER.parent), version_base=None):
        return OmegaConf.to_container(compose(overrides=list(overrides)))["data"]


def test_the_base_holds_every_setting_with_its_default():
    assert composed("+data=base") == DataSettings().model_dump()


@pytest.mark.parametrize("name", VARIANTS)
def test_a_variant_is_the_base_with_a_parser(name):
    settings = composed(f"+data={name}", "data.path=my.jsonl", "data.validation=0.1")
    assert DataSettings(**settings) == DataSettings(path="my.jsonl", parser=name, validation=0.1)
    assert (set(settings) == set(DataSettings.model_fields)) == (name != "prompts"), "prompts have no responses to set"


def test_prompts_explain_what_they_have_as_the_base_does():
    """The lines stand there twice: a key's meaning is the same, but for what responses have to do with it."""
    base, prompts = (yaml.safe_load((FOLDER / f"{name}.yaml").read_text()) for name in ("base", "prompts"))
    assert {k: v for k, v in prompts.items() if k != "parser"} == {k: base[k] for k in prompts if k != "parser"}


def test_no_other_files():
    assert sorted(path.stem for path in FOLDER.glob("*.yaml")) == ["base", *VARIANTS]


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.yaml")), ids=lambda path: path.stem)
def test_each_setting_is_explained(path):
    for line in path.read_text().splitlines():
        if re.match(r"\w+:", line) and line != "defaults:":
            assert re.search(r" # \w", line), line
