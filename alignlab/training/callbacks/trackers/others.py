"""TensorBoard, MLflow and trackio."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import Field

from alignlab.core.files import write_text
from alignlab.core.settings import Settings


class TensorBoard(Settings):
    """Event files in the run's folder: `tensorboard --logdir runs`.

    Args:
        folder: below the run's folder.
    """

    folder: str = Field("tensorboard", min_length=1)
    _writer: Any = None

    def start(self, folder: Path, config: Mapping[str, Any], lines: int) -> int:
        from torch.utils.tensorboard import SummaryWriter

        place = folder / self.folder
        shutil.rmtree(place, ignore_errors=True)  # written anew from metrics.jsonl: it cannot take steps back
        self._writer = SummaryWriter(str(place))
        return 0

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def summarize(self, metrics: Mapping[str, float]) -> None:
        for name, value in metrics.items():
            self._writer.add_scalar(f"summary/{name}", value)

    def finish(self, failed: bool) -> None:
        self._writer.close()


class Mlflow(Settings):
    """An MLflow run; the server is taken from MLFLOW_TRACKING_URI unless `uri` names one.

    Args:
        uri: of the tracking server or store; None: MLFLOW_TRACKING_URI, or MLflow's own default.
        project: the experiment's name.
        group, job_type: become tags.
        name: the run's; None: its folder's.
    """

    uri: str | None = None
    project: str = Field("alignlab", min_length=1)
    group: str | None = None
    job_type: str | None = None
    name: str | None = None
    _client: Any = None
    _run: str = ""

    def start(self, folder: Path, config: Mapping[str, Any], lines: int) -> None:
        from mlflow import MlflowClient
        from mlflow.entities import Param

        self._client = client = MlflowClient(self.uri)
        known = folder / "mlflow_run_id"
        if known.exists():
            self._run = known.read_text(encoding="utf-8").strip()
            client.update_run(self._run, status="RUNNING")
            return
        experiment = client.get_experiment_by_name(self.project)
        number = experiment.experiment_id if experiment else client.create_experiment(self.project)
        tags = {k: v for k, v in {"group": self.group, "job_type": self.job_type}.items() if v}
        run = client.create_run(number, tags=tags, run_name=self.name or folder.resolve().name)
        self._run = run.info.run_id
        flat = [Param(key, value[:500]) for key, value in _flat(config)]
        for start in range(0, len(flat), 100):  # as many as one request may hold
            client.log_batch(self._run, params=flat[start : start + 100])
        write_text(known, self._run + "\n")

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        import time

        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        self._client.log_batch(self._run, metrics=[Metric(name, v, now, step) for name, v in metrics.items()])

    def summarize(self, metrics: Mapping[str, float]) -> None:
        self.log(0, metrics)

    def finish(self, failed: bool) -> None:
        self._client.set_terminated(self._run, "FAILED" if failed else "FINISHED")


class Trackio(Settings):
    """A trackio run, kept on this machine (`trackio show`) or sent where TRACKIO_SERVER_URL says.

    Args:
        project: its name.
        group: of the run.
        name: the run's; None: its folder's.
    """

    project: str = Field("alignlab", min_length=1)
    group: str | None = None
    name: str | None = None
    _run: Any = None

    def start(self, folder: Path, config: Mapping[str, Any], lines: int) -> None:
        import trackio

        self._run = trackio.init(
            project=self.project,
            name=self.name or folder.resolve().name,
            group=self.group,
            config=dict(config),
            resume="allow",
            embed=False,
            auto_log_gpu=False,
            auto_log_cpu=False,
        )

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        self._run.log(dict(metrics), step=step)

    def summarize(self, metrics: Mapping[str, float]) -> None:
        self._run.log(dict(metrics))

    def finish(self, failed: bool) -> None:
        self._run.finish()


def _flat(config: Any, key: str = "") -> list[tuple[str, str]]:
    """The config's values by dotted key, as text."""
    if isinstance(config, Mapping) and config:
        return [pair for name, value in config.items() for pair in _flat(value, f"{key}.{name}" if key else str(name))]
    return [(key, str(config))]
