"""An ordinary causal LM that gives completion log-probs instead of whole logits: the DPO reference, SFT, and
the frozen reference that a reward model reads.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any, Self, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from mahalo_ray.logprobs import DEFAULT_CHUNK_SIZE, sum_rows
from mahalo_ray.models.backbone import (
    CompletionStates,
    SavedModel,
    completion_states,
    load_backbone,
    load_causal_lm,
    run_backbone,
    split_causal_lm,
)
from mahalo_ray.models.heads import FullHead, LogitTransform
from mahalo_ray.models.pair_attention import enable_pair_packing
from mahalo_ray.models.sharding import full_shape, sharded_creation

REFERENCE_FOLDER = "reference"


def output_head(output: nn.Module, transform: LogitTransform) -> FullHead:
    """A transformers output layer as a `FullHead`; the parameters are shared."""
    weight, bias = cast(nn.Parameter, output.weight), cast(nn.Parameter | None, output.bias)
    return FullHead(weight, bias, transform)


class ChunkedCausalLM(nn.Module):
    """An ordinary causal LM whose forward gives completion log-probs instead of logits [B, T, V].

    It is the model: it shares its parameters (a head tied to the embedding stays tied), so training this
    trains the model, and `model.save_pretrained` saves it.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        _, output, transform = split_causal_lm(model)
        self.model = model
        self.head = output_head(output, transform)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None,
        labels: Tensor,
        chunk_size: int = DEFAULT_CHUNK_SIZE,
        average: bool = False,
        pair_lengths: Tensor | None = None,
    ) -> Tensor:
        """Log-probability of every completion, fp32 [B] in nats: sum, or mean over tokens with `average`.

        input_ids, attention_mask, labels [B, T]; labels already shifted (labels[b, t] is the token after
        input_ids[b, t]), -100 where a token does not count. With `pair_lengths` [R, 3] the tokens [1, N] are
        packed pairs, and the result [2 R] has first all chosen, then all rejected ones.
        """
        states = self.completion_states(input_ids, attention_mask, labels, pair_lengths)
        logps = self.head(states.hidden, states.labels, chunk_size)
        return sum_rows(logps, states.sequences, states.completions, average)

    def completion_states(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None,
        labels: Tensor,
        pair_lengths: Tensor | None = None,
    ) -> CompletionStates:
        """What `forward` makes log-probs of."""
        return completion_states(self._hidden_states, input_ids, attention_mask, labels, pair_lengths)

    def _hidden_states(self, input_ids: Tensor, attention_mask: Tensor | None, **kwargs: Any) -> Tensor:
        return run_backbone(self.model.base_model, input_ids, attention_mask, kwargs)

    def enable_pair_packing(self) -> None:
        """As `BackboneModel.enable_pair_packing`."""
        enable_pair_packing(self.model.base_model)


class FrozenReference(nn.Module):
    """A causal LM whose token log-probs are inputs of a reward model's heads; never trained.

    `backbone` None: the reward model's own backbone is read, which is frozen or has its adapter switched off.
    """

    def __init__(self, backbone: PreTrainedModel | None, head: FullHead) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = head
        self.requires_grad_(False)

    @classmethod
    def of_causal_lm(cls, model: PreTrainedModel, shared: bool) -> Self:
        """The reference reading of a causal LM; `shared`: its backbone is the reward model's own."""
        backbone, output, transform = split_causal_lm(model)
        return cls(None if shared else backbone, output_head(output, transform))

    @classmethod
    def for_reward_model(
        cls,
        model: PreTrainedModel,
        base: str | Path | PreTrainedModel,
        reference: str | Path | PreTrainedModel | None,
        backbone_changes: bool,
        dtype: torch.dtype | None,
        attn_implementation: str | None,
    ) -> Self:
        """The reference of a reward model on `model`, as it was loaded from `base`: the causal LM given as
        `reference`, else the base as it is now.

        `backbone_changes`: training changes the model itself, so a second copy of the base is held.
        ValueError if the reference is the base itself.
        """
        if reference is model:
            raise ValueError(
                "the reference is the base itself: leave it out, and the base as it is now is taken"
            )
        if reference is None and not backbone_changes:
            return cls.of_causal_lm(model, shared=True)
        source = reference or (copy.deepcopy(model) if isinstance(base, PreTrainedModel) else base)
        return cls.of_causal_lm(load_causal_lm(source, dtype, attn_implementation), shared=False)

    def metadata(self, reward_backbone: PreTrainedModel) -> dict[str, Any]:
        """The entries of mahalo.json from which `from_saved` builds the reference."""
        vocab_size, hidden_size = full_shape(self.head.weight)
        reader = reward_backbone if self.backbone is None else self.backbone
        return {
            "own_backbone": self.backbone is not None,
            "tied_head": self.head.weight is reader.get_input_embeddings().weight,
            "vocab_size": vocab_size,
            "hidden_size": hidden_size,
            "head_bias": self.head.bias is not None,
            "logit_scale": self.head.transform.scale,
            "logit_softcap": self.head.transform.softcap,
        }

    @classmethod
    def from_saved(cls, saved: SavedModel) -> Self | None:
        """The reference that a reward model's folder describes, None if it has none. A second backbone is
        read here; the head is filled with the reward model's other heads."""
        described = saved.metadata["reference"]
        if described is None:
            return None
        backbone = None
        if described["own_backbone"]:
            backbone = load_backbone(saved.folder / REFERENCE_FOLDER, saved.dtype, saved.attn_implementation)
        reader = saved.backbone if backbone is None else backbone
        embedding = reader.get_input_embeddings().weight
        with sharded_creation():
            head = FullHead.empty(
                described["vocab_size"],
                described["hidden_size"],
                described["head_bias"],
                LogitTransform(described["logit_scale"], described["logit_softcap"]),
                embedding.dtype,
            )
        if described["tied_head"]:
            head.weight = embedding
        return cls(backbone, head)
