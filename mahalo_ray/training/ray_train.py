"""One training stage on Ray Train, from the driver: start it, watch it, hand back its figures."""

from __future__ import annotations

import hashlib
import logging
import math
import os
import tempfile
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow.fs
import ray.exceptions
import ray.train
import ray.train.torch

from mahalo_ray.config import ClusterConfig, ModelConfig, TrainingConfig
from mahalo_ray.data import storage
from mahalo_ray.errors import StageError
from mahalo_ray.training.progress import FINAL_ERRORS, ProgressFile, ProgressFunction, ProgressReader

if TYPE_CHECKING:
    from mahalo_ray.training.recipe import Recipe

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
    """`metrics`: final figures, held-out ones included. `history`: one entry per report, in order of
    steps."""

    metrics: dict[str, float]
    history: list[dict[str, float]]


@dataclass(frozen=True)
class Stage:
    """One training stage as it is sent to the workers: which recipe, its arguments, and where the model
    goes."""

    recipe: str
    training: TrainingConfig
    model: ModelConfig
    cluster: ClusterConfig
    seed: int
    output_url: str
    arguments: tuple[Any, ...]

    def identity(self, inputs: Sequence[str]) -> str:
        """A short hash of everything that shapes the result; checkpoints are kept under it."""
        parts = [self.recipe, str(self.seed), self.output_url]
        parts += [
            part.model_dump_json() if hasattr(part, "model_dump_json") else repr(part)
            for part in self.arguments
        ]
        parts += [storage.fingerprint(file) for url in inputs for file in storage.list_files(url)]
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:12]


def worker(stage: Stage) -> dict[str, Any]:
    """What every Ray Train worker runs. Imports are here: they take seconds and only workers need them."""
    # Ray Train logs every report at INFO under a name its own log level does not reach.
    logging.getLogger().setLevel(logging.WARNING)
    import torch

    from mahalo_ray.training.loop import LoopSettings, train

    settings = LoopSettings(stage.training, getattr(torch, stage.model.dtype), stage.seed, stage.output_url)
    return train(partial(recipe_class(stage.recipe), *stage.arguments), settings)


def recipe_class(name: str) -> Callable[..., Recipe]:
    """The recipe of that name."""
    if name == "sft":
        from mahalo_ray.training.sft import SftRecipe

        return SftRecipe
    if name == "policy":
        from mahalo_ray.training.policy import PolicyRecipe

        return PolicyRecipe
    from mahalo_ray.training.reward import RewardRecipe

    assert name == "reward"
    return RewardRecipe


def run_stage(
    stage: Stage, run_dir: str, inputs: Sequence[str], progress: ProgressFunction | None
) -> TrainingResult:
    """Run a stage with Ray Train; checkpoints are deleted once the finished model is stored.

    Raises ValueError (what the user can mend, among it a loss that is not finite) or StageError (workers
    failed more often than cluster.max_failures). KeyboardInterrupt passes through; the actors end with the
    Ray job.
    """
    for name, value in _RAY_TRAIN_ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    name = f"{stage.recipe}-{stage.identity(inputs)}"
    with tempfile.TemporaryDirectory(prefix="mahalo-progress-") as folder:
        news = Path(folder) / "news.jsonl"
        trainer = make_trainer(stage, storage.absolute(run_dir), name, news)
        result = fit(trainer, ProgressReader(news, stage.recipe, progress))
    storage.remove(storage.join(run_dir, name))
    return TrainingResult(**result.return_value)


# Parts of Ray Train that start an actor of their own, a second or two each, and do nothing here: the first
# serves Ray Data sets, of which there are none; the second removes placement groups after the controller's
# sudden death, which the end of the Ray job does too, and without a dashboard it complains every second.
_UNUSED_CALLBACKS = ("DatasetsCallback", "PlacementGroupCleanerCallback")


class QuickTrainer(ray.train.torch.TorchTrainer):
    """A TorchTrainer without the parts that are not used here."""

    def _create_default_callbacks(self) -> list[Any]:
        callbacks = super()._create_default_callbacks()
        return [callback for callback in callbacks if type(callback).__name__ not in _UNUSED_CALLBACKS]


def make_trainer(stage: Stage, run_dir: str, name: str, news: Path) -> QuickTrainer:
    """Ray Train's trainer for a stage."""
    cluster = stage.cluster
    resources = {"CPU": cluster.cpus_per_train_worker, **({"GPU": 1} if cluster.use_gpu else {})}
    fs, path = storage.filesystem(run_dir)
    remote = storage.absolute(run_dir) != path
    return QuickTrainer(
        worker,
        train_loop_config=stage,
        torch_config=ray.train.torch.TorchConfig(backend="nccl" if cluster.use_gpu else "gloo"),
        scaling_config=ray.train.ScalingConfig(
            num_workers=cluster.train_workers, use_gpu=cluster.use_gpu, resources_per_worker=resources
        ),
        run_config=ray.train.RunConfig(
            name=name,
            storage_path=path,
            storage_filesystem=pyarrow.fs.PyFileSystem(pyarrow.fs.FSSpecHandler(fs)) if remote else None,
            failure_config=ray.train.FailureConfig(max_failures=cluster.max_failures),
            checkpoint_config=ray.train.CheckpointConfig(num_to_keep=stage.training.keep_checkpoints),
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
    if not outcome.done():
        raise StageError("Ray Train could not be started; the traceback above says why")
    error = outcome.exception()
    if error is None:
        return outcome.result()
    cause = getattr(error, "controller_failure", error)
    if isinstance(cause, FINAL_ERRORS):
        raise cause from None
    raise StageError(f"training failed for good: {cause}") from error
