"""`alignlab train -m …` and `alignlab compare -m …`."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from alignlab.comparison.graph.node import Node
from alignlab.comparison.report import format_number
from alignlab.core import AlignlabError, Interrupted
from alignlab.core.progress import progress
from alignlab.sweeps import results
from alignlab.sweeps.combinations import Composer
from alignlab.sweeps.launch import Launch
from alignlab.sweeps.settings import OptunaSettings, chosen


def sweep(command: str, overrides: Sequence[str], own: Path | None) -> int:
    """Run every combination, or a search; print what they have come to.

    Args:
        command: train or compare.
        own: a folder of the user's configs.

    Returns:
        0, or 1 where a run failed; the others have gone on.

    Raises:
        ConfigError: an override is wrong.
        Interrupted: asked to stop; the same command goes on.
    """
    launcher, sweeper, overrides = chosen(overrides, own)
    runs = Composer(command, overrides, own)
    metric = sweeper.metric

    def describe(node: Node) -> str:
        found = results.metrics_of(command, node.folder)
        try:
            name = results.chosen_metric([found], metric)
        except AlignlabError as error:  # the others may have it; at the end it counts
            return f"note: {error}"
        measured = f"{name} {format_number(found[name], 4)}" if name else "nothing was measured"
        return f"{results.state_of(command, node.folder, node.key).state}: {measured}"

    launch = Launch(runs, launcher, describe)
    try:
        if isinstance(sweeper, OptunaSettings):
            from alignlab.sweeps.search import Search

            search = Search(runs, sweeper)
            metric = search.metric
            search.run(launch)
        else:
            every = list(runs.grid())
            combinations = [runs.combination(v) for v in progress(every, "composing the runs", len(every))]
            results.note(runs.folder, command, own, sweeper, combinations)
            launch(combinations)
    except Interrupted:
        with suppress(AlignlabError):  # there may be nothing yet; that it was stopped is what is to be told
            results.gather(runs.folder)
        raise
    found = results.gather(runs.folder)
    results.show(found)
    return 0 if all(run.state in ("finished", "pruned") for run in found.runs) else 1
