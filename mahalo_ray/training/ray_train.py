"""One training stage on Ray Train, from the driver: start it, watch it, hand back its figures."""

from __future__ import annotations

import hashlib
import json
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
from ray.train import Checkpoint, UserCallback

from mahalo_ray.config import (
    ClusterConfig,
    ModelConfig,
    ObjectiveConfig,
    PolicyConfig,
    RewardConfig,
    SftConfig,
    TrainingConfig,
)
from mahalo_ray.data import storage
from mahalo_ray.errors import StageError

if TYPE_CHECKING:
    from mahalo_ray.training.recipe import Recipe


# (done, in all, of what: "steps", or what comes before the first; metrics of the last report)
ProgressFunction = Callable[[int, int, str, dict[str, float]], None]

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
    """Driver side: hands complete new lines to the progress function, failures to the log."""

    def __init__(self, path: Path, stage: str, progress: ProgressFunction | None) -> None:
        self._path, self._stage, self._progress = path, stage, progress
        self._read = 0

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
            logger.warning("%s: training failed (%s); it goes on from the last checkpoint", self._stage, what)
        elif self._progress is not None:
            report = news["report"]
            self._progress(report["done"], report["of"], report["unit"], report.get("metrics", {}))


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


def train_sft(
    examples_url: str,
    output_url: str,
    model_url: str,
    sft: SftConfig,
    model: ModelConfig,
    cluster: ClusterConfig,
    seed: int,
    run_dir: str,
    progress: ProgressFunction | None = None,
) -> TrainingResult:
    """Fine-tune (or train from scratch) on Parquet examples (id, input_ids, loss_mask); a transformers folder
    results.

    `model_url`: folder with config and tokenizer; without weights the model starts from scratch. `run_dir`:
    folder or URL for checkpoints; calling again with the same arguments after an interruption goes on from
    the latest.
    """
    arguments = (storage.absolute(examples_url), storage.absolute(model_url), model, sft.training, seed)
    stage = Stage("sft", sft.training, model, cluster, seed, storage.absolute(output_url), arguments)
    return run_stage(stage, run_dir, [examples_url, model_url], progress)


def train_reward(
    traces_url: str | None,
    pairs_url: str | None,
    output_url: str,
    model_url: str,
    objectives: Sequence[ObjectiveConfig],
    reward: RewardConfig,
    model: ModelConfig,
    cluster: ClusterConfig,
    step_separator: str | None,
    seed: int,
    run_dir: str,
    progress: ProgressFunction | None = None,
    features_url: str | None = None,
) -> TrainingResult:
    """A process reward model from StepTrace records and, for objectives supervised by pairs, PreferencePair
    records.

    `step_separator` ends every step of a trace that carries no token ids (None: a step is a whole assistant
    turn).
    `reward.held_out_fraction` of the prompts is kept for figures and calibration. `features_url`: folder for
    the head inputs of a frozen backbone, shared by all runs that name it.
    """
    urls = [url for url in (traces_url, pairs_url) if url is not None]
    arguments = (
        traces_url and storage.absolute(traces_url),
        pairs_url and storage.absolute(pairs_url),
        storage.absolute(model_url),
        tuple(objectives),
        reward,
        model,
        step_separator,
        seed,
        features_url and storage.absolute(features_url),
    )
    stage = Stage("reward", reward.training, model, cluster, seed, storage.absolute(output_url), arguments)
    return run_stage(stage, run_dir, [*urls, model_url], progress)


def train_policy(
    pairs_url: str,
    output_url: str,
    model_url: str,
    objectives: Sequence[str],
    policy: PolicyConfig,
    model: ModelConfig,
    cluster: ClusterConfig,
    held_out_fraction: float,
    seed: int,
    run_dir: str,
    progress: ProgressFunction | None = None,
) -> TrainingResult:
    """The method `policy.method` (MAH-DPO: one head per objective) on a folder of PreferencePair records; a
    MultiHeadCausalLM folder results.

    `model_url` is both start and reference; its log-probs are stored in `pairs_url`/reference.
    `held_out_fraction` of the prompts is kept for the final figures.
    """
    url, start = storage.absolute(pairs_url), storage.absolute(model_url)
    arguments = (url, start, tuple(objectives), policy, model, held_out_fraction, seed)
    stage = Stage("policy", policy.training, model, cluster, seed, storage.absolute(output_url), arguments)
    return run_stage(stage, run_dir, [pairs_url, model_url], progress)
