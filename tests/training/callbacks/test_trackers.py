"""TensorBoard, MLflow and trackio are told every line of metrics once, also by a run that goes on."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from alignlab.training.callbacks.logging import MetricsLog
from alignlab.training.callbacks.trackers import Mlflow, TensorBoard, Trackio
from tests.components import need

pytestmark = pytest.mark.component

CONFIG = {"algorithm": {"beta": 0.1}, "judge": {"api_key": "abracadabra"}}
LINES = [(1, 0.5), (2, 0.25), (3, 0.125), (4, 0.0625)]


def interrupted(folder: Path, tracker: type, **settings: object) -> None:
    """Three steps, then from the checkpoint of the second on again, as a run that was killed does."""
    first = MetricsLog(folder, tracker(**settings), CONFIG)
    for step, loss in LINES[:3]:
        first.log(step, {"loss": loss})
    first.close(failed=True)
    with MetricsLog(folder, tracker(**settings), CONFIG) as second:
        second.resume(2)
        for step, loss in LINES[2:]:
            second.log(step, {"loss": loss})


def test_tensorboard_has_each_step_once(tmp_path: Path) -> None:
    need("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    interrupted(tmp_path / "run", TensorBoard)
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("loss")] == LINES


def test_mlflow_goes_on_with_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    need("mlflow")
    from mlflow import MlflowClient

    uri = f"file://{tmp_path}/store"
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    interrupted(tmp_path / "run", Mlflow, uri=uri, project="tales", group="demo", name="mine")
    client = MlflowClient(uri)
    experiment = client.get_experiment_by_name("tales")
    assert experiment is not None
    (run,) = client.search_runs([experiment.experiment_id])
    assert (run.info.run_name, run.info.status, run.data.tags["group"]) == ("mine", "FINISHED", "demo")
    assert run.data.params == {"algorithm.beta": "0.1", "judge.api_key": "<secret>"}
    history = client.get_metric_history(run.info.run_id, "loss")
    assert sorted((m.step, m.value) for m in history) == LINES


def test_trackio_goes_on_with_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    need("trackio")
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    trackio = pytest.importorskip("trackio")
    monkeypatch.setattr(trackio.sqlite_storage, "TRACKIO_DIR", tmp_path / "trackio", raising=False)
    interrupted(tmp_path / "run", Trackio, project="tales", name="mine")
    from trackio import SQLiteStorage

    logs = SQLiteStorage.get_logs("tales", "mine")
    assert sorted((line["step"], line["loss"]) for line in logs) == LINES


def test_a_tracker_that_is_not_installed_stops_no_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "mlflow", None)
    with MetricsLog(tmp_path, Mlflow(), {}) as log:
        log.log(1, {"loss": 1.0})
    assert "mlflow failed: ModuleNotFoundError" in caplog.text
    assert "tracker=none does without" in caplog.text
    assert importlib.util.find_spec("alignlab") is not None
