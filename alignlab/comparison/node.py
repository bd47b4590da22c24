"""What a process does that runs one node, or some of its commands: `alignlab node FOLDER [COMMAND ...]`."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from alignlab.comparison.graph import PLAN, finish
from alignlab.core import AlignlabError, ConfigError
from alignlab.core.files import write_json


def run(folder: Path, only: Sequence[str] = ()) -> None:
    """Run the commands planned in a folder, in order, in this process.

    Args:
        only: names of the commands to be run; all where empty. With the last one the node is done.

    Raises:
        AlignlabError: there is no plan, or it cannot be carried out.
    """
    try:
        plan = json.loads((folder / PLAN).read_text())
    except (OSError, ValueError) as error:
        raise ConfigError(f"node: {folder}: holds no part of a comparison: {error}") from error
    started = time.monotonic()
    wanted = [(name, config) for name, config in plan["commands"] if not only or name in only]
    for name, config in wanted:
        run_command(name, config, folder)
    last = bool(wanted) and wanted[-1][0] == plan["commands"][-1][0]
    if last and os.environ.get("RANK", "0") == "0":
        finish(folder, time.monotonic() - started)


def run_command(command: str, config: dict[str, Any], folder: Path) -> None:
    """Run one of a node's commands; what it returns goes to `COMMAND.json` where it keeps no file of its own."""
    if command == "train":
        from alignlab.launch.start import train
        from alignlab.training.run_folder import RESULT

        if not (folder / RESULT).exists():  # trained, but stopped before it was measured
            train(config, folder)
    elif command == "sample":
        from alignlab.rollout.produce import produce

        write_json(folder / "result.json", produce(config, folder))
    elif command == "evaluate":
        from alignlab.benchmarks.evaluate import evaluate

        started = time.monotonic()
        found = evaluate(config)
        print(f"evaluated in {time.monotonic() - started:.1f} s: reward {found.get('reward')}, kl {found.get('kl')}")
    elif command in ("base", "data"):
        from alignlab.benchmarks.evaluate import build_benchmark

        benchmark = build_benchmark(config["benchmark"])
        if command == "base":
            print(f"base model: {benchmark.base_model()}")
        else:
            benchmark.write_data(folder, config["model"])
    else:
        raise AlignlabError(f"{folder}: unknown command '{command}' in node.json")
