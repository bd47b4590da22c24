"""The runs of a sweep as a graph of nodes that wait for nothing, seen to their end by one of the graph's executors."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from alignlab.comparison.graph.ledger import refuse_if_queued
from alignlab.comparison.graph.local import Count, Describe, execute, say
from alignlab.comparison.graph.node import fail, finish
from alignlab.comparison.graph.slurm import Slurm
from alignlab.comparison.graph.wait import wait
from alignlab.comparison.graph.work import is_over
from alignlab.core import ConfigError
from alignlab.core.progress import progress
from alignlab.launch.slurm import commands
from alignlab.launch.slurm.settings import SlurmSettings
from alignlab.sweeps.combinations import Combination, Composer
from alignlab.sweeps.settings import Launcher


class Launch:
    """Called with combinations, sees each to its end.

    Args:
        describe: what is said of a run that is done.
    """

    def __init__(self, composer: Composer, settings: Launcher, describe: Describe) -> None:
        self.composer, self.settings, self.describe = composer, settings, describe
        if isinstance(settings, SlurmSettings):
            commands.require()
            if composer.command == "compare" and settings.nodes > 1:
                raise ConfigError(
                    f"launcher.nodes={settings.nodes}: a comparison runs on one node; for more: alignlab submit"
                )

    def __call__(
        self,
        combinations: Sequence[Combination],
        prepare: Callable[[Combination], None] | None = None,
        before: int = 0,
        total: int | None = None,
    ) -> None:
        """
        Args:
            prepare: called before a run is launched, once its folder is there.
            before: how many there have been already, of a search.
            total: how many there are to be in all; by default, those that are not done.

        Raises:
            Interrupted: asked to stop; what runs here has saved, what Slurm has goes on.
            ConfigError: another launcher's jobs are at work on one of them.
        """
        out = self.composer.folder
        left = self._left(combinations)
        if not isinstance(self.settings, SlurmSettings):
            refuse_if_queued(out, [c.name for c in combinations])
        for combination in left:
            combination.folder.mkdir(parents=True, exist_ok=True)
            if prepare is not None:
                prepare(combination)
        nodes = [c.node for c in left]
        count = Count(total or len(nodes), before)
        if not nodes:
            return
        if isinstance(self.settings, SlurmSettings):
            slurm = Slurm(out, out.resolve().name, nodes, self.settings, is_all=False)
            batches = slurm.batches()
            slurm.probe(batches)
            slurm.hand_over(batches)
            wait(out, nodes, self.describe, count)
        else:
            execute(nodes, self.settings.n_jobs, describe=self.describe, count=count)

    def _left(self, combinations: Sequence[Combination]) -> list[Combination]:
        """Those that are not done. What cannot be right is noted as failed at once."""
        from alignlab.training.run_config import check

        left = []
        for combination in progress(combinations, "looking for what is finished", len(combinations)):
            node = combination.node
            if node.done:
                continue
            try:
                if self.composer.command == "train":
                    if is_over(combination.config, node.folder):  # by hand, or with an earlier version
                        node.begin()
                        finish(node.folder, 0.0)
                        continue
                    check(combination.config)
                left.append(combination)
            except ConfigError as error:
                fail(node.folder, node.key, str(error))
                say(f"{node.name}: FAILED: {error}", style="red")
        finished = sum(c.node.done for c in combinations)
        if finished:
            say(f"{finished} of {len(combinations)} runs are already finished")
        return left
