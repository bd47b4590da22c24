"""The runs of tests are those of the command line: their configs, composed in a quicker way, are the same."""

from __future__ import annotations

from pathlib import Path

import pytest

from alignlab.config import compose, resolve
from alignlab.core import ConfigError
from tests.training import runs

MORE = [
    [
        "adapter=lora",
        "adapter.dropout=0.2",
        "optimizer=adamw",
        "++source.ppo_epochs=2",
        "training.checkpoint_every=null",
    ],
    [
        "distributed=zero2",
        "source.ref_update_tau=0.5",
        "data.prompt_template=' z '",
        "training.max_tokens_per_microbatch=20",
    ],
    ["scoring.function.path=a.b", "adapter=lora", "adapter.targets=[q_proj,v_proj]"],
]


@pytest.mark.parametrize("algorithm", runs.ALGORITHMS)
def test_the_config_of_a_run_is_what_the_command_line_composes(tmp_path: Path, algorithm: str) -> None:
    words = runs.words_for(tmp_path, algorithm, "out", *MORE[0])
    assert runs.config_of(tmp_path, words) == resolve(compose("train", words))


@pytest.mark.parametrize("more", MORE[1:], ids=" ".join)
def test_so_it_is_for_values_of_every_kind(tmp_path: Path, more: list[str]) -> None:
    words = runs.words_for(tmp_path, "grpo", "out", *more)
    assert runs.config_of(tmp_path, words) == resolve(compose("train", words))


def test_a_mistake_is_told_as_on_the_command_line(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"training\.stepz: unknown key; did you mean 'steps'"):
        runs.config_of(tmp_path, runs.words_for(tmp_path, "sft", "out", "training.stepz=3"))
