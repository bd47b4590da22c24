from __future__ import annotations

import json
import logging
import math
import os
import signal
import struct
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import ValidationError

from alignlab.core import AlignlabError
from alignlab.training.tracking import Tracker, TrackerSettings

OFF = TrackerSettings()
CONFIGS = Path(__file__).parents[2] / "configs" / "tracker"


def lines(folder: Path) -> list[dict[str, Any]]:
    def no_such_thing(name: str) -> None:
        raise AssertionError(f"{name} is not JSON")

    text = (folder / "metrics.jsonl").read_text()
    assert text == "" or text.endswith("\n")
    return [json.loads(line, parse_constant=no_such_thing) for line in text.splitlines()]


# ------------------------------------------------------------------ metrics.jsonl


def test_a_line_for_each_call_readable_at_once(tmp_path: Path) -> None:
    tracker = Tracker(tmp_path / "run", OFF, {})
    tracker.log(1, {"loss": 0.5, "tokens": 12})
    assert list(lines(tmp_path / "run")[0]) == ["step", "time", "loss", "tokens"]
    tracker.log(1, {"eval/loss": 0.25})
    tracker.log(2, {"loss": 1e-30})
    tracker.close()
    found = lines(tmp_path / "run")
    assert [{k: v for k, v in line.items() if k != "time"} for line in found] == [
        {"step": 1, "loss": 0.5, "tokens": 12.0},
        {"step": 1, "eval/loss": 0.25},
        {"step": 2, "loss": 1e-30},
    ]
    times = [line["time"] for line in found]
    assert times == sorted(times)
    assert times[0] >= 0


def test_a_killed_process_loses_no_line(tmp_path: Path) -> None:
    pid = os.fork()
    if pid == 0:
        tracker = Tracker(tmp_path, OFF, {})
        for step in range(1, 51):
            tracker.log(step, {"loss": 1.0})
        os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(pid, 0)
    assert [line["step"] for line in lines(tmp_path)] == list(range(1, 51))


def test_what_is_not_finite_is_null(tmp_path: Path) -> None:
    with Tracker(tmp_path, OFF, {}) as tracker:
        tracker.log(1, {"a": math.nan, "b": math.inf, "c": -math.inf, "d": 0.0})
    (line,) = lines(tmp_path)
    assert [line[name] for name in "abcd"] == [None, None, None, 0.0]


def test_resuming_drops_what_comes_again(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    kept = [
        '{"step": 1, "time": 10.5, "loss": 0.75}\n',
        '{"step": 2, "time": 21.0, "loss": null}\n',
        '{"step": 2, "time": 22.5, "eval/loss": 0.5}\n',
    ]
    later = ['{"step": 3, "time": 31.0, "loss": 0.5}\n', '{"step": 4, "time": 42.0, "loss": 0.4}\n', '{"step": 5, "ti']
    (tmp_path / "metrics.jsonl").write_text("".join(kept + later))
    with Tracker(tmp_path, OFF, {}) as tracker:
        tracker.resume(2)
        assert (tmp_path / "metrics.jsonl").read_text() == "".join(kept)
        tracker.log(3, {"loss": 0.25})
    assert (tmp_path / "metrics.jsonl").read_text().startswith("".join(kept))
    assert [(line["step"], line.get("loss")) for line in lines(tmp_path)[3:]] == [(3, 0.25)]
    assert 22.5 <= lines(tmp_path)[-1]["time"] < 31.0  # it goes on from the last line kept
    assert "dropped 2 line(s) after step 2" in caplog.text
    assert "metrics.jsonl:6: not a line of metrics" in caplog.text
    assert sorted(path.name for path in tmp_path.iterdir()) == ["metrics.jsonl"]


def test_without_a_checkpoint_the_run_begins_anew(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 0, "time": 1.0}\n{"step": 1, "time": 50.0}\n')
    with Tracker(tmp_path, OFF, {}) as tracker:
        tracker.log(0, {"loss": 1.0})
    (line,) = lines(tmp_path)
    assert line["loss"] == 1.0
    assert line["time"] < 50.0


def test_other_processes_write_nothing(tmp_path: Path) -> None:
    with Tracker(tmp_path / "run", TrackerSettings(mode="offline"), {}, is_main=False) as tracker:
        tracker.resume(3)
        tracker.log(4, {"loss": 1.0})
    assert not (tmp_path / "run").exists()


def test_taken_names_are_refused(tmp_path: Path) -> None:
    with pytest.raises(AlignlabError, match="'time'"), Tracker(tmp_path, OFF, {}) as tracker:
        tracker.log(1, {"time": 1.0})


def test_a_full_disk_is_said_clearly(tmp_path: Path) -> None:
    with Tracker(tmp_path, OFF, {}) as tracker:
        tracker.resume(0)
        tracker._close_file()
        tracker._file = open("/dev/full", "w")  # noqa: SIM115
        with pytest.raises(AlignlabError, match=r"metrics could not be recorded.*No space left.*Free some space"):
            tracker.log(1, {"loss": 1.0})


def test_a_folder_that_cannot_be_made_is_said_clearly(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(AlignlabError, match="metrics could not be recorded"):
        Tracker(tmp_path / "file" / "run", OFF, {}).resume(0)


# ------------------------------------------------------------------ settings


@pytest.mark.parametrize(("name", "mode"), [("none", "off"), ("wandb", "online")])
def test_the_configs_hold_every_setting_with_its_meaning(name: str, mode: str) -> None:
    text = (CONFIGS / f"{name}.yaml").read_text()
    values = yaml.safe_load(text)
    settings = TrackerSettings(**values)
    assert settings.mode == mode
    assert list(values) == (["mode"] if mode == "off" else list(TrackerSettings.model_fields))
    assert settings.model_copy(update={"mode": "off"}) == OFF  # they differ from the defaults in nothing else
    assert all(" # " in line for line in text.splitlines()[1:])


def test_a_bare_off_in_yaml_is_off() -> None:
    assert TrackerSettings(**yaml.safe_load("mode: off")).mode == "off"
    with pytest.raises(ValidationError):
        TrackerSettings(mode=True)  # type: ignore[arg-type]


# ------------------------------------------------------------------ wandb


@pytest.fixture
def wandb_here(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """wandb is installed, and neither the user's login nor settings of theirs are used."""
    try:
        import wandb  # noqa: F401
    except ImportError:
        if os.environ.get("ALIGNLAB_REQUIRE_COMPONENTS") == "1":
            pytest.fail("wandb is not installed, and ALIGNLAB_REQUIRE_COMPONENTS=1 asks for it")
        pytest.skip("wandb is not installed")
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    (tmp_path / "home").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.delenv("NETRC", raising=False)
    monkeypatch.setenv("WANDB_SILENT", "true")


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


def history(records: list[Any]) -> list[dict[str, Any]]:
    found = []
    for record in records:
        if record.WhichOneof("record_type") == "history":
            items = {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
            found.append({key: value for key, value in items.items() if not key.startswith("_")})
    return found


@pytest.mark.component
def test_wandb_offline_gets_the_metrics_and_a_resumed_run_goes_on(
    tmp_path: Path, wandb_here: None, caplog: pytest.LogCaptureFixture
) -> None:
    settings = TrackerSettings(mode="offline", project="tales", group="comparison", name="dpo-1", tags=["a", "b"])
    config = {"algorithm": {"beta": 0.1}, "judge": {"api_key": "abracadabra"}}
    with Tracker(tmp_path / "run", settings, config) as tracker:
        tracker.log(1, {"loss": 0.5})
        tracker.log(2, {"loss": 0.25, "eval/loss": 0.75})
        tracker.log(3, {"loss": 0.125})
    (first,) = (tmp_path / "run" / "wandb").glob("offline-run-*")
    records = finished(first)
    assert history(records) == [
        {"step": 1, "loss": 0.5},
        {"step": 2, "loss": 0.25, "eval/loss": 0.75},
        {"step": 3, "loss": 0.125},
    ]
    run_id = (tmp_path / "run" / "wandb_id").read_text().strip()
    (run,) = [record.run for record in records if record.WhichOneof("record_type") == "run"]
    assert (run.run_id, run.project, run.run_group, run.job_type) == (run_id, "tales", "comparison", "train")
    assert (run.display_name, list(run.tags)) == ("dpo-1", ["a", "b"])
    given = {item.key: json.loads(item.value_json) for item in run.config.update}
    assert given["algorithm"] == {"beta": 0.1}
    assert not [
        path for path in (tmp_path / "run").rglob("*") if path.is_file() and b"abracadabra" in path.read_bytes()
    ]
    metrics = [record.metric for record in records if record.WhichOneof("record_type") == "metric"]
    assert ("*", "step") in {(metric.glob_name, metric.step_metric) for metric in metrics}

    time.sleep(1.1)  # wandb names its folders by the second
    with Tracker(tmp_path / "run", settings, config) as tracker:
        tracker.resume(2)
        tracker.log(3, {"loss": 0.0625})
    (second,) = set((tmp_path / "run" / "wandb").glob("offline-run-*")) - {first}
    assert history(finished(second)) == [{"step": 3, "loss": 0.0625}]
    assert second.name.endswith(run_id)
    assert [line["loss"] for line in lines(tmp_path / "run")] == [0.5, 0.25, 0.0625]
    assert [record for record in caplog.records if record.levelno >= logging.ERROR] == []


def test_without_wandb_training_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    with Tracker(tmp_path, TrackerSettings(mode="online"), {}) as tracker:
        for step in range(1, 4):
            tracker.log(step, {"loss": 1.0})
    assert [line["step"] for line in lines(tmp_path)] == [1, 2, 3]
    (record,) = caplog.records
    assert record.levelno == logging.ERROR
    assert "wandb failed: ModuleNotFoundError" in record.getMessage()
    assert "Training goes on" in record.getMessage()


def run_python(code: str, folder: Path, **streams: Any) -> subprocess.CompletedProcess[str]:
    """In a process of its own, since wandb keeps its state in the process."""
    command = [sys.executable, "-c", code, str(folder)]
    return subprocess.run(command, cwd=Path(__file__).parents[2], timeout=60, text=True, **streams)


@pytest.mark.component
def test_wandb_dying_in_the_middle_does_not_stop_training(tmp_path: Path, wandb_here: None) -> None:
    code = """
import sys, pathlib, psutil
from alignlab.training.tracking import Tracker, TrackerSettings
with Tracker(pathlib.Path(sys.argv[1]), TrackerSettings(mode="offline"), {}) as tracker:
    tracker.log(1, {"loss": 1.0})
    children = psutil.Process().children(recursive=True)
    assert any("wandb" in child.name() for child in children)
    for child in children:
        child.kill()
    psutil.wait_procs(children)
    for step in range(2, 100):
        tracker.log(step, {"loss": 1.0})
"""
    done = run_python(code, tmp_path, capture_output=True)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("wandb failed") == 1
    assert [line["step"] for line in lines(tmp_path)] == list(range(1, 100))


def read_to_the_end(terminal: int) -> str:
    """All that is written to a pseudo-terminal until its other side is closed, which Linux reports as an error."""
    said = b""
    try:
        while chunk := os.read(terminal, 10_000):
            said += chunk
    except OSError:
        pass
    return said.decode()


@pytest.mark.component
def test_without_a_login_wandb_asks_nothing_even_on_a_terminal(
    tmp_path: Path, wandb_here: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Left to itself it would wait for an answer, for ever."""
    monkeypatch.delenv("WANDB_SILENT")
    monkeypatch.setenv("TERM", "xterm")
    code = """
import sys, pathlib
from alignlab.training.tracking import Tracker, TrackerSettings
stdin = sys.stdin
assert stdin.isatty() and sys.stderr.isatty()
with Tracker(pathlib.Path(sys.argv[1]), TrackerSettings(mode="online"), {}) as tracker:
    tracker.log(1, {"loss": 1.0})
assert sys.stdin is stdin
"""
    ours, theirs = os.openpty()
    with ThreadPoolExecutor(1) as pool:
        reading = pool.submit(read_to_the_end, ours)
        try:
            done = run_python(code, tmp_path, stdin=theirs, stderr=theirs, stdout=theirs)
        finally:
            os.close(theirs)
        said = reading.result()
    os.close(ours)
    assert done.returncode == 0, said
    assert "wandb failed" in said
    assert "wandb login" in said
    assert "Enter your choice" not in said
    assert [line["step"] for line in lines(tmp_path)] == [1]
