"""The multi-action-head policy: one shared backbone, one vocabulary head per objective (MAHALO, arXiv
2510.01167).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, cast, get_args

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from mahalo_ray.config import HeadKind, LoraConfig
from mahalo_ray.logprobs import DEFAULT_CHUNK_SIZE, IGNORE_INDEX, sum_rows
from mahalo_ray.models import lora
from mahalo_ray.models.backbone import (
    BackboneModel,
    SavedModel,
    assemble_causal_lm,
    load_causal_lm,
    save_backbone,
    split_causal_lm,
)
from mahalo_ray.models.folder import HEADS_FILE, Figures, save_tensors, write_card, write_metadata
from mahalo_ray.models.heads import (
    FullHead,
    Head,
    LogitTransform,
    LowRankHead,
    check_objectives,
    initialise_heads,
    merge_heads,
    weighted_projection,
)
from mahalo_ray.models.pair_attention import packed_arguments, sequence_numbers
from mahalo_ray.models.sharding import full_shape, sharded_creation
from mahalo_ray.objectives import Weights, unknown_name


def save_policy(
    policy: MultiHeadCausalLM,
    folder: Path,
    tokenizer: PreTrainedTokenizerBase | None,
    figures: Figures | None,
    state_dict: Mapping[str, Tensor] | None,
    with_backbone: bool | None,
) -> None:
    """Write the policy's folder.

    `state_dict` replaces the model's own (whole) parameters: what a ZeRO-3 engine gathered, under the
    policy's names. `with_backbone`: see `save_backbone`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    state = dict(policy.state_dict() if state_dict is None else state_dict)
    saved = save_backbone(
        policy.backbone, folder, state, with_backbone, policy.base_name, unchanged=policy.has_lora
    )
    heads = {name: state[name] for name in policy.own_parameters()}
    save_tensors(folder / HEADS_FILE, heads)
    write_metadata(
        folder,
        policy.kind,
        {
            "objectives": list(policy.objectives),
            "head_kind": policy.head_kind,
            "rank": policy.rank,
            "keep_base_head": policy.base_head is not None,
            "vocab_size": policy.vocab_size,
            "hidden_size": policy.hidden_size,
            "head_bias": any(name.endswith("bias") for name in heads),
            "logit_scale": policy.transform.scale,
            "logit_softcap": policy.transform.softcap,
            **saved,
        },
    )
    if policy.generation_config is not None:
        policy.generation_config.save_pretrained(str(folder))
    if tokenizer is not None:
        tokenizer.save_pretrained(str(folder))
    text = (
        "A multi-head policy: one backbone and one vocabulary head per objective. Load it with "
        "`mahalo_ray.models.MultiHeadCausalLM.from_pretrained`, and merge the heads at the weights you want "
        "with `.merge(Weights.parse(...))` into an ordinary transformers model."
    )
    notes = dict.fromkeys(policy.objectives, f"{policy.head_kind} head")
    write_card(folder, "Multi-head policy", text, policy.base_name, notes, figures)


def policy_of(cls: type[MultiHeadCausalLM], saved: SavedModel) -> MultiHeadCausalLM:
    """The policy that a folder describes, its heads not yet filled."""
    metadata, folder = saved.metadata, saved.folder
    generation = folder / "generation_config.json"
    return cls(
        saved.backbone,
        metadata["objectives"],
        metadata["head_kind"],
        LogitTransform(metadata["logit_scale"], metadata["logit_softcap"]),
        metadata["vocab_size"],
        metadata["hidden_size"],
        bias=metadata["head_bias"],
        dtype=next(saved.backbone.parameters()).dtype,
        rank=metadata["rank"],
        keep_base_head=metadata["keep_base_head"],
        generation_config=GenerationConfig.from_pretrained(str(folder)) if generation.is_file() else None,
        base_name=saved.base_name,
    )


class MultiHeadCausalLM(BackboneModel):
    """z_i = W_i h(x): a transformers backbone and one head per objective, decoded as softmax(sum_i w_i z_i).

    `heads[objective].weight` is W_i [V, D]. `base_head` is the head of the model it was made from, frozen:
    always there with low-rank heads (they are differences from it), on request with full ones, else None.
    Where the family soft-caps its logits, heads are summed before the cap, so that a merged model is the same
    function.
    """

    kind = "multi_head_causal_lm"

    def __init__(
        self,
        backbone: nn.Module,
        objectives: Sequence[str],
        head_kind: HeadKind,
        transform: LogitTransform,
        vocab_size: int,
        hidden_size: int,
        bias: bool,
        dtype: torch.dtype,
        rank: int = 16,
        keep_base_head: bool = False,
        generation_config: GenerationConfig | None = None,
        base_name: str | None = None,
    ) -> None:
        """With uninitialised heads: use `from_base` or `from_pretrained`."""
        super().__init__()
        check_objectives(objectives)
        if head_kind not in get_args(HeadKind):
            raise ValueError(unknown_name("head kind", head_kind, get_args(HeadKind)))
        self.objectives = tuple(objectives)
        self.head_kind: HeadKind = head_kind
        self.rank = rank
        self.vocab_size, self.hidden_size = vocab_size, hidden_size
        self.transform = transform
        self.generation_config = generation_config
        self.base_name = base_name
        self.backbone = backbone
        self.base_head: FullHead | None = None
        self.heads = nn.ModuleDict()
        with sharded_creation():
            if keep_base_head or head_kind == "low_rank":
                self.base_head = FullHead.empty(vocab_size, hidden_size, bias, transform, dtype)
                self.base_head.requires_grad_(False)
            for objective in self.objectives:
                if head_kind == "full":
                    self.heads[objective] = FullHead.empty(vocab_size, hidden_size, bias, transform, dtype)
                else:
                    assert self.base_head is not None
                    self.heads[objective] = LowRankHead(self.base_head, rank)

    @classmethod
    def from_base(
        cls,
        base: str | Path | PreTrainedModel,
        objectives: Sequence[str],
        noise: float = 1e-3,
        seed: int = 42,
        head_kind: HeadKind = "full",
        rank: int = 16,
        dtype: torch.dtype | None = None,
        attn_implementation: str | None = None,
        keep_base_head: bool = False,
    ) -> MultiHeadCausalLM:
        """Every head starts as the base model's head plus N(0, noise^2), with a seed of its own.

        `base` is a folder, a hub id or a transformers causal LM, whose backbone is then used, not copied. The
        embedding stays with the backbone: a head tied to it is copied first. Works under ZeRO-3 without a
        full copy per rank.
        """
        model = load_causal_lm(base, dtype, attn_implementation)
        lora.check_no_adapter(model)
        backbone, output, transform = split_causal_lm(model)
        weight, bias = cast(nn.Parameter, output.weight), cast(nn.Parameter | None, output.bias)
        policy = cls(
            backbone,
            objectives,
            head_kind,
            transform,
            vocab_size=full_shape(weight)[0],
            hidden_size=full_shape(weight)[1],
            bias=bias is not None,
            dtype=weight.dtype,
            rank=rank,
            keep_base_head=keep_base_head,
            generation_config=model.generation_config,
            base_name=model.config._name_or_path or None,
        )
        for head in filter(None, (policy.base_head, *policy.heads.values())):
            head.to(weight.device)
        initialise_heads(policy.base_head, policy.heads, weight, bias, noise, seed)
        return policy

    # -- what it is made of ----------------------------------------------------------------------------------

    def head(self, objective: str) -> Head:
        """One objective's head; ValueError for an objective the model does not have."""
        if objective not in self.heads:
            raise ValueError(unknown_name("objective", objective, self.objectives))
        return cast(Head, self.heads[objective])

    def _heads(self) -> list[Head]:
        return [cast(Head, head) for head in self.heads.values()]

    def add_lora(self, settings: LoraConfig | None = None) -> None:
        """Freeze the backbone and train a LoRA adapter on it instead; the heads stay trainable.

        An adapter is saved alone, on the backbone as it was loaded: one trained in full before must be saved
        and loaded first.
        """
        self.backbone = lora.with_lora(self.backbone, settings or LoraConfig())

    def disable_adapter(self) -> AbstractContextManager[None]:
        """Context in which the backbone computes without its adapter (the reference's backbone)."""
        return lora.adapter_disabled(self.backbone)

    # -- computing -------------------------------------------------------------------------------------------

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None,
        labels: Tensor,
        head_index: Tensor,
        chunk_size: int = DEFAULT_CHUNK_SIZE,
        average: bool = False,
        pair_lengths: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """The training forward; see `completion_logps`. Named forward so that DeepSpeed's and DDP's hooks see
        it.

        `pair_lengths` [R, 3]: input_ids and labels [1, N] are packed pairs (`models/pair_attention.py`), and
        the sequences numbered by head_index [2 R] are first all chosen, then all rejected ones.
        """
        if head_index.numel() and not 0 <= int(head_index.min()) <= int(head_index.max()) < len(
            self.objectives
        ):
            raise ValueError(
                f"head_index {head_index.tolist()} names a head outside 0..{len(self.objectives) - 1}"
            )
        rows = sequence_numbers(labels, pair_lengths)
        hidden = self.hidden_states(input_ids, attention_mask, **packed_arguments(pair_lengths), **kwargs)
        counted = labels != IGNORE_INDEX
        totals = torch.zeros(len(head_index), dtype=torch.float32, device=labels.device)
        # Every head is called, in one order, even without rows: under ZeRO-3 a call is a collective
        # operation.
        for index, head in enumerate(self._heads()):
            own = counted & (head_index == index)[rows]
            logps = head(hidden[own], labels[own], chunk_size)
            totals = totals + sum_rows(logps, rows[own], len(head_index), average)
        return totals

    def completion_logps(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None,
        labels: Tensor,
        head_index: Tensor,
        chunk_size: int = DEFAULT_CHUNK_SIZE,
        average: bool = False,
        **kwargs: Any,
    ) -> Tensor:
        """Log-probability of every row's completion under its own head, fp32 [B]: sum, or mean with
        `average`.

        input_ids, attention_mask, labels [B, T]; labels are already shifted (labels[b, t] is the token after
        input_ids[b, t]) and -100 where a token does not count; head_index [B] numbers `objectives`. One
        backbone forward; every row goes through its own head only, completion tokens only, `chunk_size`
        tokens at a time.
        """
        return self(input_ids, attention_mask, labels, head_index, chunk_size, average, **kwargs)

    @torch.no_grad()
    def reference_completion_logps(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None,
        labels: Tensor,
        chunk_size: int = DEFAULT_CHUNK_SIZE,
        average: bool = False,
    ) -> Tensor:
        """The same [B] under the model this one was made from: adapter off, base head. Needs both to be
        intact.
        """
        if self.base_head is None or any(p.requires_grad for p in self.base_head.parameters()):
            raise ValueError(
                "the reference needs the frozen base head: make the model with keep_base_head=True"
            )
        with self.disable_adapter():
            hidden = self.hidden_states(input_ids, attention_mask)
        rows, positions = (labels != IGNORE_INDEX).nonzero(as_tuple=True)
        logps = self.base_head(hidden[rows, positions], labels[rows, positions], chunk_size)
        return sum_rows(logps, rows, labels.shape[0], average)

    def logits(self, hidden: Tensor, weights: Weights | Tensor) -> Tensor:
        """Weighted logits [..., V] of hidden [..., D].

        `weights` is one `Weights` for all, or a tensor [B, H] in the order of `objectives` that gives every
        row of hidden [B, ..., D] its own, in one pass. For one `Weights` used many times, `merged(weights)`
        once is faster.
        """
        if isinstance(weights, Weights):
            row = torch.tensor(weights.over(self.objectives), dtype=hidden.dtype, device=hidden.device)
            weights = row.expand(hidden.shape[0], -1)
        wanted = (hidden.shape[0], len(self.objectives))
        if weights.shape != wanted:
            raise ValueError(f"weights are {tuple(weights.shape)}, wanted {wanted}: rows by objectives")
        columns = [w.reshape(-1, *(1,) * (hidden.dim() - 1)).to(hidden.dtype) for w in weights.unbind(1)]
        return self.transform(weighted_projection(self._heads(), hidden, columns))

    def merged(self, weights: Weights) -> FullHead:
        """One head with sum_i w_i W_i (and biases): a module that maps hidden [..., D] to logits [..., V]."""
        return merge_heads(self._heads(), weights.over(self.objectives))

    def merged_head(self, weights: Weights) -> Tensor:
        """sum_i w_i W_i, [V, D]. Where the family has a head bias or soft-caps, use `merged(weights)`."""
        return self.merged(weights).weight

    def merge(self, weights: Weights, copied: bool = True) -> PreTrainedModel:
        """An ordinary single-head transformers causal LM whose logits are the weighted sum (before a soft-
        cap).

        LoRA is folded in. `copied=False` hands over this model's backbone instead of a copy: for exporting a
        large model, after which this one must not be used any more.
        """
        head = self.merged(weights)
        model = assemble_causal_lm(lora.plain_backbone(self.backbone, copied), head.weight, head.bias)
        if self.generation_config is not None:
            model.generation_config = self.generation_config
        return model

    # -- parameters and folders ------------------------------------------------------------------------------

    def head_parameters(self) -> Iterator[nn.Parameter]:
        """The heads' trainable parameters."""
        return (parameter for parameter in self.heads.parameters() if parameter.requires_grad)

    def save_pretrained(
        self,
        folder: str | Path,
        tokenizer: PreTrainedTokenizerBase | None = None,
        figures: Figures | None = None,
        state_dict: Mapping[str, Tensor] | None = None,
        with_backbone: bool | None = None,
    ) -> None:
        """Write the model folder; see `mahalo_ray.models.multi_head.save_policy`."""
        save_policy(self, Path(folder), tokenizer, figures, state_dict, with_backbone)

    @classmethod
    def _of_saved(cls, saved: SavedModel) -> MultiHeadCausalLM:
        return policy_of(cls, saved)
