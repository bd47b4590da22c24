"""The main job: from one base model to a leaderboard, here (`compare`) or as jobs of a cluster (`submit`).

data → SFT → preference pairs → reward model, further models → every algorithm × seeds → benchmark → leaderboard and
report. All algorithms start from the same SFT checkpoint, see the same prompts and pairs, and stop at the same budget.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from alignlab.benchmarks.evaluate import build_benchmark
from alignlab.build import section
from alignlab.comparison.collect import collect, is_current
from alignlab.comparison.graph.ledger import REPORT, refuse_if_queued
from alignlab.comparison.graph.local import execute
from alignlab.comparison.graph.node import Command, Node, is_planned, write_plan
from alignlab.comparison.graph.slurm import Slurm
from alignlab.comparison.planning import plan
from alignlab.comparison.settings import ComparisonSettings
from alignlab.core import AlignlabError
from alignlab.core.files import write_config
from alignlab.core.storage import storage_errors
from alignlab.launch.slurm.settings import SlurmSettings
from alignlab.training.callbacks.trackers import how_to_sync


def compare(config: dict[str, Any], out: Path, own: Path | None = None) -> int:
    """Run a comparison, write its leaderboard and report in `out`, print the leaderboard.

    Args:
        own: a folder of the user's configs, searched for those of the runs too.

    Returns:
        0, or 1 where parts failed; then the leaderboard is of those that did not.
    """
    settings, nodes = nodes_of(config, out, own)
    refuse_if_queued(out)
    _note(config, out)
    write_plan(out, nodes)
    failed = execute(nodes, settings.workers, settings.threads)
    runs = [n for n in nodes if n.name.startswith("runs/")]
    if all(n.name in failed for n in runs):
        name, reason = next(iter(failed.items()))
        raise AlignlabError(f"no run finished; the first failure: {name}: {reason}")
    collect(out).print()
    if config.get("tracker", {}).get("mode") == "offline":
        print(how_to_sync(out))
    for name, reason in failed.items():
        print(f"failed: {name}: {reason}")
    return 1 if failed else 0


def submit(config: dict[str, Any], out: Path, own: Path | None = None, dry_run: bool = False) -> None:
    """Hand a comparison to a Slurm cluster: each job starts when those whose results it reads went well. The same
    command again hands over what is neither done nor in the queue: what failed, what was cancelled, what is new.

    Args:
        own: a folder of the user's configs, searched for those of the runs too.
        dry_run: print the graph and the scripts instead; nothing is written or handed over.

    Raises:
        ConfigError: a setting is wrong, or a part is in the queue that was planned otherwise.
        AlignlabError: Slurm does not take a job. None was handed over, or the message says which were.
    """
    _, nodes = nodes_of(config, out, own)
    resources = section(SlurmSettings, config["launcher"], "launcher")
    board = Board(REPORT, out / REPORT, [Command("report", {"out": str(out)}, nodes)])
    slurm = Slurm(out, config["name"], [*nodes, board], resources)
    batches = slurm.batches()
    for note in slurm.notes():
        print(f"note: {note}", file=sys.stderr)
    if dry_run:
        slurm.show(batches)
        return
    slurm.probe(batches)
    _note({k: v for k, v in config.items() if k != "launcher"}, out)
    write_plan(out, nodes)
    slurm.hand_over(batches)
    print(f"alignlab status {out}    shows how it goes; logs are in {slurm.logs}")


class Board(Node):
    """Leaderboard and report of what has finished, where a cluster makes them."""

    @property
    def done(self) -> bool:
        out = self.folder.parent
        return is_planned(out, self.parents) and is_current(out)


def nodes_of(config: dict[str, Any], out: Path, own: Path | None) -> tuple[ComparisonSettings, Sequence[Node]]:
    """What a comparison's config says, and the parts that it consists of, all checked."""
    settings = section(ComparisonSettings, config["comparison"], "comparison")
    return settings, plan(config, settings, build_benchmark(config["benchmark"]), out, own)


def run_node(config: dict[str, Any], folder: Path) -> None:
    """The command `compare` of a graph, as a sweep has it.

    Raises:
        AlignlabError: parts of the comparison failed.
    """
    if compare(config["config"], folder, config["own"] and Path(config["own"])):
        raise AlignlabError("parts of the comparison failed: see the logs in its folder")


def _note(config: dict[str, Any], out: Path) -> None:
    with storage_errors(out, "the comparison could not be written"):
        out.mkdir(parents=True, exist_ok=True)
        write_config(out / "config.yaml", config)
