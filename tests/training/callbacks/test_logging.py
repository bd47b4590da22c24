from __future__ import annotations

import json
import math
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import yaml

from alignlab.core import AlignlabError
from alignlab.training.callbacks.logging import MetricsLog
from alignlab.training.callbacks.trackers import Wandb, build_tracker

CONFIGS = Path(__file__).parents[3] / "configs" / "tracker"


def lines(folder: Path) -> list[dict[str, Any]]:
    def no_such_thing(name: str) -> None:
        raise AssertionError(f"{name} is not JSON")

    text = (folder / "metrics.jsonl").read_text()
    assert text == "" or text.endswith("\n")
    return [json.loads(line, parse_constant=no_such_thing) for line in text.splitlines()]


# ------------------------------------------------------------------ metrics.jsonl


def test_a_line_for_each_call_readable_at_once(tmp_path: Path) -> None:
    tracker = MetricsLog(tmp_path / "run", None, {})
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
        tracker = MetricsLog(tmp_path, None, {})
        for step in range(1, 51):
            tracker.log(step, {"loss": 1.0})
        os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(pid, 0)
    assert [line["step"] for line in lines(tmp_path)] == list(range(1, 51))


def test_what_is_not_finite_is_null(tmp_path: Path) -> None:
    with MetricsLog(tmp_path, None, {}) as tracker:
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
    with MetricsLog(tmp_path, None, {}) as tracker:
        tracker.resume(2)
        assert (tmp_path / "metrics.jsonl").read_text() == "".join(kept)
        tracker.log(3, {"loss": 0.25})
    assert (tmp_path / "metrics.jsonl").read_text().startswith("".join(kept))
    assert [(line["step"], line.get("loss")) for line in lines(tmp_path)[3:]] == [(3, 0.25)]
    assert 22.5 <= lines(tmp_path)[-1]["time"] < 31.0  # it goes on from the last line kept
    assert "dropped 2 line(s) after step 2" in caplog.text
    assert "metrics.jsonl:6: damaged" in caplog.text
    assert sorted(path.name for path in tmp_path.iterdir()) == ["metrics.jsonl"]


def test_without_a_checkpoint_the_run_begins_anew(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 0, "time": 1.0}\n{"step": 1, "time": 50.0}\n')
    with MetricsLog(tmp_path, None, {}) as tracker:
        tracker.log(0, {"loss": 1.0})
    (line,) = lines(tmp_path)
    assert line["loss"] == 1.0
    assert line["time"] < 50.0


def test_other_processes_write_nothing(tmp_path: Path) -> None:
    with MetricsLog(tmp_path / "run", Wandb(mode="offline"), {}, is_main=False) as tracker:
        tracker.resume(3)
        tracker.log(4, {"loss": 1.0})
    assert not (tmp_path / "run").exists()


def test_taken_names_are_refused(tmp_path: Path) -> None:
    with pytest.raises(AlignlabError, match="'time'"), MetricsLog(tmp_path, None, {}) as tracker:
        tracker.log(1, {"time": 1.0})


def test_a_full_disk_is_said_clearly(tmp_path: Path) -> None:
    with MetricsLog(tmp_path, None, {}) as tracker:
        tracker.resume(0)
        tracker._close_file()
        tracker._file = open("/dev/full", "w")  # noqa: SIM115
        with pytest.raises(AlignlabError, match=r"metrics could not be recorded.*No space left.*Free some space"):
            tracker.log(1, {"loss": 1.0})


def test_a_folder_that_cannot_be_made_is_said_clearly(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(AlignlabError, match="metrics could not be recorded"):
        MetricsLog(tmp_path / "file" / "run", None, {}).resume(0)


# ------------------------------------------------------------------ settings


@pytest.mark.parametrize("name", ["wandb", "tensorboard", "mlflow", "trackio"])
def test_the_configs_hold_every_setting_with_its_meaning(name: str) -> None:
    text = (CONFIGS / f"{name}.yaml").read_text()
    values = yaml.safe_load(text)
    tracker = build_tracker(values)
    assert tracker is not None
    assert list(values) == ["_target_", *type(tracker).model_fields]
    assert tracker == type(tracker)()  # they differ from the defaults in nothing
    assert all(" # " in line for line in text.splitlines() if not line.startswith(("#", "_target_")))


def test_without_a_target_there_is_no_tracker() -> None:
    assert build_tracker(yaml.safe_load((CONFIGS / "none.yaml").read_text())) is None
