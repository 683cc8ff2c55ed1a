"""What a recipe supplies to the training loop: data, a model, its parameter groups and the loss of a
micro-batch."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from mahalo_ray.training.batches import Indices, RowGroups

Tensors = dict[str, Tensor]
# What fills token ids up on the right. Padding is masked, so any id that the model has will do; the
# tokenizer's own may lie above the embedding.
PAD_ID = 0
# loss (scalar), loss of every row [R] (to find the ones that are not finite), metric sums [K]
LossOutput = tuple[Tensor, Tensor, Tensor]
# One forward pass of a function of (model, tensors) under the engine, without gradients.
Inference = Callable[[Callable[..., Tensor], Tensors], Tensor]
# TrainingProgress callback (done, of) of a slow preparation. Every worker must call it equally often.
PreparationProgress = Callable[[int, int], None]


class Probe(Protocol):
    """Metrics too expensive to compute every step."""

    every_steps: int

    def prepare(self, infer: Inference) -> None:
        """Called by the recipe's own `prepare`."""

    def metrics(self, infer: Inference, model: nn.Module) -> dict[str, float]:
        """Called after every `every_steps` steps on every worker; `model` is the engine's own. A probe that
        may stop the training is called after the last step too."""

    @property
    def may_stop(self) -> bool:
        """Whether `excess` may ever find something."""

    def excess(self, metrics: Mapping[str, float]) -> str | None:
        """What of these metrics is more than the settings allow, in words; None if nothing is. Training then
        ends, and the weights of the last measurement without excess are the result."""


class Recipe(Protocol):
    """A training stage. Every worker builds the same recipe from the same data.

    The loss of a micro-batch is a weighted sum whose weights belong to the global batch: summed over all
    micro-batches of all workers it is the step's loss.
    """

    row_groups: RowGroups
    batches: list[Indices]
    metric_names: tuple[str, ...]
    probe: Probe | None

    def build_model(self) -> nn.Module:
        """The model on the CPU (or sharded, when ZeRO-3 is on)."""

    def enable_gradient_checkpointing(self, model: nn.Module) -> None:
        """Recompute activations in backward instead of keeping them."""

    def prepare(self, infer: Inference, rank: int, workers: int, progress: PreparationProgress) -> None:
        """Called once on every worker with the model as it was built, before a checkpoint is loaded.
        `progress` counts tokens read."""

    def parameter_groups(self, model: nn.Module) -> list[dict[str, Any]]:
        """AdamW groups: name, params, lr, weight_decay."""

    def loss_denominators(self, batch: Indices) -> dict[str, float]:
        """What the losses of the rows of this global batch are divided by."""

    def collate(self, groups: Indices, loss_denominators: Mapping[str, float], counted: bool) -> Tensors:
        """The tensors of one micro-batch. `counted` False: rows only fill a gap; weigh and count them as
        zero."""

    def loss(self, model: nn.Module, **tensors: Tensor) -> LossOutput:
        """Loss, row losses and metric sums (in the order of `metric_names`) of one micro-batch."""

    def summarise(self, sums: Mapping[str, float]) -> dict[str, float]:
        """Metrics from sums over all rows since the last report."""

    def row_names(self, groups: Indices) -> list[str]:
        """ "objective id" of every row loss of a micro-batch of these groups."""

    def finish(self, infer: Inference, rank: int, workers: int) -> dict[str, float]:
        """Evaluation on held-out rows after the last step; every worker must make the same number of
        calls."""

    def save(self, model: nn.Module, state_dict: Mapping[str, Tensor], folder: Path) -> None:
        """Write the finished model; called on one worker with the whole state dict."""


class LossModule(nn.Module):
    """The model and its loss as one module, so that a recipe's whole computation runs inside the engine's
    forward (under ZeRO-3 parameters exist only there)."""

    def __init__(self, model: nn.Module, loss: Callable[..., LossOutput]) -> None:
        super().__init__()
        self.model = model
        self._loss = loss

    def forward(self, function: Callable[..., Any] | None = None, **tensors: Tensor) -> Any:
        """The recipe's loss, or another function of (model, **tensors)."""
        return (function or self._loss)(self.model, **tensors)


def pad(sequences: Sequence[Sequence[int] | npt.NDArray[np.integer[Any]]], value: int) -> Tensor:
    """Sequences of integers as one int64 tensor [B, longest], filled up on the right with `value`."""
    tensors = [torch.from_numpy(np.asarray(sequence, dtype=np.int64)) for sequence in sequences]
    return pad_sequence(tensors, batch_first=True, padding_value=value)
