"""Which processes a run is one of, and that nothing else is taken for them."""

from __future__ import annotations

import ctypes
import gc
import json
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import accelerate
import pytest
import torch
from accelerate.state import DistributedType, PartialState

from alignlab.cli import main
from alignlab.core import ConfigError
from alignlab.core.children import end_within
from alignlab.launch import start
from alignlab.training.distributed.processes import WRAPPERS, Processes, launched, leave
from alignlab.training.settings import DistributedSettings
from alignlab.training.trainer import Trainer
from tests.launch import forked
from tests.training import forks, runs

VARIABLES = (
    "WORLD_SIZE",
    "RANK",
    "LOCAL_RANK",
    "SLURM_STEP_NUM_TASKS",
    "ACCELERATE_USE_DEEPSPEED",
    "ACCELERATE_USE_FSDP",
)


@pytest.fixture(autouse=True)
def _nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)


def settings(**values: object) -> DistributedSettings:
    return DistributedSettings.model_validate(values)


def test_nobody_started_us() -> None:
    assert launched({}) is None


def test_torchrun_started_us() -> None:
    assert launched({"WORLD_SIZE": "4", "RANK": "1"}) == 4


def test_srun_started_us() -> None:
    """The variables of a step of two nodes with two tasks each, as Slurm sets them."""
    environment = {
        "SLURM_STEP_NUM_TASKS": "4",
        "SLURM_PROCID": "3",
        "SLURM_LOCALID": "1",
        "SLURM_STEP_TASKS_PER_NODE": "2(x2)",
        "SLURM_JOB_ID": "77",
        "MASTER_ADDR": "node1",
    }
    assert launched(environment) == 4
    assert {k: environment[k] for k in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")} == {
        "RANK": "3",
        "WORLD_SIZE": "4",
        "LOCAL_RANK": "1",
        "LOCAL_WORLD_SIZE": "2",
    }
    assert environment["MASTER_PORT"] == "15077"


def test_a_batch_script_without_srun_is_one_process() -> None:
    """Slurm tells it of all the job's tasks, of which it is none."""
    assert launched({"SLURM_NTASKS": "4", "SLURM_PROCID": "0", "SLURM_JOB_ID": "77"}) is None


@pytest.mark.parametrize(
    ("started", "wanted", "message"),
    [
        ({"WORLD_SIZE": "2"}, {"mode": "single"}, "distributed=single: started as one of 2 processes: choose ddp"),
        ({}, {"mode": "ddp"}, "distributed=ddp: no processes were started: use distributed.processes=N, torchrun"),
        ({"WORLD_SIZE": "1"}, {"mode": "fsdp"}, "distributed=fsdp: one process was started"),
        ({"WORLD_SIZE": "2"}, {"mode": "ddp", "processes": 4}, "distributed.processes=4: the launcher started 2"),
        (
            {"WORLD_SIZE": "2", "ACCELERATE_USE_DEEPSPEED": "true"},
            {"mode": "ddp"},
            "distributed=ddp: accelerate was told ACCELERATE_USE_DEEPSPEED=true: choose one",
        ),
    ],
)
def test_what_was_started_must_be_what_was_asked_for(
    started: dict, wanted: dict, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in started.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=message):
        Processes("no", settings(**wanted))


def test_on_gpus_objects_go_over_gloo(monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch sends objects over the backend of "cpu" where a group has one; Accelerate takes the name as it is."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_RANK", "0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    asked = []

    def accelerator(kwargs_handlers: list[Any], **_options: Any) -> Any:
        asked.append(kwargs_handlers[0].to_kwargs()["backend"])
        return SimpleNamespace(process_index=0, num_processes=2, device=torch.device("cuda", 0))

    monkeypatch.setattr(accelerate, "Accelerator", accelerator)
    Processes("no", settings(mode="ddp"))
    map_of = torch.distributed.distributed_c10d.BackendConfig(torch.distributed.Backend(asked[0]))
    assert map_of.get_device_backend_map() == {"cpu": "gloo", "cuda": "nccl"}
    taken, kind = PartialState._prepare_backend(PartialState.__new__(PartialState), cpu=False, backend=asked[0])
    assert (taken, kind) == (asked[0], DistributedType.MULTI_GPU)


def test_what_holds_on_to_the_group_goes_before_it(tmp_path: Path) -> None:
    """Exchanges that are still going on need Python's lock when they end. A reducer that is freed after the group waits
    for them while it holds that lock: without the right order every one of these processes hangs."""
    runs.prepare(tmp_path)
    run, kept = Trainer.run, []

    def keeping(self: Trainer) -> Any:
        kept.append(self.engine.module)
        return run(self)

    def act() -> None:
        Trainer.run = keeping  # type: ignore[method-assign]
        runs.train(tmp_path, "sft", "run", "distributed=ddp", "training.steps=1", "training.progress=off")
        assert kept[0] in WRAPPERS and kept[0].reducer is not None
        torch.distributed.barrier()
        for _ in range(8):
            torch.distributed.all_reduce(torch.zeros(4_000_000), async_op=True)
        leave()
        kept.clear()
        gc.collect()

    log = tmp_path / "log"
    pids = forks.members(act, log)
    statuses = [forks.wait_at_most(pid, 60) for pid in pids]
    assert statuses == [0, 0], "\n".join(log.with_name(f"log.{rank}").read_text() for rank in (0, 1))


@pytest.mark.parametrize("status", [0, 143])
def test_a_process_that_hangs_at_its_end_ends_with_its_status(status: int, tmp_path: Path) -> None:
    """Even where it holds Python's lock, as a library does that frees something and waits."""

    def act() -> None:
        end_within(0.3, status)
        ctypes.PyDLL(None).sleep(60)  # PyDLL: without giving up the lock

    began = time.monotonic()
    assert forks.wait(forks.fork(act)) == status
    assert time.monotonic() - began < 20


@pytest.mark.component
@pytest.mark.parametrize("launcher", ["accelerate", "deepspeed"])
def test_joins_the_processes_of_a_launcher(tmp_path: Path, launcher: str) -> None:
    """Those of torchrun in tests/training/test_faults.py."""
    runs.prepare(tmp_path)
    binaries, port = Path(sys.executable).parent, runs.free_port()
    start = {
        "accelerate": [
            *(str(binaries / "accelerate"), "launch", "--use_deepspeed", "--zero_stage=2", "--num_processes=2"),
            *("--num_machines=1", "--mixed_precision=no", "--dynamo_backend=no", f"--main_process_port={port}"),
            *("-m", "alignlab"),
        ],
        "deepspeed": [str(binaries / "deepspeed"), "--num_gpus=2", f"--master_port={port}", "--module", "alignlab"],
    }[launcher]
    words = runs.words_for(tmp_path, "sft", launcher, "distributed=zero2", "training.steps=1")
    environment = runs.environment() | {"DS_ACCELERATOR": "cpu", "PATH": f"{binaries}:/usr/bin:/bin"}
    done = subprocess.run(
        [*start, "train", *words], env=environment, cwd=runs.REPOSITORY, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    result = json.loads((tmp_path / launcher / "result.json").read_text())
    assert (result["processes"], result["engine"], result["step"]) == (2, "DeepSpeed ZeRO-2", 1)


@pytest.fixture
def starts_forks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Our own starter begins forks of this process (tests/launch/test_start.py has it begin interpreters)."""
    forks.import_for(["distributed=zero1"])
    monkeypatch.setattr(start, "subprocess", SimpleNamespace(Popen=forked.Popen, DEVNULL=subprocess.DEVNULL))


@pytest.mark.component
def test_one_line_starts_its_own_processes_and_one_device_can_use_zero(
    tmp_path: Path, starts_forks: None, capfd: pytest.CaptureFixture[str]
) -> None:
    """And says so: the engine and the number of processes, once."""
    runs.prepare(tmp_path)
    words = runs.words_for(tmp_path, "sft", "own", "distributed=zero3_offload", "training.steps=2")
    status, said = main(["train", *words, "distributed.processes=1"]), capfd.readouterr()
    assert status == 0, said.err
    assert said.out.count("1 process(es), DeepSpeed ZeRO-3 with offload, cpu") == 1
    assert said.out.count("done: 2 steps") == 1


def test_a_mode_without_a_number_of_processes_is_refused_before_anything_starts(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    runs.prepare(tmp_path)
    assert main(["train", *runs.words_for(tmp_path, "sft", "none", "distributed=ddp")]) == 2
    assert "distributed=ddp: there are no GPUs to count: give distributed.processes=N" in capfd.readouterr().err


@pytest.mark.component
def test_an_optimizer_that_needs_matrices_is_refused_with_zero(
    tmp_path: Path, starts_forks: None, capfd: pytest.CaptureFixture[str]
) -> None:
    runs.prepare(tmp_path)
    words = runs.words_for(tmp_path, "sft", "factored", "optimizer=adafactor", "distributed=zero1")
    assert main(["train", *words, "distributed.processes=1"]) == 2
    said = capfd.readouterr().err
    assert "optimizer: Adafactor does not work on the flat pieces of weights" in said
    assert "Traceback" not in said
