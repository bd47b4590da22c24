"""The process that runs one node: `python -m alignlab.comparison.node FOLDER`. Its output is the node's log."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

from alignlab.core import AlignlabError, Interrupted
from alignlab.core.files import write_json
from alignlab.launch.environment import quiet
from alignlab.launch.start import Failed


def run(folder: Path) -> None:
    """Run the commands planned in the folder, in order, in this process."""
    for command, config in json.loads((folder / "node.json").read_text())["commands"]:
        run_command(command, config, folder)


def run_command(command: str, config: dict[str, Any], folder: Path) -> None:
    """Run one of a node's commands; what it returns goes to `COMMAND.json` where it keeps no file of its own."""
    if command == "train":
        from alignlab.launch.start import train
        from alignlab.training.run import RESULT

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
    elif command == "data":
        from alignlab.benchmarks.evaluate import build_benchmark

        benchmark = build_benchmark(config["benchmark"])
        benchmark.write_data(folder, config["model"])
    else:
        raise AlignlabError(f"{folder}: unknown command '{command}' in node.json")


def main() -> int:
    quiet()
    try:
        run(Path(sys.argv[1]))
    except Interrupted as stop:
        print(f"alignlab: {stop}", file=sys.stderr)
        return 143
    except Failed as failure:  # has been told
        return failure.status
    except AlignlabError as error:
        print(f"alignlab: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
