"""The main job: from one base model to a leaderboard.

data → SFT → preference pairs → reward model, further models → every algorithm × seeds → benchmark → leaderboard and
report. All algorithms start from the same SFT checkpoint, see the same prompts and pairs, and stop at the same budget.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from alignlab.benchmarks.evaluate import build_benchmark
from alignlab.comparison.collect import collect
from alignlab.comparison.execute import execute
from alignlab.comparison.graph import write_plan
from alignlab.comparison.ledger import refuse_if_queued
from alignlab.comparison.planning import plan
from alignlab.comparison.settings import ComparisonSettings
from alignlab.config import section
from alignlab.core import AlignlabError
from alignlab.core.files import write_text
from alignlab.core.storage import storage_errors
from alignlab.training.callbacks.trackers import how_to_sync


def compare(config: dict[str, Any], out: Path, own: Path | None = None) -> int:
    """Run a comparison, write its leaderboard and report in `out`, print the leaderboard.

    Args:
        own: a folder of the user's configs, searched for those of the runs too.

    Returns:
        0, or 1 where parts failed; then the leaderboard is of those that did not.
    """
    settings = section(ComparisonSettings, config["comparison"], "comparison")
    benchmark = build_benchmark(config["benchmark"])
    nodes = plan(config, settings, benchmark, out, own)
    refuse_if_queued(out)
    with storage_errors(out, "the comparison could not be written"):
        out.mkdir(parents=True, exist_ok=True)
        write_text(out / "config.yaml", yaml.safe_dump(config, sort_keys=False, allow_unicode=True))
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
