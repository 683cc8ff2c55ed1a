"""Exact resume: model, optimizer, schedule, step, history and random states, every worker its own part.

Where checkpoints are kept is the session's affair (`loop.TrainingSession`). With Ray Train one counts from
the moment it was recorded, which happens after every worker has stored its part; until then the previous one
stays the latest, and a half-written one is never read. Checkpoints lie under their run's identity
(`StageSettings.identity`), so they never meet other data; only the split among workers is left to check.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

TAG = "engine"


@dataclass
class TrainingProgress:
    """How far a run has come: `step` steps are done; `history` has one entry per report."""

    step: int = 0
    history: list[dict[str, float]] = field(default_factory=list)


@dataclass(frozen=True)
class WorkerSplit:
    """How a batch is shared: what must not change between a checkpoint and the run that resumes it."""

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
def written_checkpoint(engine: Any, split: WorkerSplit, progress: TrainingProgress) -> Iterator[Path]:
    """This worker's part of a checkpoint in a temporary folder, which is gone after the block."""
    rank = torch.distributed.get_rank()
    with tempfile.TemporaryDirectory(prefix="mahalo-checkpoint-") as name:
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
            }
            (folder / "progress.json").write_text(json.dumps(state), encoding="utf-8")
        yield folder


def resume(engine: Any, split: WorkerSplit, folder: Path, where: str) -> TrainingProgress:
    """Load the checkpoint in `folder` into the engine. ValueError, naming `where` it is, if it does not
    fit."""
    state = json.loads((folder / "progress.json").read_text(encoding="utf-8"))
    split.check(state, where)
    loaded, _ = engine.load_checkpoint(str(folder), tag=TAG)
    if loaded is None:
        raise ValueError(f"DeepSpeed could not read the checkpoint in {where}: delete it")
    restore_random_states(folder / f"random_{torch.distributed.get_rank()}.pt")
    return TrainingProgress(state["step"], state["history"])


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
