"""wandb beside `metrics.jsonl`: what it is told, online and offline, over interruptions; and that it stops no run."""

from __future__ import annotations

import json
import os
import shlex
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from alignlab.benchmarks.base import Benchmark, Subject
from alignlab.benchmarks.evaluate import evaluate
from alignlab.config import compose, resolve
from alignlab.core import ConfigError
from alignlab.training.callbacks.logging import MetricsLog
from alignlab.training.callbacks.trackers import Wandb, named
from tests.training import forks
from tests.training.callbacks import wandb_server
from tests.training.callbacks.wandb_server import Server

ROOT = Path(__file__).parents[3]
WANDB = "alignlab.training.callbacks.trackers.Wandb"


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def offline_records(folder: Path) -> list[Any]:
    """What wandb's own file of an offline run holds. A LevelDB log: blocks of 32 KiB, in them chunks with a header of
    checksum, length and kind (1 whole, 2 first, 3 middle, 4 last); each record is a protocol buffer."""
    from wandb.proto import wandb_internal_pb2

    (path,) = folder.glob("*.wandb")
    data, at, records, record = path.read_bytes(), 7, [], b""
    while at + 7 <= len(data):
        if 32768 - at % 32768 < 7:
            at += 32768 - at % 32768
        _, length, kind = struct.unpack_from("<IHB", data, at)
        record += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):
            parsed = wandb_internal_pb2.Record()
            parsed.ParseFromString(record)
            records.append(parsed)
            record = b""
    return records


def finished(folder: Path) -> list[Any]:
    """The records of a run that was finished; wandb writes the last of them shortly after `finish` has returned."""
    deadline = time.monotonic() + 30
    while True:
        records = offline_records(folder)
        if records and records[-1].WhichOneof("record_type") == "exit":
            return records
        assert time.monotonic() < deadline, "wandb did not finish the run"
        time.sleep(0.05)


def kind(records: list[Any], name: str) -> list[Any]:
    return [getattr(record, name) for record in records if record.WhichOneof("record_type") == name]


def history(records: list[Any]) -> list[dict[str, Any]]:
    found = []
    for record in kind(records, "history"):
        items = {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in record.item}
        found.append({key: value for key, value in items.items() if not key.startswith("_")})
    return found


def sittings(folder: Path) -> list[Path]:
    return sorted((folder / "wandb").glob("offline-run-*"))


@pytest.mark.component
def test_wandb_offline_gets_the_metrics_and_a_resumed_run_goes_on(tmp_path: Path, wandb_here: None) -> None:
    settings = Wandb(mode="offline", project="tales", group="demo", name="demo/dpo-1", job_type="dpo", tags=["a", "b"])
    config = {"algorithm": {"beta": 0.1}, "judge": {"api_key": "abracadabra"}}
    folder = tmp_path / "run"

    def track(resumed: int, *said: dict[str, float]) -> None:
        with MetricsLog(folder, settings, config) as tracker:
            tracker.resume(resumed)
            for step, metrics in enumerate(said, resumed + 1):
                tracker.log(step, metrics)

    forked(lambda: track(0, {"loss": 0.5}, {"loss": 0.25, "eval/loss": 0.75}, {"loss": 0.125}), tmp_path / "log")
    (first,) = sittings(folder)
    records = finished(first)
    assert history(records) == [
        {"step": 1, "loss": 0.5},
        {"step": 2, "loss": 0.25, "eval/loss": 0.75},
        {"step": 3, "loss": 0.125},
    ]
    run_id = (folder / "wandb_id").read_text().strip()
    (run,) = kind(records, "run")
    given = {item.key: json.loads(item.value_json) for item in run.config.update}
    assert given["algorithm"] == {"beta": 0.1}
    assert not [path for path in folder.rglob("*") if path.is_file() and b"abracadabra" in path.read_bytes()]
    assert ("*", "step") in {(metric.glob_name, metric.step_metric) for metric in kind(records, "metric")}

    time.sleep(1.1)  # wandb names its folders by the second
    forked(lambda: track(2, {"loss": 0.125}, {"loss": 0.0625}), tmp_path / "log")
    (second,) = set(sittings(folder)) - {first}
    again = finished(second)
    assert history(again) == [{"step": 4, "loss": 0.0625}]  # of step 3 it has been told
    (resumed,) = kind(again, "run")
    for which in (run, resumed):
        assert (which.run_id, which.project, which.run_group, which.job_type) == (run_id, "tales", "demo", "dpo")
        assert (which.display_name, list(which.tags)) == ("demo/dpo-1", ["a", "b"])
    assert [line["loss"] for line in lines(folder)] == [0.5, 0.25, 0.125, 0.0625]


@pytest.mark.component
def test_a_run_without_a_name_is_called_after_its_folder(tmp_path: Path, wandb_here: None) -> None:

    def track() -> None:
        with MetricsLog(tmp_path / "beta=0.1", Wandb(mode="offline"), {}) as tracker:
            tracker.log(1, {"loss": 0.5})

    forked(track, tmp_path / "log")
    (run,) = kind(finished(*sittings(tmp_path / "beta=0.1")), "run")
    assert (run.display_name, run.job_type, run.run_group) == ("beta=0.1", "train", "")


# ------------------------------------------------------------------ a server, and interruptions


def forked(action: Callable[[], object], log: Path, status: int = 0) -> str:
    """Do it in a process of its own, since wandb keeps its state in the process; what that printed."""
    log.unlink(missing_ok=True)
    ended = forks.wait(forks.fork(action, log))
    said = log.read_text()
    assert ended == status, said
    assert "wandb failed" not in said
    return said


def sitting(folder: Path, mode: str, resumed: int, last: int, killed_after: float | None = None) -> str:
    """A process that tracks the steps after `resumed`, up to `last`, and is killed so many seconds later, or ends; what
    it printed."""

    def track() -> None:
        names = {"project": "tales", "group": "demo", "job_type": "dpo", "name": "demo/dpo-seed0"}
        wandb = None if mode == "none" else Wandb.model_validate({"mode": mode, **names})
        with MetricsLog(folder, wandb, {"beta": 0.25}) as tracker:
            tracker.resume(resumed)
            for step in range(resumed + 1, last + 1):
                tracker.log(step, {"loss": 1 / step})
                if step % 2 == 0:
                    tracker.log(step, {"eval/loss": 2 / step})
            if killed_after is not None:
                time.sleep(killed_after)
                os.kill(os.getpid(), signal.SIGKILL)

    folder.mkdir(exist_ok=True)
    return forked(track, folder / "log.txt", 0 if killed_after is None else -signal.SIGKILL)


def expected(last: int) -> list[dict[str, float]]:
    """The history of an undisturbed run."""
    found: list[dict[str, float]] = []
    for step in range(1, last + 1):
        found += [{"step": step, "loss": 1 / step}] + ([{"step": step, "eval/loss": 2 / step}] if step % 2 == 0 else [])
    return found


@pytest.fixture
def server(wandb_here: None, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    with wandb_server.serve() as server:
        monkeypatch.setenv("WANDB_BASE_URL", server.url)
        monkeypatch.setenv("WANDB_API_KEY", "a" * 40)
        yield server


def said_command(said: str) -> str:
    """The command that the user is told."""
    (line,) = [line for line in said.splitlines() if "wandb sync" in line]
    return line[line.index("find ") :]


def sync(command: str) -> str:
    """Do as the user is told."""
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    done = subprocess.run(
        ["sh", "-c", command], env=os.environ | {"PATH": path}, timeout=60, text=True, capture_output=True
    )
    assert done.returncode == 0, done.stderr
    return done.stderr


@pytest.mark.component
@pytest.mark.parametrize("kept", [7, 0.8, 1.0], ids=["nothing_written", "half_a_record_written", "synced_in_between"])
def test_an_interrupted_offline_run_is_one_run_once_it_is_synced(tmp_path: Path, server: Server, kept: float) -> None:
    """Killed at step 6 with a checkpoint of step 3, told to stop at step 8 with one, done at step 9. What wandb was
    told last before it is killed may be lost; `kept` is what its log has, in bytes or as a part of all."""
    folder = tmp_path / "a run"
    sitting(folder, "offline", 0, 6, killed_after=2.5)
    (first,) = sittings(folder)
    assert history(offline_records(first)) == expected(6)
    (log,) = first.glob("*.wandb")
    os.truncate(log, int(kept if kept > 1 else kept * log.stat().st_size))
    if kept == 1:
        sync(f"wandb sync {shlex.quote(str(folder))}/wandb/offline-run-*")
        (run,) = server.runs.values()
        assert run.history == expected(6)
    sitting(folder, "offline", 3, 8)
    command = said_command(sitting(folder, "offline", 8, 9))
    assert len(sittings(folder)) == (2 if kept == 7 else 3)
    sync(command)
    ((run_id, run),) = server.runs.items()
    assert run_id == (folder / "wandb_id").read_text().strip()
    assert run.history == expected(9)
    assert (run.summary["loss"], run.summary["eval/loss"]) == (1 / 9, 1 / 4)
    about = {key: run.about[key] for key in ("project", "groupName", "jobType", "displayName")}
    assert about == {"project": "tales", "groupName": "demo", "jobType": "dpo", "displayName": "demo/dpo-seed0"}
    assert json.loads(run.about["config"])["beta"]["value"] == 0.25
    assert "No runs to sync" in sync(command)
    assert run.history == expected(9)


@pytest.mark.component
@pytest.mark.parametrize("killed_after", [0, None])
def test_an_interrupted_run_goes_on_online_in_the_same_run(
    tmp_path: Path, server: Server, killed_after: float | None
) -> None:
    """With a checkpoint of step 3; the server has all that was said after it, or lacks some."""
    sitting(tmp_path, "online", 0, 6, killed_after)
    ((run_id, run),) = server.runs.items()
    assert run.history == expected(6)[: len(run.history)]
    assert (run.history == expected(6)) == (killed_after is None)
    sitting(tmp_path, "online", 3, 8)
    assert list(server.runs) == [run_id]
    assert run.history == expected(8)


@pytest.mark.component
def test_what_wandb_lacks_it_is_told_on_resuming(tmp_path: Path, server: Server) -> None:
    """Tracking was off at first; then the connection failed for a while, as if it had been off."""
    sitting(tmp_path, "none", 0, 2)
    sitting(tmp_path, "online", 2, 4)
    (run,) = server.runs.values()
    assert run.history == expected(4)
    sitting(tmp_path, "none", 4, 5)
    sitting(tmp_path, "online", 5, 6)
    assert run.history == expected(6)


# ------------------------------------------------------------------ evaluations


class Given(Benchmark):
    """Figures, and nothing measured."""

    name = "given"

    def evaluate(self, subject: Subject) -> dict[str, Any]:
        samples = [{"prompt": "a", "answer": "b"}]
        return {"reward": 0.75, "kl": 3, "win_rate": float("nan"), "samples": samples, "reward_per_prompt": [1, 0.5]}


def measure(run: Path, model: Path, *words: str) -> dict[str, Any]:
    """`alignlab evaluate`, but for what is measured."""
    config = resolve(compose("evaluate", [f"run={run}", f"reference={model}", *words]))
    config["benchmark"] = {"_target_": f"{__name__}.Given"}
    return evaluate(config)


@pytest.mark.component
@pytest.mark.parametrize("mode", ["online", "offline"])
def test_a_run_s_evaluation_goes_into_its_summary(
    tmp_path: Path, saved: Callable[..., Path], server: Server, mode: str
) -> None:
    folder = tmp_path / "dpo"
    sitting(folder, mode, 0, 2)
    names = {"project": "tales", "group": "demo", "job_type": "dpo", "name": "demo/dpo-seed0"}
    tracker = {"_target_": WANDB, "mode": mode, **names}
    (folder / "config.yaml").write_text(yaml.safe_dump({"beta": 0.25, "tracker": tracker}))
    (folder / "model").symlink_to(saved())
    said = forked(lambda: measure(folder, saved(), "tracker=wandb", f"tracker.mode={mode}"), tmp_path / "log")
    if mode == "offline":
        sync(said_command(said))
    ((run_id, run),) = server.runs.items()
    assert run_id == (folder / "wandb_id").read_text().strip()
    assert run.history == expected(2)
    assert run.summary == {
        "step": 2,
        "loss": 0.5,
        "eval/loss": 1.0,
        "given/reward": 0.75,
        "given/kl": 3,
        "given/samples_per_answer": 1,
    }
    assert (run.about["jobType"], run.about["displayName"]) == ("dpo", "demo/dpo-seed0")
    assert [line["step"] for line in lines(folder)] == [1, 2, 2]


@pytest.mark.component
def test_what_is_not_trained_is_a_run_of_its_own(tmp_path: Path, saved: Callable[..., Path], server: Server) -> None:
    out = tmp_path / "sft-seed0"
    forked(lambda: measure(saved(), saved(), f"out={out}", "tracker=wandb", "tracker.group=demo"), tmp_path / "log")
    ((run_id, run),) = server.runs.items()
    assert run_id == (out / "wandb_id").read_text().strip()
    assert run.summary["given/reward"] == 0.75
    about = {key: run.about[key] for key in ("project", "groupName", "jobType", "displayName")}
    assert about == {"project": "alignlab", "groupName": "demo", "jobType": "evaluate", "displayName": "sft-seed0"}
    assert not (out / "metrics.jsonl").exists()


def test_an_evaluation_goes_on_without_wandb(
    tmp_path: Path, saved: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    assert measure(saved(), saved(), f"out={tmp_path}", "tracker=wandb")["reward"] == 0.75
    assert json.loads((tmp_path / "evaluation.json").read_text())["reward"] == 0.75
    (record,) = caplog.records
    assert "wandb failed: ModuleNotFoundError" in record.getMessage()


def test_by_default_evaluations_are_not_tracked(
    tmp_path: Path, saved: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    measure(saved(), saved(), f"out={tmp_path}")
    assert caplog.records == []
    assert sorted(path.name for path in tmp_path.iterdir()) == ["evaluation.json"]


# ------------------------------------------------------------------ names


def test_names_are_given_where_there_are_none() -> None:
    names = {"group": "demo", "job_type": "sft", "name": "demo/sft"}
    target = {"_target_": WANDB, "tags": ["a"]}
    none = dict.fromkeys(names)
    assert named({**target, "mode": "offline", **none}, **names) == {**target, "mode": "offline", **names}
    own = {**target, "mode": "online", **none, "name": "mine"}
    assert named(own, **names) == {**own, "group": "demo", "job_type": "sft"}
    for off in ({"_target_": None}, {}):
        assert named(off, **names) == off
    few = {"_target_": "alignlab.training.callbacks.trackers.TensorBoard", "folder": "tensorboard"}
    assert named(few, **names) == few, "a tracker is told what it has a key for"
    with pytest.raises(ConfigError, match=r"tracker\._target_=nowhere\.Nobody"):
        named({"_target_": "nowhere.Nobody"}, **names)
