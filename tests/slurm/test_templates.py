"""Runs through the batch templates on a real Slurm: over nodes; stopped by time limits and preemption, and going on."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.slurm.conftest import Slurm, until
from tests.slurm.job import STEPS, Run
from tests.training import runs

STEPS_MANY = 20


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model and prompts for it."""
    folder = tmp_path_factory.mktemp("runs")
    runs.prepare(folder)
    return folder


@pytest.fixture(scope="module")
def undisturbed(base: Path) -> dict[str, torch.Tensor]:
    """The weights of the run on one process, without Slurm."""
    more = ["training.batch_size=4", "source.rollout_batch_size=4", f"training.steps={STEPS}", "training.progress=off"]
    runs.train(base, "rejection_sampling", "undisturbed", *more)
    return runs.weights(base, "undisturbed")


def over_nodes(slurm: Slurm, base: Path, name: str, mode: str) -> Run:
    more = [f"distributed={mode}", "distributed.timeout=60"]
    return Run(slurm, base, name, "many_nodes", *more, steps=STEPS_MANY)


NODES = ("--nodes=2", "--gres=gpu:2")
"""Two processes on each: as many as the GPUs that the job has there."""


@pytest.fixture(scope="module")
def ddp(slurm: Slurm, base: Path) -> Run:
    """A DDP run of two nodes with two processes each, finished."""
    run = over_nodes(slurm, base, "ddp", "ddp").submit(*NODES)
    run.finish()
    return run


@pytest.fixture(scope="module")
def zero2(slurm: Slurm, base: Path) -> Run:
    """The same with ZeRO-2."""
    run = over_nodes(slurm, base, "zero2", "zero2").submit(*NODES)
    run.finish()
    return run


@pytest.mark.component
@pytest.mark.parametrize(("mode", "engine"), [("ddp", "DistributedDataParallel"), ("zero2", "DeepSpeed ZeRO-2")])
def test_two_nodes_with_two_processes_each(
    request: pytest.FixtureRequest, base: Path, undisturbed: dict[str, torch.Tensor], mode: str, engine: str
) -> None:
    run: Run = request.getfixturevalue(mode)
    assert run.result()["processes"] == 4 and run.result()["engine"] == engine
    assert run.seen() == {0: ("node1", 4), 1: ("node1", 4), 2: ("node2", 4), 3: ("node2", 4)}
    # Four processes add up losses and gradients in another order than one: float32's rounding (6e-8), over 20 steps of
    # SGD with momentum 0.9 that each build on the one before, stays under 1e-4.
    one, many = (runs.metrics(base, name)[:STEPS_MANY] for name in ("undisturbed", mode))
    assert [m["loss"] for m in many] == pytest.approx([m["loss"] for m in one], rel=1e-4)


@pytest.mark.component
def test_a_time_limit(slurm: Slurm, base: Path, undisturbed: dict[str, torch.Tensor]) -> None:
    """The run is told before its limit of one minute, saves, is queued again, and ends as if nothing had happened."""
    run = Run(slurm, base, "limit", "one_gpu").submit("--gres=gpu:1", "--time=1", "--signal=B:USR1@15", seconds=0.1)
    run.reach(3)
    until(lambda: slurm.show(run.job)["Restarts"] == "1", 90, run.said)
    slurm.run("scontrol", "update", f"jobid={run.job}", "timelimit=10")  # once is enough
    run.finish()
    run.stopped_once("SIGUSR1")
    assert runs.identical(undisturbed, run.weights())


@pytest.mark.component
def test_a_preemption(slurm: Slurm, base: Path, undisturbed: dict[str, torch.Tensor]) -> None:
    """A job of higher priority takes the node: the run saves within the step, waits, and goes on. Here Slurm tells the
    step, not the script, as on clusters where nothing else is said."""
    with slurm.configured(SlurmctldParameters=""):
        run = Run(slurm, base, "preempted", "one_gpu")
        run.submit("--gres=gpu:1", "--nodelist=node1", seconds=0.05).reach(3)
        urgent = slurm.preempt(["node1"])
        # The run leaves before it has to: its history says REQUEUED, not PREEMPTED.
        assert slurm.wait(urgent, timeout=60) == "COMPLETED"
        run.finish()
    run.stopped_once("SIGTERM")
    assert runs.identical(undisturbed, run.weights())


@pytest.mark.component
def test_a_preemption_of_processes_that_alignlab_started(
    slurm: Slurm, base: Path, undisturbed: dict[str, torch.Tensor]
) -> None:
    """The script is told, as on clusters with preempt_send_user_signal."""
    more = ("distributed=ddp", "distributed.processes=2", "distributed.timeout=60")
    run = Run(slurm, base, "preempted-node", "one_node", *more, steps=STEPS_MANY)
    run.submit("--gres=gpu:2", "--nodelist=node1", seconds=0.1).reach(3)
    urgent = slurm.preempt(["node1"])
    assert slurm.wait(urgent, timeout=60) == "COMPLETED"
    run.finish()
    run.stopped_once("SIGUSR1")
    assert run.result()["processes"] == 2
    one, two = (runs.metrics(base, name)[:STEPS_MANY] for name in ("undisturbed", run.name))
    assert [m["loss"] for m in two] == pytest.approx([m["loss"] for m in one], rel=1e-4)  # as over nodes, above


@pytest.mark.component
@pytest.mark.parametrize("told", [True, False], ids=["told by USR1", "told by TERM"])
def test_a_preemption_of_many_nodes(slurm: Slurm, base: Path, ddp: Run, told: bool) -> None:
    """All processes on all nodes save together, though only one node is taken; torchrun does not end them first."""
    with slurm.configured(SlurmctldParameters="preempt_send_user_signal" if told else ""):
        run = over_nodes(slurm, base, f"nodes-preempted-{told}", "ddp").submit(*NODES, seconds=0.1)
        run.reach(3)
        urgent = slurm.preempt(["node2"])
        assert slurm.wait(urgent, timeout=60) == "COMPLETED"
        run.finish()
    run.stopped_once("SIGUSR1" if told else "SIGTERM")
    assert runs.identical(ddp.weights(), run.weights())
