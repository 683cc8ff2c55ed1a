"""The training loop: one for all recipes, run by every Ray Train worker and by `PolicyTrainer`."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from mahalo_ray.config import TrainingConfig
from mahalo_ray.data import storage
from mahalo_ray.data.temporary import temporary_folder
from mahalo_ray.models.sharding import gathered, is_sharded
from mahalo_ray.training.batches import Indices, accumulation_steps, split_batch
from mahalo_ray.training.deepspeed_engine import (
    build_engine,
    infer,
    optimizer_step,
    to_device,
    training_device,
    whole_state_dict,
)
from mahalo_ray.training.recipe import LossOutput, Recipe
from mahalo_ray.training.settings import StageSettings
from mahalo_ray.training.tracking import Tracker, open_trackers

TAG = "engine"


@dataclass
class TrainingProgress:
    """How far a run has come: `step` steps are done; `history` has one entry per report. Of a run that may be
    stopped, `kept_step` is the step whose weights are kept, 0 for none yet."""

    step: int = 0
    history: list[dict[str, float]] = field(default_factory=list)
    kept_step: int = 0


KEPT = "kept.safetensors"


class KeptWeights:
    """The trained parameters as they were at some step, on the CPU of rank 0, for a run that may be stopped
    later. Every worker calls every method.

    >>> KeptWeights(engine.module.model).take()
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._state: dict[str, Tensor] = {}

    def take(self) -> None:
        """Keep the weights as they are now."""
        self._state = whole_state_dict(self._model, trained_only=True)

    def put_back(self) -> None:
        """Make the model what it was when they were taken."""
        for name, parameter in self._model.named_parameters():
            if not parameter.requires_grad:
                continue
            with gathered([parameter], writable=True), torch.no_grad():
                if dist.get_rank() == 0:
                    parameter.copy_(self._state[name])
                if not is_sharded(parameter):
                    dist.broadcast(parameter.data, src=0)

    def write(self, folder: Path) -> None:
        """Rank 0's part of a checkpoint."""
        if self._state:
            save_file(self._state, folder / KEPT)

    def read(self, folder: Path) -> None:
        """Take over what a checkpoint holds."""
        if dist.get_rank() == 0 and (folder / KEPT).is_file():
            self._state = load_file(folder / KEPT)


@dataclass(frozen=True)
class WorkerSplit:
    """How workers and micro-batches share a batch; it must be the same in a checkpoint and the run that
    resumes it.
    """

    workers: int
    accumulation: int

    def check(self, saved: dict[str, Any], where: str) -> None:
        """Raise ValueError that says what changed."""
        if saved["workers"] != self.workers:
            raise ValueError(
                f"the checkpoint in {where} was written by {saved['workers']} workers, this run has "
                f"{self.workers}: its optimizer state is split by worker. Set cluster.train_workers to "
                f"{saved['workers']}, or delete the checkpoints to start again"
            )
        if saved["accumulation"] != self.accumulation:
            raise ValueError(
                f"the checkpoint in {where} was written with {saved['accumulation']} micro-batches per step "
                f"and worker, this run has {self.accumulation}: delete the checkpoints to start again"
            )


@contextmanager
def written_checkpoint(
    engine: Any, split: WorkerSplit, progress: TrainingProgress, kept: KeptWeights
) -> Iterator[Path]:
    """This worker's part of a checkpoint in a temporary folder, which is gone after the block."""
    rank = torch.distributed.get_rank()
    with temporary_folder("checkpoint") as name:
        folder = Path(name)
        # DeepSpeed has rank 0 make the tag's folder; here every rank has a folder of its own.
        (folder / TAG).mkdir()
        engine.save_checkpoint(name, tag=TAG, save_latest=False)
        torch.save(_random_states(), folder / f"random_{rank}.pt")
        if rank == 0:
            state = {
                "workers": split.workers,
                "accumulation": split.accumulation,
                "step": progress.step,
                "history": progress.history,
                "kept_step": progress.kept_step,
            }
            kept.write(folder)
            (folder / "progress.json").write_text(json.dumps(state), encoding="utf-8")
        yield folder


def resume(engine: Any, split: WorkerSplit, kept: KeptWeights, folder: Path, where: str) -> TrainingProgress:
    """Load the checkpoint in `folder` into the engine and `kept`. ValueError, naming `where` it is, if it
    does not fit."""
    state = json.loads((folder / "progress.json").read_text(encoding="utf-8"))
    split.check(state, where)
    loaded, _ = engine.load_checkpoint(str(folder), tag=TAG)
    if loaded is None:
        raise ValueError(f"DeepSpeed could not read the checkpoint in {where}: delete it")
    restore_random_states(folder / f"random_{torch.distributed.get_rank()}.pt")
    kept.read(folder)
    return TrainingProgress(state["step"], state["history"], state.get("kept_step", 0))


def _random_states() -> dict[str, torch.Tensor]:
    states = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    return states


def restore_random_states(file: Path) -> None:
    """A run of CPUs may go on on GPUs and the other way round; the other device's numbers then begin anew."""
    states = torch.load(file, weights_only=True)
    torch.set_rng_state(states["cpu"])
    if torch.cuda.is_available() and "cuda" in states:
        torch.cuda.set_rng_state(states["cuda"])


_SHOWN = 20


class TrainingSession(Protocol):
    """Where a run reports its progress and keeps its checkpoints: Ray Train, or this process alone."""

    def report(self, news: dict[str, Any], checkpoint: Path | None = None) -> None:
        """Pass news on; store this worker's part of a checkpoint. Every worker calls it equally often."""

    def latest_checkpoint(self) -> AbstractContextManager[tuple[Path, str] | None]:
        """The latest checkpoint as a local folder, and where it is kept; None if there is none."""


class NonFiniteError(ValueError):
    """Training met a NaN or an infinity. Running it again would meet it again, so the run ends."""

    @classmethod
    def of_gradient(cls, recipe: Recipe, batch: Indices, step: int) -> NonFiniteError:
        """The losses were finite, their gradient was not: any row of the batch may be the cause."""
        return cls(
            f"step {step + 1}: the gradient is not finite although every loss is; nothing was updated. "
            f"Rows of the batch: {_listed(recipe.row_names(batch))}. "
            "Lower the learning rate, or look at these rows"
        )


def stop_unless_finite(recipe: Recipe, outputs: Sequence[tuple[Indices, LossOutput]], step: int) -> None:
    """Raise NonFiniteError on all workers if any worker's loss is not finite. Costs one small all-reduce."""
    values = torch.cat([torch.cat([loss.detach()[None], rows]) for _, (loss, rows, _) in outputs])
    finite = torch.isfinite(values).all().int()
    dist.all_reduce(finite, op=dist.ReduceOp.MIN)
    if finite.item():
        return
    names: list[str] = []
    for groups, (_, rows, _) in outputs:
        bad = ~torch.isfinite(rows)
        names += [name for name, wrong in zip(recipe.row_names(groups), bad.tolist(), strict=True) if wrong]
    gathered: list[list[str]] = [[]] * dist.get_world_size()
    dist.all_gather_object(gathered, names)
    rows_of_all = sorted({name for part in gathered for name in part})
    raise NonFiniteError(
        f"step {step + 1}: the loss is not finite (NaN or infinity) for {_listed(rows_of_all)}; "
        "nothing was updated"
    )


def _listed(names: Sequence[str]) -> str:
    """At most 20 names."""
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more


def train(
    make_recipe: Callable[[], Recipe], settings: StageSettings, session: TrainingSession
) -> dict[str, Any]:
    """Train, evaluate, save. Returns {"metrics": final metrics, "history": one entry per report}.

    `make_recipe` is called once the worker's device is chosen: a recipe may compute when it is made.
    """
    if training_device().type == "cuda":
        torch.cuda.set_device(training_device())
    recipe, training = make_recipe(), settings.training
    kernel = logps_kernel(training, training_device())
    rank, workers, micro_rows = dist.get_rank(), dist.get_world_size(), training.micro_batch_size_per_device
    accumulation = accumulation_steps(recipe.batches, recipe.row_groups, micro_rows, workers)
    engine = build_engine(recipe, training, getattr(torch, settings.model.dtype), settings.seed, accumulation)
    recipe.prepare(partial(infer, engine), rank, workers, partial(_report_preparing, session))
    split = WorkerSplit(workers, accumulation)
    with kernel, Reporter(recipe, engine, settings, split, session) as reporter:
        for step in range(reporter.progress.step, len(recipe.batches)):
            batch = recipe.batches[step]
            denominators = recipe.loss_denominators(batch)
            outputs: list[tuple[Indices, LossOutput]] = []
            micro_batches = split_batch(batch, recipe.row_groups, micro_rows, workers, accumulation)
            for number, of_workers in enumerate(micro_batches):
                if number > 0:
                    engine.step()  # between micro-batches this only counts
                counted = len(of_workers[rank]) > 0
                # A worker without rows runs one of weight 0: forward and backward are collective operations.
                groups = of_workers[rank] if counted else batch[:1]
                tensors = to_device(recipe.collate(groups, denominators, counted), engine.device)
                output: LossOutput = engine(**tensors)
                # `output[0]` sums loss x weight over rows [R], and a row's weight already has the denominator
                # of the global batch. DeepSpeed divides by workers and micro-batches, which is multiplied
                # back. A mean per micro-batch would weigh a row by how full its micro-batch is, and an
                # objective by how many workers happen to have it.
                engine.backward(output[0] * (workers * accumulation))
                outputs.append((groups, output))
            stop_unless_finite(recipe, outputs, step)
            learning_rates = {group["name"]: float(group["lr"]) for group in engine.optimizer.param_groups}
            gradient_norm = optimizer_step(engine)
            if gradient_norm is None:
                raise NonFiniteError.of_gradient(recipe, batch, step)
            reporter.step_done(batch, outputs, gradient_norm, learning_rates)
            if reporter.stopped:
                break
        kept = reporter.weights_to_save()
        final = {**kept, **recipe.finish(partial(infer, engine), rank, workers)}
        reporter.finished(final)
    save_model(recipe, engine, settings.output_url)
    history = reporter.progress.history
    return {"metrics": {**history[-1], **final}, "history": history}


def logps_kernel(training: TrainingConfig, device: torch.device) -> AbstractContextManager[None]:
    """Inside, log-probs with gradients are computed as `training.logps_kernel` says. ValueError where this
    worker cannot."""
    if training.logps_kernel == "torch":
        return nullcontext()
    if find_spec("triton") is None:
        raise ValueError(
            "'training.logps_kernel: triton' needs the package triton, which is not installed here (torch "
            "for CUDA brings it along): install it, or set it to 'torch'"
        )
    from mahalo_ray.models.triton_logps import fused_logps

    return fused_logps(device)


def _report_preparing(session: TrainingSession, done: int, of: int) -> None:
    session.report({"done": done, "of": of, "unit": "tokens read"})


def save_model(recipe: Recipe, engine: Any, output_url: str) -> None:
    """Gather the finished model on rank 0 and store its folder."""
    model = engine.module.model
    state_dict = whole_state_dict(model)
    if dist.get_rank() == 0:
        with temporary_folder("model") as folder:
            recipe.save(model, state_dict, Path(folder))
            storage.upload_folder(folder, output_url)
    dist.barrier()


class Reporter:
    """Sums metrics up, reports them to the session (and so the driver) and the trackers, and keeps history
    and checkpoints.
    """

    def __init__(
        self,
        recipe: Recipe,
        engine: Any,
        settings: StageSettings,
        split: WorkerSplit,
        session: TrainingSession,
    ) -> None:
        """Resumes from the run's latest checkpoint, if there is one."""
        self.recipe, self.engine, self.split, self.session = recipe, engine, split, session
        self.training, self._settings = settings.training, settings
        self.total_steps = len(recipe.batches)
        self.progress = TrainingProgress()
        self.stopped = False
        self._kept = KeptWeights(engine.module.model)
        with session.latest_checkpoint() as latest:
            if latest is not None:
                self.progress = resume(engine, split, self._kept, *latest)
        self._trackers: list[Tracker] = []
        self._clear()

    def __enter__(self) -> Reporter:
        if dist.get_rank() == 0:
            self._trackers = open_trackers(self._settings, self.progress.step)
        return self

    def __exit__(self, *error: object) -> None:
        for tracker in self._trackers:
            tracker.close()

    def step_done(
        self,
        batch: Indices,
        outputs: list[tuple[Indices, LossOutput]],
        gradient_norm: float,
        learning_rates: dict[str, float],
    ) -> None:
        """Count one step; report it and save a checkpoint where due. Sums leave the device only for a
        report.

        Sets `stopped` where a measurement is beyond what the recipe's probe allows; ValueError if it is the
        first one.
        """
        for _, (loss, _, sums) in outputs:
            self._sums += torch.cat([loss.detach()[None], sums]).double()
        self._steps += 1
        self._tokens += int(self.recipe.row_groups.tokens[batch].sum())
        self.progress.step += 1
        step, last = self.progress.step, self.progress.step == self.total_steps
        checkpoint_due = step % self.training.checkpoint_every_steps == 0 and not last
        probe = self.recipe.probe
        may_stop = probe is not None and probe.may_stop
        probe_due = probe is not None and (step % probe.every_steps == 0 or (last and may_stop))
        if not (checkpoint_due or last or probe_due or step % self.training.report_every_steps == 0):
            return
        metrics = {"step": step, **self._flush(), "grad_norm": gradient_norm}
        metrics |= {f"learning_rate/{name}": value for name, value in learning_rates.items()}
        if probe is not None and probe_due:
            metrics |= probe.metrics(partial(infer, self.engine), self.engine.module.model)
            if may_stop:
                self._keep_or_stop(probe.excess(metrics))
        self.progress.history.append(metrics)
        self._track(step, metrics)
        news = {"done": step, "of": self.total_steps, "unit": "steps", "metrics": metrics}
        # A run that was killed once it had stopped goes on from before, and stops again.
        if checkpoint_due and not self.stopped:
            with written_checkpoint(self.engine, self.split, self.progress, self._kept) as folder:
                self.session.report(news, folder)
        else:
            self.session.report(news)
        self._clear()

    def _keep_or_stop(self, excess: str | None) -> None:
        if excess is None:
            self._kept.take()
            self.progress.kept_step = self.progress.step
            return
        if self.progress.kept_step == 0:
            raise ValueError(
                f"the first measurement, after step {self.progress.step}, found a {excess} "
                "('policy.max_kl'): there are no weights within it to keep. Measure more often "
                "('policy.metrics_every_steps'), lower the learning rates, or allow more"
            )
        self.stopped = True

    def weights_to_save(self) -> dict[str, float]:
        """Put the kept weights back if training was stopped. Returns `stopped_at_step`, `kept_step` and what
        was measured at the step kept; nothing of a run that went to its end."""
        if not self.stopped:
            return {}
        self._kept.put_back()
        kept = self.progress.kept_step
        measured = next(entry for entry in self.progress.history if entry["step"] == kept)
        return {**measured, "stopped_at_step": float(self.progress.step), "kept_step": float(kept)}

    def finished(self, metrics: dict[str, float]) -> None:
        """The final metrics, at the last step."""
        self._track(self.progress.step, metrics)

    def _track(self, step: int, metrics: dict[str, float]) -> None:
        for tracker in self._trackers:
            tracker.log(step, metrics)

    def _flush(self) -> dict[str, float]:
        """Metrics over all workers since the last report; `loss` is the mean over its steps."""
        seconds = time.perf_counter() - self._since
        dist.all_reduce(self._sums)
        loss, *sums = self._sums.tolist()
        named = dict(zip(self.recipe.metric_names, sums, strict=True))
        metrics = {"loss": loss / self._steps, "tokens_per_second": self._tokens / seconds}
        return metrics | self.recipe.summarise(named)

    def _clear(self) -> None:
        self._sums = torch.zeros(
            1 + len(self.recipe.metric_names), dtype=torch.float64, device=self.engine.device
        )
        self._steps = self._tokens = 0
        self._since = time.perf_counter()
