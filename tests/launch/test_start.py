"""Runs of several processes that are killed, stopped, hung and starved in earnest, under our own starter."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch

from alignlab.cli import main
from alignlab.core import DataError
from alignlab.core.memory import usual_tokens
from alignlab.training import step, trainer
from alignlab.training.checkpoints.store import Checkpoints
from tests.launch import forked
from tests.training import runs

MORE = [
    "adapter=lora",
    "adapter.dropout=0.2",
    "optimizer=adamw",
    "optimizer.lr=1e-3",
    "training.batch_size=4",
    "source.rollout_batch_size=8",
    "source.ppo_epochs=2",
    "training.checkpoint_every=2",
    "training.progress=off",
    "distributed.timeout=30",
]
STEPS = 6


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("start")
    runs.prepare(made)
    runs.train(
        made, "rejection_sampling", "warm", "training.steps=1", "training.progress=off"
    )  # imports what forks need
    import deepspeed  # noqa: F401

    return made


def start(folder: Path, out: str, mode: str, *more: str) -> int:
    return forked.start(folder, "rejection_sampling", out, f"distributed={mode}", *MORE, *more)


def undisturbed(folder: Path, mode: str) -> dict[str, torch.Tensor]:
    """The weights of a run to which nothing happened."""
    if not (folder / mode / "result.json").exists():
        assert start(folder, mode, mode) == 0
    return runs.weights(folder, mode)


def goes_on(folder: Path, out: str, mode: str, begin: int) -> None:
    """The same command goes on after a step, and ends as if nothing had happened."""
    kept = Checkpoints(folder / out / "checkpoints", is_main=False).latest()
    assert (int(kept.name.removeprefix("step-")) if kept else 0) == begin
    assert not (folder / out / "model").exists()
    assert start(folder, out, mode) == 0
    assert runs.identical(undisturbed(folder, mode), runs.weights(folder, out))
    mine, theirs = (runs.metrics(folder, o) for o in (out, mode))
    names = ("step", "loss", "grad_norm", "trained_tokens", "generated_tokens")
    assert [{n: line[n] for n in names} for line in mine] == [{n: line[n] for n in names} for line in theirs]


def at_call(monkeypatch: pytest.MonkeyPatch, where: Any, name: str, number: int, act: Callable[[], object]) -> None:
    """Do something in the `number`-th call of a function, in each process that makes it."""
    function, calls = getattr(where, name), 0

    def wrapped(*arguments: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == number:
            act()
        return function(*arguments, **options)

    monkeypatch.setattr(where, name, wrapped)


# ------------------------------------------------------------------ killed


@pytest.mark.parametrize(
    ("mode", "rank", "where", "name", "call", "begin"),
    [
        ("zero2", 1, step, "aggregate", 4, 2),  # in the fourth step, between forward and backward
        ("ddp", 0, runs, "count_of_a", 16, 4),  # in the second rollout, after sampling
        ("fsdp", 1, trainer, "save_state", 2, 2),  # while the second checkpoint is being written
    ],
)
def test_one_process_is_killed(
    folder: Path,
    mode: str,
    rank: int,
    where: Any,
    name: str,
    call: int,
    begin: int,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """The others end within seconds, the one is named, and nothing after the last checkpoint is lost."""
    marker, out = folder / f"{mode}.killed", f"{mode}-killed"
    with monkeypatch.context() as patch:
        at_call(patch, where, name, call, lambda: forked.once(rank, marker, forked.kill))
        assert start(folder, out, mode) == 1
    assert forked.since(marker) < 8
    said = [line for line in capfd.readouterr().err.splitlines() if "was ended by" in line]
    assert len(said) == 1
    assert said[0].startswith(f"alignlab: process {rank} of 2 was ended by SIGKILL")
    assert said[0].endswith(f"the same command goes on from step-{begin:08}")
    goes_on(folder, out, mode, begin)


# ------------------------------------------------------------------ stopped


def test_a_signal_to_the_starter_stops_all_with_a_checkpoint(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    marker, parent = folder / "zero3.stopped", os.getpid()
    with monkeypatch.context() as patch:
        at_call(patch, step, "aggregate", 3, lambda: forked.once(1, marker, lambda: os.kill(parent, signal.SIGTERM)))
        assert start(folder, "zero3-stopped", "zero3", "training.checkpoint_every=null") == 143
    said = re.findall(r"alignlab: .*", capfd.readouterr().err)
    assert len(said) == 1
    step_ = re.fullmatch(r"alignlab: stopped by SIGTERM; checkpoint of step (\d) saved: .*", said[0])
    assert step_ is not None
    goes_on(folder, "zero3-stopped", "zero3", int(step_[1]))


def test_a_signal_to_one_process_stops_all_within_the_step(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Slurm's warning may reach any of them."""
    marker = folder / "zero2.stopped"
    with monkeypatch.context() as patch:
        own = lambda: os.kill(os.getpid(), signal.SIGUSR1)  # noqa: E731
        at_call(patch, step, "aggregate", 3, lambda: forked.once(1, marker, own))
        assert start(folder, "zero2-stopped", "zero2", "training.checkpoint_every=null") == 138
    goes_on(folder, "zero2-stopped", "zero2", 3)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGHUP])
def test_ctrl_c_once_or_a_closed_terminal_stops_all_with_a_checkpoint(
    folder: Path, number: signal.Signals, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, parent = f"ddp-{number.name}", os.getpid()
    with monkeypatch.context() as patch:
        ask = lambda: forked.once(0, folder / f"{out}.asked", lambda: os.kill(parent, number))  # noqa: E731
        at_call(patch, runs, "count_of_a", 1, ask)
        assert start(folder, out, "ddp", "training.checkpoint_every=null") == 128 + number
    goes_on(folder, out, "ddp", 1)


def test_a_signal_before_training_ends_the_run_quietly(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    def soon() -> None:
        while not (folder / "early/config.yaml").exists():
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGTERM)

    thread = threading.Thread(target=soon)
    thread.start()
    assert start(folder, "early", "zero3") == 143
    thread.join()
    said = capfd.readouterr().err
    assert "was ended by" not in said and "Traceback" not in said


# ------------------------------------------------------------------ errors of one process


def bug() -> None:
    raise ZeroDivisionError("this is a bug")


def bad_record() -> None:
    raise DataError("file.jsonl:7: cannot be scored")


@pytest.mark.parametrize(("rank", "act", "status"), [(1, bug, 70), (0, bug, 70), (1, bad_record, 2)])
def test_the_error_of_one_process_is_what_is_shown(
    folder: Path,
    rank: int,
    act: Callable[[], None],
    status: int,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    out = f"failing-{rank}-{status}"
    with monkeypatch.context() as patch:
        at_call(patch, step, "aggregate", 3, lambda: forked.once(rank, folder / out, act))
        assert start(folder, f"{out}-run", "zero2") == status
    said = capfd.readouterr().err
    assert "Traceback" not in said
    line = {bug: "ZeroDivisionError: this is a bug", bad_record: "file.jsonl:7: cannot be scored"}[act]
    told = [text for text in said.splitlines() if text.startswith("alignlab: ")]
    assert len(told) == 1 and line in told[0]
    if rank:
        assert told[0].startswith(f"alignlab: process 1 of 2 ended with status {status}: ")
        see = f"the others were stopped; see {folder / f'{out}-run'}/logs/rank-1.log"
        assert told[0].endswith(f"; {see}; the same command goes on from step-00000002")


# ------------------------------------------------------------------ hung


def sleep_for_ever() -> None:
    while True:
        time.sleep(1)


def test_a_process_that_hangs_is_found(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """After `distributed.timeout` the stack of each process is on disk, and the one that did not wait is named."""
    marker = folder / "hung"
    with monkeypatch.context() as patch:
        # In DeepSpeed's own process group, whose timeout is half an hour unless somebody says otherwise.
        at_call(patch, step, "aggregate", 4, lambda: forked.once(1, marker, sleep_for_ever))
        assert start(folder, "hung-run", "zero2", "distributed.timeout=6") == 1
    assert 6 <= forked.since(marker) < 20
    said = [line for line in capfd.readouterr().err.splitlines() if line.startswith("alignlab: process")]
    assert len(said) == 1
    assert re.match(
        r"alignlab: process 1 of 2 did not answer; it was in sleep_for_ever \(\S+test_start\.py, line \d+\)", said[0]
    )
    assert f"{folder}/hung-run/logs/rank-*.stack" in said[0]
    waiting, hung = ((folder / f"hung-run/logs/rank-{rank}.stack").read_text() for rank in (0, 1))
    assert "sleep_for_ever" in hung and "in all_reduce" not in hung
    assert "in all_reduce" in waiting and "sleep_for_ever" not in waiting
    goes_on(folder, "hung-run", "zero2", 2)


# ------------------------------------------------------------------ no memory


def no_memory() -> None:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")


def test_no_memory_where_passes_communicate_starts_all_again(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """They go on from the last checkpoint with half the tokens, and keep to that."""
    marker, budgets = folder / "starved", folder / "budgets"
    run_batch = step.run_batch

    def noting(*arguments: Any, **options: Any) -> Any:
        with budgets.open("a") as file:
            file.write(f"{options['max_tokens_per_microbatch']} ")
        return run_batch(*arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(step, "run_batch", noting)
        at_call(patch, step, "aggregate", 4, lambda: forked.once(1, marker, no_memory))
        assert start(folder, "starved-run", "zero2") == 0
    used = [int(word) for word in budgets.read_text().split()]
    assert used[:8] == [usual_tokens(on_cpu=True)] * 8  # four steps on two processes
    small = used[-1]
    assert 8 <= small < 100 and used[8:] == [small] * 2 * (STEPS - 2)
    said = capfd.readouterr().err
    assert said.count("alignlab: process 1 ran out of memory: all are started again, with a smaller token budget") == 1
    assert "Traceback" not in said
    assert "process 1" in (folder / "starved-run/logs/rank-1.log").read_text()
    assert [line["step"] for line in runs.metrics(folder, "starved-run")] == [1, 2, 3, 4, 5, 6]


# ------------------------------------------------------------------ damage


def test_a_damaged_shard_of_another_process_is_found_and_the_checkpoint_before_used(
    folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert start(folder, "damaged", "fsdp", "training.steps=4") == 0
    for name in ("model", "result.json"):
        os.rename(folder / "damaged" / name, folder / "damaged" / f"former-{name}")
    config = folder / "damaged/config.yaml"
    config.write_text(config.read_text().replace("steps: 4", "steps: 6"))
    shard = folder / "damaged/checkpoints/step-00000004/trained-00002-of-00002.safetensors"
    contents = bytearray(shard.read_bytes())
    contents[-1] ^= 1
    shard.write_bytes(contents)
    goes_on_from = len(runs.metrics(folder, "damaged"))
    assert goes_on_from == 4
    assert start(folder, "damaged", "fsdp") == 0
    said = [line for line in capfd.readouterr().err.splitlines() if "damaged" in line and "not used" in line]
    assert len(said) == 1 and "trained-00002-of-00002.safetensors: the contents changed" in said[0]
    assert runs.identical(undisturbed(folder, "fsdp"), runs.weights(folder, "damaged"))


def test_a_disk_that_is_full_ends_all_with_one_message(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """The second process may write no more than a few bytes to a file, from the second checkpoint on."""
    import resource

    marker = folder / "full"

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (15_000, resource.RLIM_INFINITY))

    with monkeypatch.context() as patch:
        at_call(patch, trainer, "save_state", 2, lambda: forked.once(1, marker, limit))
        assert start(folder, "full-run", "ddp") == 2
    said = [line for line in capfd.readouterr().err.splitlines() if line.startswith("alignlab:")]
    assert sum("the checkpoint of step 4 could not be written (earlier checkpoints are intact" in s for s in said) == 1
    assert not list((folder / "full-run/checkpoints").glob(".tmp-*"))
    goes_on(folder, "full-run", "ddp", 2)


def test_processes_end_when_the_starter_is_killed(tmp_path: Path) -> None:
    """None is left behind on the machine's devices: the kernel tells them, and they stop with a checkpoint."""
    runs.prepare(tmp_path)
    words = runs.words_for(tmp_path, "sft", "orphans", "training.steps=100000", "distributed=ddp")
    starter = subprocess.Popen(
        [sys.executable, "-m", "alignlab", "train", *words, "distributed.processes=2"],
        env=runs.environment(),
        cwd=runs.REPOSITORY,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    metrics = tmp_path / "orphans/metrics.jsonl"
    wait_until(lambda: metrics.exists() and metrics.stat().st_size > 0)
    starter.kill()
    starter.wait()
    wait_until(lambda: bool(list((tmp_path / "orphans/checkpoints").glob("step-*"))))
    wait_until(lambda: not alive(str(tmp_path / "orphans")))


def alive(folder: str) -> list[int]:
    """Processes that were started for a run in this folder."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with suppress(OSError):
            if f"--from={folder}/" in path.read_bytes().decode(errors="replace"):
                found.append(int(path.parent.name))
    return found


def wait_until(condition: Callable[[], bool], seconds: float = 90) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.2)


def test_a_finished_run_leaves_signals_as_they_were(tmp_path: Path) -> None:
    """Its caller's children would inherit what it ignores, and bash cannot trap what it inherited as ignored."""
    runs.prepare(tmp_path)
    before = signal.getsignal(signal.SIGUSR1)
    assert main(["train", *runs.words_for(tmp_path, "sft", "run", "training.steps=1")]) == 0
    assert signal.getsignal(signal.SIGUSR1) == before
