"""one training run:  alignlab train algorithm=dpo model=PATH data=preferences data.path=FILE"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from alignlab.commands import COMPOSING, Arguments, out_folder, parse


def run(arguments: Sequence[str]) -> int:
    """Train, or with --multirun every combination. `--from=FILE` takes a run's saved config instead of overrides."""
    given = parse(arguments, *COMPOSING, "--multirun", "--from")
    if "--multirun" in given.options:
        return given.sweep("train")
    config = _config(given)
    if config is None:
        return 0
    from alignlab.launch.start import Failed, train

    try:
        result = train(config, out_folder(config))
    except Failed as failure:  # has been told
        return failure.status
    if result is not None and os.environ.get("RANK", "0") == "0":
        tokens = f"{result['trained_tokens']:,} tokens trained, {result['generated_tokens']:,} sampled"
        told = "pruned" if result.get("pruned") else "already done" if result.get("already_done") else "done"
        where = config["out"] if result.get("pruned") else f"{config['out']}/model"
        print(f"{told}: {result['step']} steps, {tokens}, {result['seconds']:.1f} s → {where}")
    return 0


def _config(given: Arguments) -> dict[str, Any] | None:
    from alignlab.config import read_saved
    from alignlab.core.errors import ConfigError
    from alignlab.sweeps.settings import refuse

    if "--from" in given.options:
        for argument in [*given.overrides, *(given.options.keys() - {"--from"})]:
            raise ConfigError(f"{argument}: not with --from, which takes the config as it was saved")
        return read_saved(Path(given.options["--from"]))
    refuse(given.overrides)
    return given.config("train")
