"""Training metrics for TensorBoard, MLflow, Trackio or Weights & Biases: `training.report_to`.

Everything is written offline, into `tracking/` beside the finished model, unless the tracker's own
environment variables (MLFLOW_TRACKING_URI, WANDB_MODE, TRACKIO_DIR) say otherwise. Only rank 0 writes. The
packages are extras, so each import comes where its tracker is opened.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

from mahalo_ray.data import storage
from mahalo_ray.training.settings import StageSettings

PROJECT = "mahalo_ray"
FOLDER = "tracking"


class Tracker(Protocol):
    """One place that metrics are sent to."""

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Metrics of an optimizer step."""

    def close(self) -> None:
        """Write what is left."""


def open_trackers(settings: StageSettings, first_step: int) -> list[Tracker]:
    """The trackers of `training.report_to`, going on after `first_step` steps of a resumed run."""
    names = settings.training.report_to
    if not names:
        return []
    place = storage.join(settings.output_url.rstrip("/").rpartition("/")[0], FOLDER)
    folder = _TrackingFolder(place)
    # runs/demo/policy/model -> demo/policy
    run = "/".join(settings.output_url.rstrip("/").split("/")[-3:-1]) or settings.name
    trackers: list[Tracker] = [_TRACKERS[name](folder.path, run, settings, first_step) for name in names]
    return [*trackers, folder]


class _TrackingFolder:
    """The folder itself if it is on a disk, else a temporary one that is copied there at the end."""

    def __init__(self, url: str) -> None:
        self._url, self._temporary = url, None if storage.is_local(url) else tempfile.mkdtemp()
        self.path = Path(self._temporary or url)
        self.path.mkdir(parents=True, exist_ok=True)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Nothing to do before the end."""

    def close(self) -> None:
        if self._temporary is not None:
            storage.upload_folder(self._temporary, self._url)


def _parameters(settings: StageSettings) -> dict[str, Any]:
    """What the trackers show beside the metrics."""
    return {"stage": settings.name, "seed": settings.seed, **settings.training.model_dump(mode="json")}


class _TensorBoard:
    def __init__(self, folder: Path, run: str, settings: StageSettings, first_step: int) -> None:
        from tensorboardX import SummaryWriter

        # Steps that a killed attempt has written after its last checkpoint come again: they are purged.
        self._writer = SummaryWriter(str(folder), purge_step=first_step + 1 if first_step else None)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        for name, value in metrics.items():
            if name != "step":
                self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()


class _MLflow:
    def __init__(self, folder: Path, run: str, settings: StageSettings, first_step: int) -> None:
        import mlflow

        store = os.environ.get("MLFLOW_TRACKING_URI", f"sqlite:///{folder / 'mlflow.db'}")
        self._client = mlflow.MlflowClient(store)
        known = self._client.get_experiment_by_name(PROJECT)
        experiment = (
            known.experiment_id
            if known is not None
            else self._client.create_experiment(PROJECT, (folder / "mlflow").as_uri())
        )
        # A resumed run goes on under the id that its first attempt left.
        saved = folder / "mlflow_run_id"
        if first_step and saved.exists():
            self._run = saved.read_text(encoding="utf-8")
            return
        self._run = self._client.create_run(experiment, run_name=run).info.run_id
        saved.write_text(self._run, encoding="utf-8")
        for name, value in _parameters(settings).items():
            self._client.log_param(self._run, name, value)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        values = [Metric(name, value, now, step) for name, value in metrics.items() if name != "step"]
        self._client.log_batch(self._run, metrics=values)

    def close(self) -> None:
        self._client.set_terminated(self._run)


class _Trackio:
    def __init__(self, folder: Path, run: str, settings: StageSettings, first_step: int) -> None:
        os.environ.setdefault("TRACKIO_DIR", str(folder / "trackio"))
        import trackio

        self._run = trackio.init(PROJECT, name=run, config=_parameters(settings), resume="allow")

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        self._run.log({name: value for name, value in metrics.items() if name != "step"}, step=step)

    def close(self) -> None:
        self._run.finish()


class _Wandb:
    def __init__(self, folder: Path, run: str, settings: StageSettings, first_step: int) -> None:
        import wandb

        self._run = wandb.init(
            project=PROJECT,
            name=run,
            id=settings.identity(),
            resume="allow",
            dir=str(folder),
            config=_parameters(settings),
            mode=os.environ.get("WANDB_MODE", "offline"),
        )

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        self._run.log({name: value for name, value in metrics.items() if name != "step"}, step=step)

    def close(self) -> None:
        self._run.finish()


_TRACKERS: dict[str, Callable[[Path, str, StageSettings, int], Tracker]] = {
    "tensorboard": _TensorBoard,
    "mlflow": _MLflow,
    "trackio": _Trackio,
    "wandb": _Wandb,
}
