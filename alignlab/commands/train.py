"""one training run:  alignlab train algorithm=dpo model=PATH data=preferences data.path=FILE"""

from __future__ import annotations

import os
import sys
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
        ended = f" ({result['ended_by']})" if result.get("ended_by") else ""
        where = config["out"] if result.get("pruned") else f"{config['out']}/model"
        print(f"{told}: {result['step']} steps{ended}, {tokens}, {result['seconds']:.1f} s → {where}")
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
    config = given.config("train")
    if config is not None and not any(word.lstrip("+").startswith("distributed") for word in given.overrides):
        _join_launcher(config)
    return config


def _join_launcher(config: dict[str, Any]) -> None:
    """Under a launcher of several processes the default, distributed=single, becomes ddp: one run, not one of each."""
    from alignlab.training.distributed.processes import launched

    count = launched() or 1
    if count > 1 and (config.get("distributed") or {}).get("mode", "single") == "single":
        config["distributed"] = {**(config.get("distributed") or {}), "mode": "ddp"}
        if os.environ.get("RANK", "0") == "0":
            print(f"note: {count} processes were started: distributed=ddp, unless you give another", file=sys.stderr)
