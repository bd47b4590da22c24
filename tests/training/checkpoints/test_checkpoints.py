"""Checkpoints against processes that are really killed, files really damaged and disks really full."""

from __future__ import annotations

import errno
import gc
import json
import logging
import math
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path

import pytest
import torch

from alignlab.core import AlignlabError, ConfigError
from alignlab.training.checkpoints import store as module
from alignlab.training.checkpoints.store import MANIFEST, Checkpoints, read_manifest, verify

SHA256_OF_ABC = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"  # FIPS 180-2, appendix B.1


def contents(step: int, version: int = 0, size: int = 5000) -> bytes:
    return random.Random(1000 * step + version).randbytes(size)


def fill(folder: Path, step: int, version: int = 0, size: int = 5000) -> None:
    (folder / "weights.bin").write_bytes(contents(step, version, size))
    (folder / "inner").mkdir()
    (folder / "inner" / "state.json").write_text(json.dumps({"step": step, "version": version}))


def write(checkpoints: Checkpoints, step: int, metric: float | None = None, version: int = 0) -> None:
    with checkpoints.write(step, metric) as folder:
        fill(folder, step, version)


def holds(path: Path | None, step: int, version: int = 0, size: int = 5000) -> bool:
    assert path is not None
    state = json.loads((path / "inner" / "state.json").read_text())
    right = (path / "weights.bin").read_bytes() == contents(step, version, size)
    return right and state == {"step": step, "version": version}


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def in_child(action: Callable[[], None]) -> int:
    """Run it in a forked process; the status as `os.waitpid` gives it."""
    pid = os.fork()
    if pid == 0:
        try:
            action()
        except BaseException:
            os._exit(1)
        os._exit(0)
    return os.waitpid(pid, 0)[1]


def killed_at(event_number: int, action: Callable[[], None]) -> bool:
    """Run it in a child that SIGKILLs itself just before its n-th file system operation; whether it came to that."""

    def act() -> None:
        seen = 0

        def hook(event: str, _arguments: object) -> None:
            nonlocal seen
            if event == "open" or (event.startswith("os.") and event != "os.kill"):
                if seen == event_number:
                    os.kill(os.getpid(), signal.SIGKILL)
                seen += 1

        sys.addaudithook(hook)
        action()

    status = in_child(act)
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0
    return os.WIFSIGNALED(status)


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without waiting for the disk: what a killed process has written is there in any case, only a power cut asks."""
    monkeypatch.setattr(os, "fsync", lambda _handle: None)


# ------------------------------------------------------------------ what is written


def test_what_was_written_is_there_with_its_manifest(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path / "c")
    assert checkpoints.latest() is None
    assert checkpoints.best() is None
    with checkpoints.write(20, metric=0.5) as folder:
        (folder / "inner").mkdir()
        (folder / "inner" / "a.txt").write_bytes(b"abc")
        assert checkpoints.latest() is None
    path = checkpoints.latest()
    assert path == tmp_path / "c" / "step-00000020"
    assert (path / "inner" / "a.txt").read_bytes() == b"abc"
    manifest = read_manifest(path)
    assert manifest["files"] == {"inner/a.txt": {"bytes": 3, "sha256": SHA256_OF_ABC}}
    assert (manifest["step"], manifest["metric"]) == (20, 0.5)
    assert names(tmp_path / "c") == ["step-00000020"]


def test_everything_is_synced_before_it_gets_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: set[int] = set()
    unsynced: list[Path] = []
    fsync, rename = os.fsync, os.rename

    def recording_fsync(handle: int) -> None:
        fsync(handle)
        synced.add(os.fstat(handle).st_ino)

    def checking_rename(old: Path, new: Path) -> None:
        unsynced.extend(path for path in (old, *Path(old).rglob("*")) if path.stat().st_ino not in synced)
        rename(old, new)
        synced.discard(tmp_path.stat().st_ino)

    monkeypatch.setattr(os, "fsync", recording_fsync)
    monkeypatch.setattr(os, "rename", checking_rename)
    write(Checkpoints(tmp_path), 1)
    assert unsynced == []
    assert tmp_path.stat().st_ino in synced  # the new name itself


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize(
    ("mode", "metrics", "kept"),
    [
        ("min", [3, 1, 2, 5, 4], [2, 4, 5]),
        ("max", [3, 1, 2, 5, 4], [4, 5]),
        ("max", [9, 1, 2, 5, 4], [1, 4, 5]),
        ("min", [None, math.nan, -math.inf, 7, 7], [4, 5]),
        ("min", [2, 2, 2, 3, 3], [1, 4, 5]),  # the earliest of equal ones
    ],
)
def test_keeps_the_newest_and_the_best(tmp_path: Path, mode: str, metrics: list, kept: list[int]) -> None:
    checkpoints = Checkpoints(tmp_path, keep_last=2, keep_best=True, mode=mode)  # type: ignore[arg-type]
    for step, metric in enumerate(metrics, start=1):
        write(checkpoints, step, metric)
    assert names(tmp_path) == [f"step-{step:08}" for step in kept]
    assert checkpoints.best() == tmp_path / f"step-{kept[0]:08}"  # in each of these cases the best is the oldest kept
    assert all(holds(tmp_path / f"step-{step:08}", step) for step in kept)


def test_without_keep_best_only_the_newest_stay(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, keep_last=1, keep_best=False)
    for step, metric in ((1, 0.0), (2, 1.0), (3, 2.0)):
        write(checkpoints, step, metric)
    assert names(tmp_path) == ["step-00000003"]


def test_steps_are_ordered_as_numbers(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, keep_last=1)
    write(checkpoints, 99_999_999)
    write(checkpoints, 100_000_000)
    assert names(tmp_path) == ["step-100000000"]


def test_a_step_that_has_a_whole_checkpoint_keeps_it(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path)
    write(checkpoints, 10, metric=1.0, version=1)
    write(checkpoints, 10, metric=2.0, version=2)
    assert holds(checkpoints.latest(), 10, version=1)
    assert names(tmp_path) == ["step-00000010"]
    assert read_manifest(tmp_path / "step-00000010")["metric"] == 1.0


def test_a_step_whose_checkpoint_is_damaged_gets_a_new_one(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path)
    write(checkpoints, 10, version=1)
    truncate(tmp_path / "step-00000010")
    assert checkpoints.latest() is None
    write(checkpoints, 10, version=2)
    assert holds(checkpoints.latest(), 10, version=2)
    assert names(tmp_path) == ["step-00000010"]


def test_a_future_that_will_not_be_is_discarded(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, keep_last=5)
    for step in (10, 20, 30):
        write(checkpoints, step)
    Checkpoints(tmp_path, is_main=False).discard_after(10)
    assert len(names(tmp_path)) == 3
    checkpoints.discard_after(10)
    assert names(tmp_path) == ["step-00000010"]


def test_failing_to_delete_an_old_one_is_only_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    checkpoints = Checkpoints(tmp_path, keep_last=1)
    write(checkpoints, 1)

    def busy(path: Path) -> None:
        raise OSError(errno.EBUSY, "busy", str(path))

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", busy)
        write(checkpoints, 2)
    assert "could not be deleted" in caplog.text
    assert checkpoints.latest() == tmp_path / "step-00000002"
    Checkpoints(tmp_path)
    assert names(tmp_path) == ["step-00000002"]


def test_impossible_settings_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="keep_last=0"):
        Checkpoints(tmp_path, keep_last=0)
    with pytest.raises(ConfigError, match="mode='best'"):
        Checkpoints(tmp_path, mode="best")  # type: ignore[arg-type]
    with pytest.raises(AlignlabError, match=r"manifest\.json"), Checkpoints(tmp_path).write(1) as folder:
        (folder / MANIFEST).write_text("{}")


# ------------------------------------------------------------------ killed processes


@pytest.mark.usefixtures("quick")
def test_killed_before_any_file_operation_of_a_write(tmp_path: Path) -> None:
    """keep_last=1: at every instant either the old or the new checkpoint is there, whole."""
    for number in count():
        folder = tmp_path / str(number)
        checkpoints = Checkpoints(folder, keep_last=1)
        write(checkpoints, 10)
        killed = killed_at(number, lambda checkpoints=checkpoints: write(checkpoints, 20))
        after = Checkpoints(folder, keep_last=1)
        path = after.latest()
        assert path is not None
        assert holds(path, int(path.name.removeprefix("step-")))
        assert after.problems == []
        assert not [name for name in names(folder) if name.startswith(".")]
        write(after, 30)
        assert names(folder) == ["step-00000030"]
        shutil.rmtree(folder)
        if not killed:
            break
    assert number > 30  # it did die in many places


def test_killed_at_any_time(tmp_path: Path) -> None:
    """SIGKILL from outside while checkpoints of 2 MB are being written: what was reported as saved is there.

    Every second time it comes after the first report, however slow the machine is."""
    size, generator = 2_000_000, random.Random(0)
    reached = 0
    for attempt in range(8):
        begin = Checkpoints(tmp_path, keep_last=2).latest()
        start = int(begin.name.removeprefix("step-")) if begin else 0
        read, report = os.pipe()
        pid = os.fork()
        if pid == 0:
            os.close(read)
            checkpoints = Checkpoints(tmp_path, keep_last=2)
            for step in count(start + 1):
                with checkpoints.write(step) as folder:
                    fill(folder, step, size=size)
                os.write(report, step.to_bytes(4, "big"))
        os.close(report)
        reports = os.read(read, 4) if attempt % 2 else b""
        time.sleep(generator.uniform(0.01, 0.2))
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        with os.fdopen(read, "rb") as pipe:
            reports += pipe.read()
        reported = int.from_bytes(reports[-4:], "big") if reports else start
        after = Checkpoints(tmp_path, keep_last=2)
        path = after.latest()
        assert after.problems == []
        assert not [name for name in names(tmp_path) if name.startswith(".")]
        reached = int(path.name.removeprefix("step-")) if path else 0
        assert reached in (reported, reported + 1)  # the kill may come between the commit and the report
        assert path is None or holds(path, reached, size=size)
    assert reached > 0


def test_left_overs_are_cleared_away_by_the_owner_alone(tmp_path: Path) -> None:
    write(Checkpoints(tmp_path), 10)
    for name in (".tmp-step-00000020", ".trash-step-00000005"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "weights.bin").write_text("half")
    before = names(tmp_path)
    reader = Checkpoints(tmp_path, is_main=False)
    assert holds(reader.latest(), 10)
    assert names(tmp_path) == before
    assert holds(Checkpoints(tmp_path).latest(), 10)
    assert names(tmp_path) == ["step-00000010"]


# ------------------------------------------------------------------ damage


def truncate(folder: Path) -> str:
    os.truncate(folder / "weights.bin", 4000)
    return "4000 bytes instead of 5000"


def flip(name: str, position: int) -> Callable[[Path], str]:
    def damage(folder: Path) -> str:
        data = bytearray((folder / name).read_bytes())
        data[position] ^= 0x01
        (folder / name).write_bytes(data)
        return "the contents changed" if name != MANIFEST else MANIFEST

    return damage


def lose(name: str) -> Callable[[Path], str]:
    def damage(folder: Path) -> str:
        (folder / name).unlink()
        return "missing" if name != MANIFEST else f"no {MANIFEST}"

    return damage


def better_metric(folder: Path) -> str:
    text = (folder / MANIFEST).read_text()
    assert '"metric": 7.0' in text
    (folder / MANIFEST).write_text(text.replace('"metric": 7.0', '"metric": 1.0'))
    return "checksum"


def of_another_step(folder: Path) -> str:
    other = folder.with_name("step-00000010")
    shutil.rmtree(folder)
    shutil.copytree(other, folder)
    return "is of step 10"


DAMAGES = {
    "truncated": truncate,
    "first byte flipped": flip("weights.bin", 0),
    "last byte flipped": flip("weights.bin", -1),
    "inner file flipped": flip("inner/state.json", 3),
    "file lost": lose("inner/state.json"),
    "manifest lost": lose(MANIFEST),
    "manifest flipped": flip(MANIFEST, 0),
    "metric changed": better_metric,
    "copied under another name": of_another_step,
}


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES.keys())
def test_a_damaged_one_is_reported_and_the_one_before_taken(
    tmp_path: Path, damage: Callable[[Path], str], caplog: pytest.LogCaptureFixture
) -> None:
    checkpoints = Checkpoints(tmp_path, keep_last=3)
    write(checkpoints, 10, metric=8.0)
    write(checkpoints, 20, metric=7.0)
    newest = tmp_path / "step-00000020"
    assert verify(newest) == []
    message = damage(newest)

    again = Checkpoints(tmp_path, keep_last=1, keep_best=False)
    assert holds(again.latest(), 10)
    assert len(again.problems) == 1
    assert message in again.problems[0]
    assert "step-00000020" in again.problems[0]
    assert [(r.levelno, again.problems[0] in r.getMessage()) for r in caplog.records] == [(logging.ERROR, True)]
    assert holds(again.best(), 10)

    write(again, 15)  # with keep_last=1 the damaged one must not take the place of this
    assert holds(again.latest(), 15)
    assert names(tmp_path) == ["step-00000015", "step-00000020"]
    write(again, 20)
    assert holds(again.latest(), 20)
    assert names(tmp_path) == ["step-00000020"]
    assert len(again.problems) == 1


def test_one_known_to_be_damaged_does_not_count_among_the_newest(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, keep_last=2)
    write(checkpoints, 10)
    write(checkpoints, 20)
    flip("weights.bin", 7)(tmp_path / "step-00000020")  # of the right size: only the checksum tells
    assert holds(checkpoints.latest(), 10)
    write(checkpoints, 15)
    assert names(tmp_path) == ["step-00000010", "step-00000015", "step-00000020"]


def test_the_one_just_written_stays_though_later_steps_exist(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, keep_last=1)
    write(checkpoints, 30)
    write(checkpoints, 20)
    assert names(tmp_path) == ["step-00000020", "step-00000030"]


@pytest.mark.usefixtures("quick")
def test_every_byte_counts(tmp_path: Path) -> None:
    write(Checkpoints(tmp_path), 1, metric=0.25)
    folder = tmp_path / "step-00000001"
    generator = random.Random(1)
    for name in ("weights.bin", "inner/state.json", MANIFEST):
        whole = (folder / name).read_bytes()
        for position in {0, len(whole) - 2, *(generator.randrange(len(whole) - 1) for _ in range(40))}:
            damaged = bytearray(whole)
            damaged[position] ^= 0x80
            (folder / name).write_bytes(damaged)
            assert verify(folder), (name, position)
        (folder / name).write_bytes(whole)
    assert verify(folder) == []


def test_none_is_left_whole(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path)
    write(checkpoints, 10)
    truncate(tmp_path / "step-00000010")
    assert checkpoints.latest() is None
    assert len(checkpoints.problems) == 1


# ------------------------------------------------------------------ storage that fails


@pytest.fixture
def tiny_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 256 KiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(folder)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode != 0:
        pytest.skip("mounting a small file system is not allowed here")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def with_python(folder: Path) -> None:
    (folder / "weights.bin").write_bytes(bytes(1_000_000))


def with_torch(folder: Path) -> None:
    torch.save(torch.zeros(250_000), folder / "weights.pt")


def with_safetensors(folder: Path) -> None:
    from safetensors.torch import save_file

    save_file({"weights": torch.zeros(250_000)}, folder / "weights.safetensors")


def to_the_brim(folder: Path) -> None:
    """All fits, but nothing more: the manifest does not."""
    with (folder / "weights.bin").open("wb", buffering=0) as file:
        for size in (4096, 1):
            try:
                while True:
                    file.write(bytes(size))
            except OSError:
                pass


@pytest.mark.parametrize("fill_up", [with_python, with_torch, with_safetensors, to_the_brim])
def test_a_full_disk(tiny_disk: Path, fill_up: Callable[[Path], None]) -> None:
    checkpoints = Checkpoints(tiny_disk, keep_last=1)
    write(checkpoints, 10)
    with pytest.raises(AlignlabError) as caught, checkpoints.write(20) as folder:
        fill_up(folder)
    message = str(caught.value)
    del caught  # its traceback holds torch's writer, and with it the deleted file's space
    gc.collect()
    assert str(tiny_disk) in message
    assert "step 20 could not be written" in message
    assert "the latest is step-00000010" in message
    assert "0 MB free" in message
    assert "Free some space" in message
    assert names(tiny_disk) == ["step-00000010"]
    assert holds(checkpoints.latest(), 10)
    write(checkpoints, 30)
    assert names(tiny_disk) == ["step-00000030"]


def test_a_disk_that_became_read_only(tiny_disk: Path) -> None:
    write(Checkpoints(tiny_disk), 10)
    (tiny_disk / ".tmp-step-00000020").mkdir()
    subprocess.run(["mount", "-o", "remount,ro", str(tiny_disk)], check=True)
    checkpoints = Checkpoints(tiny_disk)  # what cannot be cleared away does not hinder resuming
    assert holds(checkpoints.latest(), 10)
    with pytest.raises(AlignlabError, match=r"Read-only file system.*mounted read-only: choose another"):
        write(checkpoints, 30)
    assert holds(checkpoints.latest(), 10)


def test_a_file_too_large(tmp_path: Path) -> None:
    write(Checkpoints(tmp_path), 10)

    def limited() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
        with pytest.raises(AlignlabError, match=r"step 20 could not be written.*File too large.*ulimit -f"):  # noqa: SIM117
            with Checkpoints(tmp_path).write(20) as folder:
                with_python(folder)
        assert names(tmp_path) == ["step-00000010"]

    assert in_child(limited) == 0
    assert holds(Checkpoints(tmp_path).latest(), 10)


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(AlignlabError, match=r"there is no earlier one.*Not a directory"):
        write(Checkpoints(tmp_path / "file" / "checkpoints"), 1)


@pytest.mark.parametrize("error", [ValueError("mine"), KeyboardInterrupt()])
def test_other_exceptions_pass_through_and_leave_nothing(tmp_path: Path, error: BaseException) -> None:
    checkpoints = Checkpoints(tmp_path)
    write(checkpoints, 10)
    with pytest.raises(type(error)) as caught, checkpoints.write(20) as folder:
        fill(folder, 20)
        raise error
    assert caught.value is error
    assert names(tmp_path) == ["step-00000010"]


# ------------------------------------------------------------------ several processes


class Meeting:
    """`agree` for threads that play processes: true for all if it is so for each."""

    def __init__(self, parties: int) -> None:
        self.barrier = threading.Barrier(parties, timeout=30)
        self.answers: list[bool] = []

    def __call__(self, well: bool) -> bool:
        self.answers.append(well)
        self.barrier.wait()
        everyone = all(self.answers)
        if self.barrier.wait() == 0:
            self.answers = []
        self.barrier.wait()
        return everyone


def as_processes(folder: Path, body: Callable[[int, Path], None], world: int = 3) -> list[BaseException | None]:
    """Write the checkpoint of step 20 as several processes do; the exception of each."""
    agree = Meeting(world)
    outcomes: list[BaseException | None] = [None] * world

    def process(rank: int) -> None:
        try:
            with Checkpoints(folder, is_main=rank == 0, agree=agree).write(20) as temporary:
                body(rank, temporary)
        except BaseException as error:
            outcomes[rank] = error

    threads = [threading.Thread(target=process, args=(rank,)) for rank in range(world)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    return outcomes


def test_all_processes_write_into_one_checkpoint(tmp_path: Path) -> None:
    def slower_the_higher_the_rank(rank: int, folder: Path) -> None:
        time.sleep(0.02 * rank)
        (folder / f"rank-{rank}").write_text(str(rank))

    assert as_processes(tmp_path, slower_the_higher_the_rank) == [None] * 3
    path = Checkpoints(tmp_path).latest()
    assert path is not None
    assert sorted(read_manifest(path)["files"]) == ["rank-0", "rank-1", "rank-2"]


@pytest.mark.parametrize("failing", [0, 2])
def test_when_one_process_fails_all_do_and_nothing_is_committed(tmp_path: Path, failing: int) -> None:
    def body(rank: int, folder: Path) -> None:
        (folder / f"rank-{rank}").write_text("")
        if rank == failing:
            raise OSError(errno.EDQUOT, os.strerror(errno.EDQUOT))

    outcomes = as_processes(tmp_path, body)
    assert all(isinstance(error, AlignlabError) for error in outcomes)
    for rank, error in enumerate(outcomes):
        assert ("quota is used up" if rank == failing else "another process") in str(error)
    assert names(tmp_path) == []


def test_a_folder_that_other_nodes_do_not_see_is_not_silently_half_a_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "VISIBLE_WITHIN", 0.2)
    elsewhere = Checkpoints(tmp_path / "local", is_main=False)
    with pytest.raises(AlignlabError, match="must share"), elsewhere.write(20):
        pass
