"""Completion log-probs under an ordinary causal LM, without whole logits: the DPO reference, and SFT."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from mahalo_ray.logprobs import DEFAULT_CHUNK_SIZE, IGNORE_INDEX, sum_rows
from mahalo_ray.models.backbone import load_causal_lm, run_backbone, split_causal_lm
from mahalo_ray.models.heads import FullHead
from mahalo_ray.models.pair_attention import packed_arguments, read_packed_pairs, sequence_numbers


class ChunkedCausalLM(nn.Module):
    """An ordinary causal LM whose forward gives log-probs [B] instead of logits [B, T, V].

    It is the model: it shares its parameters (a head tied to the embedding stays tied), so training this
    trains the model, and `model.save_pretrained` saves it.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        _, output, transform = split_causal_lm(model)
        self.model = model
        self.head = FullHead(
            cast(nn.Parameter, output.weight), cast(nn.Parameter | None, output.bias), transform
        )

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None,
        labels: Tensor,
        chunk_size: int = DEFAULT_CHUNK_SIZE,
        average: bool = False,
        pair_lengths: Tensor | None = None,
    ) -> Tensor:
        """See `causal_lm_completion_logps`. With `pair_lengths` [R, 3] the tokens [1, N] are packed pairs
        (`models/pair_attention.py`), and the result [2 R] has first all chosen, then all rejected ones."""
        rows, count = sequence_numbers(labels, pair_lengths), labels.shape[0]
        if pair_lengths is not None:
            count = 2 * len(pair_lengths)
        hidden = run_backbone(
            self.model.base_model, input_ids, attention_mask, packed_arguments(pair_lengths)
        )
        counted = labels != IGNORE_INDEX
        logps = self.head(hidden[counted], labels[counted], chunk_size)
        return sum_rows(logps, rows[counted], count, average)

    def read_packed_pairs(self) -> None:
        """As `BackboneModel.read_packed_pairs`."""
        read_packed_pairs(self.model.base_model)


def causal_lm_completion_logps(
    model: PreTrainedModel,
    input_ids: Tensor,
    attention_mask: Tensor | None,
    labels: Tensor,
    chunk_size: int = DEFAULT_CHUNK_SIZE,
    average: bool = False,
) -> Tensor:
    """Log-probability of every row's completion, fp32 [B]: sum, or mean with `average`.

    input_ids, attention_mask, labels [B, T]; labels already shifted, -100 where a token does not count. For
    many batches build one `ChunkedCausalLM`, which checks the model once.
    """
    return ChunkedCausalLM(model)(input_ids, attention_mask, labels, chunk_size, average)


class FrozenReference(nn.Module):
    """A causal LM whose token log-probs are inputs of a reward model's heads; never trained.

    `backbone` None: it reads the reward model's own backbone, frozen or with its adapter off.
    """

    def __init__(self, backbone: PreTrainedModel | None, head: FullHead) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = head
        self.requires_grad_(False)

    @classmethod
    def of(cls, model: PreTrainedModel, shared: bool) -> FrozenReference:
        """The reference reading of a causal LM; `shared`: its backbone is the reward model's own."""
        backbone, output, transform = split_causal_lm(model)
        head = FullHead(cast(nn.Parameter, output.weight), cast(nn.Parameter | None, output.bias), transform)
        return cls(None if shared else backbone, head)


def reference_of(
    model: PreTrainedModel,
    base: str | Path | PreTrainedModel,
    given: str | Path | PreTrainedModel | None,
    changes: bool,
    dtype: torch.dtype | None,
    attn_implementation: str | None,
) -> FrozenReference:
    """The reference of a reward model on `model`, as it was loaded from `base`: the causal LM that was given,
    else the base as it is now. `changes`: training changes the model itself, so the base is held twice.

    ValueError if the base itself is given.
    """
    if given is model:
        raise ValueError("the reference is the base itself: leave it out, and the base as it is now is taken")
    if given is None and not changes:
        return FrozenReference.of(model, shared=True)
    source = given or (copy.deepcopy(model) if isinstance(base, PreTrainedModel) else base)
    return FrozenReference.of(load_causal_lm(source, dtype, attn_implementation), shared=False)
