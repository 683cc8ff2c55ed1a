"""Supervised fine-tuning: next-token cross entropy on the tokens that count, from a base model or from
scratch."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from mahalo_ray.data import storage
from mahalo_ray.data.records import EXAMPLE_SCHEMA
from mahalo_ray.logprobs import IGNORE_INDEX
from mahalo_ray.losses import sft_loss, shift_labels
from mahalo_ray.models import ChunkedCausalLM
from mahalo_ray.models.backbone import check_trained_length, load_causal_lm, load_config, load_tokenizer
from mahalo_ray.models.folder import model_folder
from mahalo_ray.models.lora import check_no_adapter
from mahalo_ray.training.batches import Indices, RowGroups, plan_batches
from mahalo_ray.training.deepspeed_config import parameter_group
from mahalo_ray.training.recipe import PAD_ID, Inference, LossOutput, PreparationProgress, Probe, Tensors, pad
from mahalo_ray.training.settings import SftSettings


class SftRecipe:
    """Examples are rows of `EXAMPLE_SCHEMA`: token ids as they will be read, and which of them to learn.

    The loss is the mean over the global batch's counted tokens, in nats.
    """

    metric_names: tuple[str, ...] = ()
    probe: Probe | None = None

    def __init__(self, settings: SftSettings) -> None:
        """Reads the examples; those longer than `model.max_length` are cut at the end."""
        self._settings, self._training = settings, settings.training
        self._ids, self._inputs, self._masks = read_examples(settings.examples_url, settings.model.max_length)
        lengths = np.array([len(ids) for ids in self._inputs])
        self._counted = np.array([int(mask[1:].sum()) for mask in self._masks])
        self.row_groups = RowGroups(np.ones_like(lengths), lengths, lengths)
        size, steps = self._training.batch_size, self._training.max_steps
        self.batches = plan_batches(self.row_groups.rows, size, self._training.epochs, steps, settings.seed)

    def build_model(self) -> nn.Module:
        settings = self._settings.model
        folder = model_folder(self._settings.model_url)
        self._tokenizer = load_tokenizer(folder)
        dtype, attention = getattr(torch, settings.dtype), settings.attn_implementation
        if settings.scratch is None:
            model = load_causal_lm(folder, dtype, attention)
            check_no_adapter(model)
            check_trained_length(model.config, settings.max_length)
            return ChunkedCausalLM(model)
        config = load_config(folder)
        return ChunkedCausalLM(
            AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=attention)
        )

    def enable_gradient_checkpointing(self, model: nn.Module) -> None:
        cast(PreTrainedModel, model.model).gradient_checkpointing_enable({"use_reentrant": False})

    def prepare(self, infer: Inference, rank: int, workers: int, progress: PreparationProgress) -> None:
        """Nothing to prepare."""

    def parameter_groups(self, model: nn.Module) -> list[dict[str, Any]]:
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        return parameter_group("model", trained, self._training.learning_rate, self._training.weight_decay)

    def loss_denominators(self, batch: Indices) -> dict[str, float]:
        return {"tokens": float(max(1, self._counted[batch].sum()))}

    def collate(self, groups: Indices, loss_denominators: Mapping[str, float], counted: bool) -> Tensors:
        inputs = [self._inputs[group] for group in groups]
        labels = [np.where(self._masks[group], self._inputs[group], IGNORE_INDEX) for group in groups]
        weight = 1.0 / loss_denominators["tokens"] if counted else 0.0
        return {
            "input_ids": pad(inputs, PAD_ID),
            "attention_mask": pad([np.ones_like(ids) for ids in inputs], 0),
            "labels": shift_labels(pad(labels, IGNORE_INDEX)),
            "weight": torch.full((len(groups),), weight),
        }

    def loss(self, model: nn.Module, **tensors: Tensor) -> LossOutput:
        weight = tensors.pop("weight")
        losses = sft_loss(model(**tensors, chunk_size=self._training.logit_chunk_size), 1.0)
        return (losses * weight).sum(), losses.detach(), losses.new_zeros(0)

    def summarise(self, sums: Mapping[str, float]) -> dict[str, float]:
        return {}

    def row_names(self, groups: Indices) -> list[str]:
        return [f"example {self._ids[group]}" for group in groups]

    def finish(self, infer: Inference, rank: int, workers: int) -> dict[str, float]:
        return {}

    def save(self, model: nn.Module, state_dict: Mapping[str, Tensor], folder: Path) -> None:
        plain = cast(PreTrainedModel, model.model)
        prefix = "model."
        state = {n.removeprefix(prefix): t for n, t in state_dict.items() if n.startswith(prefix)}
        plain.save_pretrained(str(folder), state_dict=state)
        self._tokenizer.save_pretrained(str(folder))


def read_examples(
    url: str, max_length: int
) -> tuple[list[str], list[np.ndarray[Any, Any]], list[np.ndarray[Any, Any]]]:
    """TokenIds, token ids and loss masks of all examples in a folder of Parquet files, cut at `max_length`
    tokens.

    Raises ValueError naming the example whose mask does not fit or that leaves nothing to learn.
    """
    table = storage.read_table(url).select(EXAMPLE_SCHEMA.names).cast(EXAMPLE_SCHEMA)
    ids: list[str] = table["id"].to_pylist()
    # Views of Arrow's own memory, 4 bytes a token.
    inputs = [np.asarray(row.values)[:max_length] for row in table["input_ids"]]
    masks = [np.asarray(row.values, dtype=bool)[:max_length] for row in table["loss_mask"]]
    for name, tokens, mask in zip(ids, inputs, masks, strict=True):
        if len(tokens) != len(mask):
            raise ValueError(
                f"example '{name}' in '{url}' has {len(tokens)} token ids and {len(mask)} mask values"
            )
        if not mask[1:].any():
            raise ValueError(
                f"example '{name}' in '{url}' has no token to learn within max_length {max_length}"
            )
    return ids, inputs, masks
