"""What a process does that runs one node, or some of its commands: `alignlab node FOLDER [COMMAND ...]`."""

from __future__ import annotations

import os
import signal
import sys
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from alignlab.build import locate
from alignlab.comparison.graph.node import LOG, PLAN, fail, finish, last_words, read
from alignlab.config import read_yaml
from alignlab.core import AlignlabError, ConfigError, Interrupted, StartAgain
from alignlab.core.files import read_json, write_json
from alignlab.core.parts import calling
from alignlab.core.secrets import notice, take_back
from alignlab.launch.start import HANDLED, Failed
from alignlab.training.callbacks.pruning import PRUNED
from alignlab.training.run_folder import RESULT, fingerprint

ACTIONS = {
    **{name: f"alignlab.comparison.graph.work.{name}" for name in ("base", "data", "train", "sample", "evaluate")},
    "compare": "alignlab.comparison.compare.run_node",
    "report": "alignlab.comparison.collect.run_node",
}
"""Name of a command → the function that does it, called with its config and the node's folder. By name, for the graph
knows nothing of what is built on it."""


def run(folder: Path, only: Sequence[str] = (), log: Path | None = None, queued_again: bool = False) -> int:
    """Run the commands planned in a folder, in order, in this process.

    Args:
        only: names of the commands to be run; all where empty. With the last one the node is done.
        log: where this process writes; by default the folder's `log.txt`.
        queued_again: it goes on, though it was to be started anew: that was before it was stopped.

    Returns:
        The exit status. What failed is said in one line, and noted in the folder.

    Raises:
        ConfigError: there is no plan.
        Interrupted: asked to stop, with a checkpoint saved.
        StartAgain: the same command started again can go on.
    """
    log = log or folder / LOG
    plan = read_json(folder / PLAN, "it holds no part of a comparison or sweep", {"key": str, "commands": list})
    plan["commands"] = take_back(plan["commands"], str(folder / PLAN))
    for _, config in plan["commands"]:
        notice(config)
    started = time.monotonic()
    wanted = [(name, config) for name, config in plan["commands"] if not only or name in only]
    is_main = os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")) == "0"
    try:
        for name, config in wanted:
            if name not in ACTIONS:
                raise AlignlabError(f"{folder}: unknown command '{name}' in {PLAN}")
            if queued_again and name == "train":
                resume = config["training"]["resume"]
                config["training"]["resume"] = "auto" if resume == "never" else resume
            run_command(name, config, folder)
    except (Interrupted, StartAgain):
        raise
    except Failed as failure:  # one of its processes, which has said why
        if failure.status - 128 in HANDLED:
            raise Interrupted(signal.Signals(failure.status - 128).name, "a checkpoint is saved") from failure
        sys.stderr.flush()
        status, reason = failure.status, last_words(log) or str(failure)
    except AlignlabError as error:
        status, reason = error.status, str(error)
        print(f"alignlab: {error}", file=sys.stderr, flush=True)
    except Exception as error:  # a fault of ours, or of a class of the user's
        traceback.print_exc()
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        status, reason = 1, f"{type(error).__name__}: {lines[0] if lines else '?'}"
        print(f"alignlab: {reason}", file=sys.stderr, flush=True)
    else:
        if is_main and wanted and wanted[-1][0] == plan["commands"][-1][0]:
            finish(folder, time.monotonic() - started)
        return 0
    if is_main:
        fail(folder, plan["key"], reason, log)
    return status


def run_command(name: str, config: dict[str, Any], folder: Path) -> None:
    locate(ACTIONS[name], name)(config, folder)


# ------------------------------------------------------------------ the commands


def base(config: dict[str, Any], folder: Path) -> None:
    """Make the base model that a benchmark brings along."""
    from alignlab.benchmarks.evaluate import build_benchmark

    benchmark = build_benchmark(config["benchmark"])
    with calling(benchmark, "base_model"):
        print(f"base model: {benchmark.base_model()}")


def data(config: dict[str, Any], folder: Path) -> None:
    """Write a benchmark's files."""
    from alignlab.benchmarks.evaluate import build_benchmark

    benchmark = build_benchmark(config["benchmark"])
    with calling(benchmark, "write_data"):
        benchmark.write_data(folder, config["model"])


def train(config: dict[str, Any], folder: Path) -> None:
    """Train, unless that has been done: a run may have been stopped before it was measured."""
    from alignlab.launch import start

    if not is_over(config, folder):
        start.train(config, folder)


def sample(config: dict[str, Any], folder: Path) -> None:
    """Draw responses."""
    from alignlab.rollout.produce import produce

    write_json(folder / RESULT, produce(config, folder))


def evaluate(config: dict[str, Any], folder: Path) -> None:
    """Measure a policy."""
    from alignlab.benchmarks.evaluate import evaluate as measure

    started = time.monotonic()
    found = measure(config)
    print(f"evaluated in {time.monotonic() - started:.1f} s: reward {found.get('reward')}, kl {found.get('kl')}")


def is_over(config: dict[str, Any], folder: Path) -> bool:
    """Whether a training run with these settings has been finished, or pruned, in a folder."""
    if config["training"]["resume"] == "never" or not any(read(folder / name) for name in (RESULT, PRUNED)):
        return False
    try:
        return fingerprint(read_yaml(folder / "config.yaml")) == fingerprint(config)
    except ConfigError:  # the run will say so
        return False
