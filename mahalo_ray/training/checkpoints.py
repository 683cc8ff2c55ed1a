"""Exact resume: model, optimizer, schedule, step, history and random states, every worker its own part.

A checkpoint counts from the moment Ray Train has recorded it, which happens after every worker has stored its
part; until then the previous one stays the latest, and a half-written one is never read.
"""

from __future__ import annotations

import json
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import ray.train
import torch

TAG = "engine"


@dataclass
class Progress:
    """How far a run has come: `step` steps are done; `history` has one entry per report."""

    step: int = 0
    history: list[dict[str, float]] = field(default_factory=list)


@dataclass(frozen=True)
class RunIdentity:
    """What must not change between a checkpoint and the run that resumes it."""

    workers: int
    accumulation: int
    data: str

    def check(self, saved: dict[str, Any], where: str) -> None:
        """Raise ValueError that says what changed."""
        if saved["workers"] != self.workers:
            raise ValueError(
                f"the checkpoint in {where} was written by {saved['workers']} workers, this run has "
                f"{self.workers}: its optimizer state is split by worker. Set cluster.train_workers to "
                f"{saved['workers']}, or delete the checkpoints to start again"
            )
        if saved != asdict(self):
            raise ValueError(
                f"the checkpoint in {where} belongs to other data or other batches than this run's: "
                "delete the checkpoints to start again"
            )


@contextmanager
def saved_checkpoint(engine: Any, identity: RunIdentity, progress: Progress) -> Iterator[dict[str, Any]]:
    """Write this worker's part into a temporary folder; yields the arguments for `ray.train.report`."""
    rank = torch.distributed.get_rank()
    with tempfile.TemporaryDirectory(prefix="mahalo-checkpoint-") as folder:
        # DeepSpeed has rank 0 make the tag's folder; here every rank has a folder of its own.
        (Path(folder) / TAG).mkdir()
        engine.save_checkpoint(folder, tag=TAG, save_latest=False)
        torch.save(_random_states(), Path(folder) / f"random_{rank}.pt")
        if rank == 0:
            state = {"identity": asdict(identity), "step": progress.step, "history": progress.history}
            (Path(folder) / "progress.json").write_text(json.dumps(state), encoding="utf-8")
        # A name of its own for every attempt: what an interrupted one left behind is never mixed in.
        name = f"step_{progress.step:06d}_{uuid.uuid4().hex[:8]}"
        checkpoint = ray.train.Checkpoint.from_directory(folder)
        yield {"checkpoint": checkpoint, "checkpoint_dir_name": name}


def resume(engine: Any, identity: RunIdentity) -> Progress:
    """Load the run's latest checkpoint into the engine, if there is one. ValueError if it does not fit."""
    checkpoint = ray.train.get_checkpoint()
    if checkpoint is None:
        return Progress()
    with checkpoint.as_directory() as folder:
        state = json.loads((Path(folder) / "progress.json").read_text(encoding="utf-8"))
        identity.check(state["identity"], checkpoint.path)
        loaded, _ = engine.load_checkpoint(folder, tag=TAG)
        if loaded is None:
            raise ValueError(f"DeepSpeed could not read the checkpoint in {checkpoint.path}: delete it")
        _restore_random_states(Path(folder) / f"random_{torch.distributed.get_rank()}.pt")
    return Progress(state["step"], state["history"])


def _random_states() -> dict[str, torch.Tensor]:
    states = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    return states


def _restore_random_states(file: Path) -> None:
    states = torch.load(file, weights_only=True)
    torch.set_rng_state(states["cpu"])
    if torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])
