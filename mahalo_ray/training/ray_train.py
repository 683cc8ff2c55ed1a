"""One training stage on Ray Train, from the driver: start it, watch it, hand back its metrics."""

from __future__ import annotations

import json
import logging
import math
import os
import threading
import uuid
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow.fs
import ray.exceptions
import ray.train
import ray.train.torch
from ray.train import Checkpoint, UserCallback
from ray.train.v2._internal.execution.scaling_policy import FixedScalingPolicy

from mahalo_ray.config import ClusterConfig
from mahalo_ray.data import storage
from mahalo_ray.data.temporary import temporary_folder
from mahalo_ray.errors import StageError
from mahalo_ray.training.settings import ProgressFunction, StageSettings

# What would come again on every retry: wrong input or a programming error. A lost process, a broken
# connection, a hiccup of the storage or of the device are RuntimeErrors, OSErrors or Ray's own.
FINAL_ERRORS = (
    ValueError,
    TypeError,
    LookupError,
    AttributeError,
    AssertionError,
    ImportError,
    FileNotFoundError,
)

logger = logging.getLogger(__name__)


class ProgressFile(UserCallback):
    """Controller side: appends one JSON line per report or failure.

    An error that would come again is not worth the retries of FailureConfig. Raised here, it ends the run;
    unless another worker failed for another reason, of which it may be a consequence.
    """

    def __init__(self, path: Path) -> None:
        self._path = path

    def after_report(
        self, run_context: Any, metrics: list[dict[str, Any]], checkpoint: Checkpoint | None
    ) -> None:
        """Pass rank 0's report on."""
        self._append({"report": metrics[0]})

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
        """Pass the failure on, or end the run."""
        errors = dict(sorted(worker_exceptions.items()))
        if all(isinstance(error, FINAL_ERRORS) for error in errors.values()):
            raise next(iter(errors.values()))
        self._append({"failures": {rank: _first_line(error) for rank, error in errors.items()}})

    def _append(self, news: dict[str, Any]) -> None:
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(news) + "\n")


class ProgressReader:
    """Driver side: hands complete new lines to the progress function, failures and the first alarm to the
    log."""

    def __init__(self, path: Path, settings: StageSettings, progress: ProgressFunction | None) -> None:
        self._path, self._settings, self._progress = path, settings, progress
        self._read, self._alarmed = 0, False

    def poll(self) -> None:
        """Read what is new."""
        if not self._path.exists():
            return
        with self._path.open("rb") as file:
            file.seek(self._read)
            lines = file.read().splitlines(keepends=True)
        for line in lines:
            if not line.endswith(b"\n"):
                return
            self._read += len(line)
            self._tell(json.loads(line))

    def _tell(self, news: dict[str, Any]) -> None:
        if "failures" in news:
            what = "; ".join(f"worker {rank}: {text}" for rank, text in news["failures"].items())
            name = self._settings.name
            logger.warning("%s: training failed (%s); it goes on from the last checkpoint", name, what)
            return
        report = news["report"]
        metrics = report.get("metrics", {})
        alarm = None if self._alarmed else self._settings.alarm(metrics)
        if alarm is not None:
            self._alarmed = True
            logger.warning("%s: %s", self._settings.name, alarm)
        if self._progress is not None:
            self._progress(report["done"], report["of"], report["unit"], metrics)


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}"[:300]


# Ray Train reads these in the driver and passes them on. They are set only where the user has not.
_RAY_TRAIN_ENVIRONMENT = {
    # `ray.train.report` waits for the controller's next look: 2 s by default.
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.1",
    # Actors start slowly on a busy machine.
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "300",
    # One process less to start; the loop makes no use of preemption notices.
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
    "RAY_TRAIN_METRICS_ENABLED": "0",
}


@dataclass(frozen=True)
class TrainingResult:
    """`metrics`: final metrics, held-out ones included. `history`: one entry per report, in order of
    steps."""

    metrics: dict[str, float]
    history: list[dict[str, float]]


class RaySession:
    """`loop.TrainingSession` of a Ray Train worker."""

    def report(self, news: dict[str, Any], checkpoint: Path | None = None) -> None:
        """`ray.train.report`: a barrier of all workers."""
        if checkpoint is None:
            ray.train.report(news)
            return
        # A name of its own for every attempt: what an interrupted one left behind is never mixed in. (Ray
        # Train takes rank 0's for all.)
        name = f"step_{news['done']:06d}_{uuid.uuid4().hex[:8]}"
        ray.train.report(
            news, checkpoint=Checkpoint.from_directory(str(checkpoint)), checkpoint_dir_name=name
        )

    @contextmanager
    def latest_checkpoint(self) -> Iterator[tuple[Path, str] | None]:
        """What Ray Train recorded last, fetched to this node."""
        checkpoint = ray.train.get_checkpoint()
        if checkpoint is None:
            yield None
            return
        with checkpoint.as_directory() as folder:
            yield Path(folder), checkpoint.path


def worker(settings: StageSettings) -> dict[str, Any]:
    """What every Ray Train worker runs. Imports are here: they take seconds and only workers need them."""
    # Ray Train logs every report at INFO under a name its own log level does not reach.
    logging.getLogger().setLevel(logging.WARNING)
    from mahalo_ray.training.loop import train
    from mahalo_ray.training.recipes import build_recipe

    return train(partial(build_recipe, settings), settings, RaySession())


def run_stage(
    settings: StageSettings,
    *,
    cluster: ClusterConfig,
    run_dir: str,
    progress: ProgressFunction | None = None,
) -> TrainingResult:
    """Train with Ray Train: `SftSettings`, `RewardSettings` or `PolicySettings`; the model's folder results.

    `run_dir`: folder or URL for checkpoints; calling again with the same settings after an interruption goes
    on from the latest. They are deleted once the finished model is stored.

    Raises ValueError (what the user can mend, among it a loss that is not finite) or StageError (workers
    failed more often than cluster.max_failures). KeyboardInterrupt passes through; the actors end with the
    Ray job.
    """
    for variable, value in _RAY_TRAIN_ENVIRONMENT.items():
        os.environ.setdefault(variable, value)
    settings = settings.absolute()
    name = f"{settings.name}-{settings.identity()}"
    with temporary_folder("progress") as folder:
        news = Path(folder) / "news.jsonl"
        trainer = make_trainer(settings, cluster, storage.absolute(run_dir), name, news)
        result = fit(trainer, ProgressReader(news, settings, progress))
    storage.remove(storage.join(run_dir, name))
    trained = TrainingResult(**result.return_value)
    for note in settings.notes(trained.metrics):
        logger.warning("%s: %s", settings.name, note)
    return trained


# Parts of Ray Train that start an actor of their own, a second or two each, and do nothing here: the first
# serves Ray Data sets, of which there are none; the second removes placement groups after the controller's
# sudden death, which the end of the Ray job does too, and without a dashboard it complains every second.
_UNUSED_CALLBACKS = ("DatasetsCallback", "PlacementGroupCleanerCallback")


class SteadyWorkers(FixedScalingPolicy):
    """As many workers as asked for, from first to last, without the actor that tells an autoscaler of them: a
    placement group that waits for its nodes is demand enough."""

    def after_controller_start(self, train_run_context: Any) -> None:
        """Nobody to tell."""

    def _maybe_send_resource_request(self) -> None:
        """Nobody to tell."""

    def _cancel_resource_request(self) -> None:
        """Nothing to take back."""


class QuickTrainer(ray.train.torch.TorchTrainer):
    """A TorchTrainer without the parts that are not used here."""

    def _create_default_callbacks(self) -> list[Any]:
        callbacks = super()._create_default_callbacks()
        return [callback for callback in callbacks if type(callback).__name__ not in _UNUSED_CALLBACKS]

    def _initialize_and_run_controller(self, **arguments: Any) -> ray.train.Result:
        steady = SteadyWorkers(self.scaling_config)
        return super()._initialize_and_run_controller(**{**arguments, "scaling_policy": steady})


def make_trainer(
    settings: StageSettings, cluster: ClusterConfig, run_dir: str, name: str, news: Path
) -> QuickTrainer:
    """Ray Train's trainer for a stage."""
    resources = {"CPU": cluster.cpus_per_train_worker, **({"GPU": 1} if cluster.use_gpu else {})}
    fs, path = storage.filesystem(run_dir)
    remote = storage.absolute(run_dir) != path
    return QuickTrainer(
        worker,
        train_loop_config=settings,
        torch_config=ray.train.torch.TorchConfig(backend="nccl" if cluster.use_gpu else "gloo"),
        scaling_config=ray.train.ScalingConfig(
            num_workers=cluster.train_workers, use_gpu=cluster.use_gpu, resources_per_worker=resources
        ),
        run_config=ray.train.RunConfig(
            name=name,
            storage_path=path,
            storage_filesystem=pyarrow.fs.PyFileSystem(pyarrow.fs.FSSpecHandler(fs)) if remote else None,
            failure_config=ray.train.FailureConfig(max_failures=cluster.max_failures),
            checkpoint_config=ray.train.CheckpointConfig(num_to_keep=settings.training.keep_checkpoints),
            callbacks=[ProgressFile(news)],
            worker_runtime_env={"env_vars": worker_environment(cluster)},
            logging_config=ray.train.LoggingConfig(log_level="CRITICAL"),
        ),
    )


def worker_environment(cluster: ClusterConfig) -> dict[str, str]:
    """Environment of the training workers: threads as many as their CPUs, and no noise."""
    return {
        "OMP_NUM_THREADS": str(max(1, math.floor(cluster.cpus_per_train_worker))),
        "DS_ACCELERATOR": cluster.device,
        "PYTHONWARNINGS": "ignore::FutureWarning",
        "TOKENIZERS_PARALLELISM": "false",
        "TRANSFORMERS_VERBOSITY": "error",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    }


def fit(trainer: ray.train.torch.TorchTrainer, reader: ProgressReader) -> ray.train.Result:
    """`trainer.fit()` in a thread of its own, so that this one can show progress and take Ctrl-C as Python
    does."""
    outcome: Future[ray.train.Result] = Future()

    def run() -> None:
        try:
            outcome.set_result(trainer.fit())
        except (ray.train.TrainingFailedError, ray.exceptions.RayError) as error:
            outcome.set_exception(error)

    thread = threading.Thread(target=run, name="ray-train-fit", daemon=True)
    thread.start()
    while thread.is_alive():
        thread.join(0.2)
        reader.poll()
    reader.poll()  # what came between the last look and the end
    if not outcome.done():
        raise StageError("Ray Train could not be started; the traceback above says why")
    error = outcome.exception()
    if error is None:
        return outcome.result()
    cause = getattr(error, "controller_failure", error)
    if isinstance(cause, FINAL_ERRORS):
        raise cause from None
    raise StageError(f"training failed for good: {cause}") from error
