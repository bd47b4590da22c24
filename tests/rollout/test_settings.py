"""The config file and the settings class say the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import ValidationError

from alignlab.rollout import LocalRollout

FILE = Path(__file__).parents[2] / "configs" / "rollout" / "local.yaml"


def test_config_file_holds_every_setting_with_its_default_and_meaning() -> None:
    values = yaml.safe_load(FILE.read_text())
    assert values.pop("_target_") == "alignlab.rollout.LocalRollout"
    assert values == LocalRollout().model_dump(exclude={"compile"})  # in another file of the group
    assert LocalRollout(**values) == LocalRollout()
    for line in FILE.read_text().splitlines()[1:]:
        assert len(line.partition("# ")[2]) > 20, f"no meaning: {line}"


@pytest.mark.parametrize(
    "wrong",
    [
        {"temperature": -0.1},
        {"temperature": float("inf")},
        {"top_k": -1},
        {"top_p": 0.0},
        {"top_p": 1.1},
        {"min_p": 1.1},
        {"max_new_tokens": 0},
        {"max_batch_tokens": 0},
        {"stop": [""]},
        {"min_new_tokens": 9, "max_new_tokens": 8},
        {"temprature": 1.0},
    ],
)
def test_impossible_values_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        LocalRollout(**wrong)
