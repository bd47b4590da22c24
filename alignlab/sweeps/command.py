"""`alignlab train -m …` and `alignlab compare -m …`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from alignlab.comparison.metrics import format_number
from alignlab.core import AlignlabError
from alignlab.core.progress import progress
from alignlab.sweeps import results
from alignlab.sweeps.combinations import Composer, composer
from alignlab.sweeps.job import Stopped
from alignlab.sweeps.launch import Launch, hydra_words
from alignlab.sweeps.settings import OptunaSettings, chosen
from alignlab.sweeps.state import figures


def sweep(command: str, words: Sequence[str], own: Path | None) -> int:
    """Run every combination, or a search; print what they have come to.

    Args:
        command: train or compare.
        own: a folder of the user's configs.

    Returns:
        0, or 1 where a run failed; the others have gone on.

    Raises:
        ConfigError: a word is wrong.
        Interrupted: asked to stop; the same command goes on.
    """
    launcher, sweeper, words = chosen(words, own)
    with composer(command, words, own, hydra_words(launcher)) as hydra:
        metric = sweeper.metric

        def describe(folder: Path) -> str:
            found = figures(command, folder)
            try:
                name = results.chosen_metric([found], metric)
            except AlignlabError as error:  # the others may have it; at the end it counts
                return f"note: {error}"
            return f"{name} {format_number(found[name], 4)}" if name else "nothing was measured"

        launch = Launch(hydra, launcher, describe)
        try:
            if isinstance(sweeper, OptunaSettings):
                from alignlab.sweeps.search import Search

                search = Search(hydra, sweeper)
                metric = search.metric
                search.run(launch)
            else:
                every = list(hydra.grid())
                combinations = [hydra.combination(v) for v in progress(every, "composing the runs", len(every))]
                results.note(hydra.folder, command, own, sweeper, combinations)
                launch(combinations)
        except Stopped as stopped:
            _gather(hydra)
            raise stopped.stop from stopped
        found = results.gather(hydra.folder)
    results.show(found)
    return 0 if all(run.state in ("finished", "pruned") for run in found.runs) else 1


def _gather(hydra: Composer) -> None:
    """Of a sweep that was stopped: what there is goes to its files."""
    try:
        results.gather(hydra.folder)
    except AlignlabError:  # there may be nothing yet; that it was stopped is what is to be told
        return
