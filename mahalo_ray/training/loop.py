"""The training loop: one for all recipes, run by every Ray Train worker."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import ray.train
import torch
import torch.distributed as dist

from mahalo_ray.config import TrainingConfig
from mahalo_ray.data import storage
from mahalo_ray.training.batches import Indices, accumulation_steps, split_batch
from mahalo_ray.training.checkpoints import Progress, RunIdentity, resume, saved_checkpoint
from mahalo_ray.training.engine import (
    build_engine,
    infer,
    optimizer_step,
    to_device,
    training_device,
    whole_state_dict,
)
from mahalo_ray.training.recipe import Output, Recipe

_SHOWN = 20


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


def stop_unless_finite(recipe: Recipe, outputs: Sequence[tuple[Indices, Output]], step: int) -> None:
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


@dataclass(frozen=True)
class LoopSettings:
    """What the loop needs besides a recipe. `output_url`: folder for the finished model."""

    training: TrainingConfig
    dtype: torch.dtype
    seed: int
    output_url: str


def train(make_recipe: Callable[[], Recipe], settings: LoopSettings) -> dict[str, Any]:
    """Train, evaluate, save. Returns {"metrics": final figures, "history": one entry per report}."""
    if training_device().type == "cuda":
        torch.cuda.set_device(training_device())
    recipe, training = make_recipe(), settings.training
    rank, workers, micro_rows = dist.get_rank(), dist.get_world_size(), training.micro_batch_size_per_device
    accumulation = accumulation_steps(recipe.batches, recipe.row_groups, micro_rows, workers)
    engine = build_engine(recipe, training, settings.dtype, settings.seed, accumulation)
    recipe.prepare(partial(infer, engine), rank, workers, _tell_preparing)
    reporter = Reporter(recipe, engine, training, RunIdentity(workers, accumulation, recipe.fingerprint()))

    for step in range(reporter.progress.step, len(recipe.batches)):
        batch = recipe.batches[step]
        loss_denominators = recipe.loss_denominators(batch)
        outputs: list[tuple[Indices, Output]] = []
        for number, shares in enumerate(
            split_batch(batch, recipe.row_groups, micro_rows, workers, accumulation)
        ):
            if number > 0:
                engine.step()  # between micro-batches this only counts
            counted = len(shares[rank]) > 0
            groups = shares[rank] if counted else batch[:1]
            tensors = to_device(recipe.collate(groups, loss_denominators, counted), engine.device)
            output: Output = engine(**tensors)
            # DeepSpeed averages over workers and micro-batches; the rows' weights already sum to the whole.
            engine.backward(output[0] * (workers * accumulation))
            outputs.append((groups, output))
        stop_unless_finite(recipe, outputs, step)
        learning_rates = {group["name"]: float(group["lr"]) for group in engine.optimizer.param_groups}
        gradient_norm = optimizer_step(engine)
        if gradient_norm is None:
            raise NonFiniteError.of_gradient(recipe, batch, step)
        reporter.step_done(batch, outputs, gradient_norm, learning_rates)

    figures = recipe.finish(partial(infer, engine), rank, workers)
    save_model(recipe, engine, settings.output_url)
    history = reporter.progress.history
    return {"metrics": {**history[-1], **figures}, "history": history}


def _tell_preparing(done: int, of: int) -> None:
    ray.train.report({"done": done, "of": of, "unit": "tokens read"})


def save_model(recipe: Recipe, engine: Any, output_url: str) -> None:
    """Gather the finished model on rank 0 and store its folder."""
    model = engine.module.model
    state_dict = whole_state_dict(model)
    if dist.get_rank() == 0:
        with tempfile.TemporaryDirectory(prefix="mahalo-model-") as folder:
            recipe.save(model, state_dict, Path(folder))
            storage.upload_folder(folder, output_url)
    dist.barrier()


class Reporter:
    """Where the run stands: sums figures up, tells Ray Train (and so the driver), keeps history and
    checkpoints."""

    def __init__(self, recipe: Recipe, engine: Any, training: TrainingConfig, identity: RunIdentity) -> None:
        """Resumes from the run's latest checkpoint, if there is one."""
        self.recipe, self.engine, self.training, self.identity = recipe, engine, training, identity
        self.total_steps = len(recipe.batches)
        self.progress: Progress = resume(engine, identity)
        self._clear()

    def step_done(
        self,
        batch: Indices,
        outputs: list[tuple[Indices, Output]],
        gradient_norm: float,
        learning_rates: dict[str, float],
    ) -> None:
        """Count one step; report it and save a checkpoint where due. Sums leave the device only for a
        report."""
        for _, (loss, _, sums) in outputs:
            self._sums += torch.cat([loss.detach()[None], sums]).double()
        self._steps += 1
        self._tokens += int(self.recipe.row_groups.tokens[batch].sum())
        self.progress.step += 1
        step, last = self.progress.step, self.progress.step == self.total_steps
        checkpoint_due = step % self.training.checkpoint_every_steps == 0 and not last
        probe = self.recipe.probe
        probe_due = probe is not None and step % probe.every_steps == 0
        if not (checkpoint_due or last or probe_due or step % self.training.report_every_steps == 0):
            return
        metrics = {"step": step, **self._flush(), "grad_norm": gradient_norm}
        metrics |= {f"learning_rate/{name}": value for name, value in learning_rates.items()}
        if probe is not None and probe_due:
            metrics |= probe.figures(partial(infer, self.engine), self.engine.module.model)
        self.progress.history.append(metrics)
        news = {"done": step, "of": self.total_steps, "unit": "steps", "metrics": metrics}
        if checkpoint_due:
            with saved_checkpoint(self.engine, self.identity, self.progress) as checkpoint:
                ray.train.report(news, **checkpoint)
        else:
            ray.train.report(news)
        self._clear()

    def _flush(self) -> dict[str, float]:
        """Figures over all workers since the last report; `loss` is the mean over its steps."""
        seconds = time.perf_counter() - self._since
        dist.all_reduce(self._sums)
        loss, *sums = self._sums.tolist()
        named = dict(zip(self.recipe.metric_names, sums, strict=True))
        figures = {"loss": loss / self._steps, "tokens_per_second": self._tokens / seconds}
        return figures | self.recipe.summarise(named)

    def _clear(self) -> None:
        self._sums = torch.zeros(
            1 + len(self.recipe.metric_names), dtype=torch.float64, device=self.engine.device
        )
        self._steps = self._tokens = 0
        self._since = time.perf_counter()
