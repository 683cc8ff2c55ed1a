"""The multi-head policy: one shared backbone, one vocabulary head per objective (MAHALO, arXiv 2510.01167).

Beside the weights w a strength s is chosen per call: W_0 + s sum_i w_i (W_i - W_0), where W_0 is the head of
the model that the policy was made from (decoding-time realignment, Liu et al., 2024, arXiv 2402.02992).

Shapes: B rows of T tokens, D hidden size, V vocabulary, H objectives.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import Any, cast, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from mahalo_ray.config import AdaptersConfig, HeadKind, LoraConfig
from mahalo_ray.logprobs import DEFAULT_CHUNK_SIZE, IGNORE_INDEX, sum_rows
from mahalo_ray.models import lora
from mahalo_ray.models.adapters import ObjectiveAdapters
from mahalo_ray.models.backbone import (
    BackboneModel,
    CompletionStates,
    SavedModel,
    assemble_causal_lm,
    completion_states,
    load_causal_lm,
    split_causal_lm,
)
from mahalo_ray.models.folder import ADAPTERS_FILE, Card, fill_parameters, save_tensors
from mahalo_ray.models.heads import (
    FullHead,
    Head,
    LogitTransform,
    LowRankHead,
    check_objectives,
    initialise_full,
    initialise_heads,
    merge_heads,
    mixture_token_logps,
    weighted_projection,
)
from mahalo_ray.models.pair_attention import sequence_numbers
from mahalo_ray.models.sharding import full_shape, sharded_creation
from mahalo_ray.objectives import Weights, unknown_name


class MultiHeadCausalLM(BackboneModel):
    """A policy with one head per objective: z_i = W_i h(x), decoded as softmax(sum_i w_i z_i).

    The balance w is chosen per call, after training (MAHALO, arXiv 2510.01167, section 3.2). Call it like a
    transformers causal LM, with `weights` besides; `merge(weights)` gives an ordinary one. With many
    conversations at a time, or a balance for each of them, use `GuidedDecoder`.

    `heads[objective].weight` is W_i [V, D]. `base_head` is W_0, the head of the model it was made from,
    frozen: always there with low-rank heads (they are differences from it), on request with full ones, else
    None. A `strength` other than 1 needs it. Only the head moves with the strength: what training changed in
    the backbone (or its adapter) stays, so 0 is exactly the model it was made from where the backbone was
    frozen. Where the family soft-caps its logits, heads are summed before the cap, so that a merged model is
    the same function.

    >>> from mahalo_ray import MultiHeadCausalLM, Weights
    >>> policy = MultiHeadCausalLM.from_base("model", ["accuracy", "engagement"])
    >>> weights = Weights.parse("accuracy=0.7,engagement=0.3")
    >>> ids = tokenizer("What is 2 + 3?", return_tensors="pt").input_ids
    >>> policy(ids, weights=weights).logits.shape == (1, ids.shape[1], policy.vocab_size)
    True
    >>> tokens = policy.generate(ids, weights=weights, max_new_tokens=5, do_sample=False)
    >>> policy.save_pretrained("policy", tokenizer)
    >>> merged = MultiHeadCausalLM.from_pretrained("policy").merge(weights)
    >>> bool((merged.generate(ids, max_new_tokens=5, do_sample=False) == tokens).all())
    True
    """

    kind = "multi_head_causal_lm"

    def __init__(
        self,
        backbone: nn.Module,
        objectives: Sequence[str],
        *,
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
        adapters: AdaptersConfig | None = None,
        adapted_objectives: int | None = None,
    ) -> None:
        """With uninitialised heads and adapters: use `from_base` or `from_pretrained`. The adapters are those
        of the first `adapted_objectives` objectives (None: of all)."""
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
        self.adapters: ObjectiveAdapters | None = None
        if adapters is not None and adapters.depth != 0:
            if adapters.freeze_backbone:
                backbone.requires_grad_(False)
            adapted = self.objectives[:adapted_objectives]
            self.adapters = ObjectiveAdapters.on(backbone, adapted, adapters)
        self.base_head: FullHead | None = None
        self.heads = nn.ModuleDict()
        with sharded_creation():
            if keep_base_head or head_kind == "low_rank":
                self.base_head = FullHead.empty(vocab_size, hidden_size, bias, transform, dtype)
                self.base_head.requires_grad_(False)
            for objective in self.objectives:
                self.heads[objective] = self._empty_head(bias, dtype)

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
        adapters: AdaptersConfig | None = None,
    ) -> MultiHeadCausalLM:
        """Every head starts as the base model's head plus N(0, noise^2), with a seed of its own, and
        `adapters` on the upper blocks as nothing added.

        `base` is a folder, a hub id or a transformers causal LM, whose backbone is then used, not copied. The
        embedding stays with the backbone: a head tied to it is copied first. Works under ZeRO-3 without a
        full copy per rank. ValueError for a family whose head cannot be separated from its backbone.
        """
        model = load_causal_lm(base, dtype, attn_implementation)
        lora.check_no_adapter(model)
        backbone, output, transform = split_causal_lm(model)
        weight, bias = cast(nn.Parameter, output.weight), cast(nn.Parameter | None, output.bias)
        policy = cls(
            backbone,
            objectives,
            head_kind=head_kind,
            transform=transform,
            vocab_size=full_shape(weight)[0],
            hidden_size=full_shape(weight)[1],
            bias=bias is not None,
            dtype=weight.dtype,
            rank=rank,
            keep_base_head=keep_base_head,
            generation_config=model.generation_config,
            base_name=model.config._name_or_path or None,
            adapters=adapters,
        )
        if policy.adapters is not None:
            policy.adapters.initialise(policy.objectives, seed)
        for head in filter(None, (policy.base_head, *policy.heads.values())):
            head.to(weight.device)
        initialise_heads(policy.base_head, policy.heads, weight, bias, noise, seed)
        return policy

    def _empty_head(self, bias: bool, dtype: torch.dtype) -> Head:
        if self.head_kind == "full":
            return FullHead.empty(self.vocab_size, self.hidden_size, bias, self.transform, dtype)
        assert self.base_head is not None
        return LowRankHead(self.base_head, self.rank)

    # -- parts -----------------------------------------------------------------------------------------------

    def head(self, objective: str) -> Head:
        """One objective's head; ValueError for an objective the model does not have."""
        if objective not in self.heads:
            raise ValueError(unknown_name("objective", objective, self.objectives))
        return cast(Head, self.heads[objective])

    def _heads(self) -> list[Head]:
        return [cast(Head, head) for head in self.heads.values()]

    def backbone_parameters(self) -> Iterator[nn.Parameter]:
        """The trainable parameters that all objectives share."""
        own = set() if self.adapters is None else {id(p) for p in self.adapters.parameters().values()}
        return (parameter for parameter in super().backbone_parameters() if id(parameter) not in own)

    def adapter_parameters(self) -> Iterator[nn.Parameter]:
        """The trainable parameters of the objectives' adapters; none without them."""
        adapters = {} if self.adapters is None else self.adapters.parameters()
        return (parameter for parameter in adapters.values() if parameter.requires_grad)

    def mix(self, weights: Weights | Tensor | None, strength: float | Tensor = 1.0) -> None:
        """What the adapters of the following forwards of `backbone` are mixed by: weights and strength as in
        `logits`, a tensor [B, T, H] for tokens by themselves, or None: the shared backbone alone. Nothing to
        do for a policy without adapters. All methods of this class that take weights call it."""
        if self.adapters is None:
            return
        adapted = self.adapters.objectives  # the first ones: those that were added later have no adapters
        if isinstance(weights, Weights):
            shares = weights.over(self.objectives)[:adapted]
            if not isinstance(strength, Tensor):
                self.adapters.mix.current = tuple(strength * w for w in shares)
                return
            weights = torch.tensor(shares, device=self.device).expand(len(strength), -1)
        if weights is not None:
            rows = (weights if weights.dim() == 3 else weights[:, None])[..., :adapted]
            weights = rows * torch.as_tensor(strength, device=rows.device).reshape(-1, 1, 1)
        self.adapters.mix.current = weights

    def hidden_states(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        weights: Weights | Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """Final normalised states [B, T, D]; kwargs (position_ids, kv_cache...) reach the backbone. With
        adapters they depend on `weights` (see `mix`); None: those of the shared backbone alone."""
        self.mix(weights)
        return super().hidden_states(input_ids, attention_mask, **kwargs)

    def enable_pair_packing(self) -> None:
        self.mix(None)
        super().enable_pair_packing()

    def head_parameters(self) -> Iterator[nn.Parameter]:
        """The heads' trainable parameters."""
        return (parameter for parameter in self.heads.parameters() if parameter.requires_grad)

    def check_strength(self, strength: float) -> None:
        """ValueError for a strength that is no finite number of at least 0, or other than 1 without the base
        head."""
        if not (math.isfinite(strength) and strength >= 0):
            raise ValueError(f"strength is {strength}: it must be a finite number of at least 0")
        if strength != 1 and self.base_head is None:
            raise ValueError(
                f"strength {strength:g} needs the head of the model that this policy was made from, and the "
                "policy was saved without it: add it with `MultiHeadCausalLM.set_base_head(SFT_MODEL)` and "
                "save the policy again, or use strength 1"
            )

    def set_base_head(self, base: str | Path | PreTrainedModel) -> None:
        """Take the head of the model that this policy was made from as `base_head`, if it was saved without.

        ValueError for a model of other sizes, and for low-rank heads, which have it.
        """
        if self.head_kind == "low_rank":
            raise ValueError("low-rank heads are differences from a base head that cannot be exchanged")
        _, output, transform = split_causal_lm(load_causal_lm(base))
        weight, bias = cast(nn.Parameter, output.weight), cast(nn.Parameter | None, output.bias)
        like = self.head(self.objectives[0])
        if weight.shape != like.weight.shape or (bias is None) != (like.head_bias is None):
            raise ValueError(
                f"the base head is {list(weight.shape)} and the heads {list(like.weight.shape)}, and "
                "either both have a bias or neither: give the model that the policy was made from"
            )
        if transform != self.transform:
            raise ValueError(
                f"the base model's logits have {transform}, this policy's {self.transform}: give the model "
                "that the policy was made from"
            )
        head = FullHead.empty(
            self.vocab_size,
            self.hidden_size,
            bias is not None,
            self.transform,
            like.weight.dtype,
            like.weight.device,
        )
        initialise_full(head, weight, bias, 0.0, 0)
        self.base_head = head.requires_grad_(False)

    def add_lora(self, settings: LoraConfig | None = None) -> None:
        """Freeze the backbone and train a LoRA adapter on it instead; the heads stay trainable.

        An adapter is saved alone, on the backbone as it was loaded: one trained in full before must be saved
        and loaded first.
        """
        self.backbone = lora.with_lora(self.backbone, settings or LoraConfig())

    def add_heads(self, objectives: Sequence[str], noise: float = 1e-3, seed: int = 42) -> None:
        """Freeze all that is there, and add a trainable head for each of these objectives: it starts as the
        base head plus N(0, noise^2), as in `from_base`, and reads the states of the backbone as it is.

        What the other heads compute does not change, nor do mixtures of them. New objectives have no adapters
        of their own. ValueError for an objective that is there already, and without the base head.

        >>> policy = MultiHeadCausalLM.from_pretrained("policy")
        >>> policy.add_heads(["brevity"])
        >>> policy.objectives
        ('accuracy', 'engagement', 'brevity')
        """
        if there := [name for name in objectives if name in self.objectives]:
            raise ValueError(f"the policy has a head for {', '.join(there)} already: name new objectives")
        if self.base_head is None:
            raise ValueError(
                "a new head starts as the head of the model that the policy was made from, and the policy "
                "was saved without it: add it with `MultiHeadCausalLM.set_base_head(SFT_MODEL)`"
            )
        check_objectives([*self.objectives, *objectives])
        self.requires_grad_(False)
        weight, bias, added = self.base_head.weight, self.base_head.bias, nn.ModuleDict()
        with sharded_creation():
            for objective in objectives:
                added[objective] = self._empty_head(bias is not None, weight.dtype)
        added.to(weight.device)
        initialise_heads(None, added, weight, bias, noise, seed)
        for objective, head in added.items():
            self.heads[objective] = head
        self.objectives = (*self.objectives, *objectives)

    def train(self, mode: bool = True) -> MultiHeadCausalLM:
        """A backbone that is frozen as a whole stays in evaluation mode: dropout must not disturb it."""
        super().train(mode)
        if not any(parameter.requires_grad for parameter in self.backbone.parameters()):
            self.backbone.eval()
        return self

    def disable_adapter(self) -> AbstractContextManager[None]:
        """Context in which the backbone computes without its adapter (the reference's backbone)."""
        return lora.adapter_disabled(self.backbone)

    # -- as a transformers causal LM -------------------------------------------------------------------------

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        weights: Weights | Tensor | None = None,
        labels: Tensor | None = None,
        strength: float = 1.0,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Logits [B, T, V] of the heads mixed by `weights` at this `strength`, as a transformers output.

        input_ids, attention_mask [B, T]. `weights`: one `Weights` for all rows, or a tensor [B, H] in the
        order of `objectives`; None is for policies with a single head. With `labels` [B, T] (aligned with
        input_ids, -100 where a token does not count) `loss` is the mean cross entropy in nats, as in
        transformers. Other arguments (position_ids, past_key_values...) go to the backbone. Training
        uses `completion_logps`, which never holds whole logits.
        """
        kwargs.setdefault("use_cache", False)
        self.mix(self._single_head() if weights is None else weights, strength)
        output = self.backbone(
            input_ids=input_ids, attention_mask=attention_mask, **{**kwargs, "return_dict": True}
        )
        mixed = self._single_head() if weights is None else weights
        logits = self.logits(output.last_hidden_state, mixed, strength)
        loss = None
        if labels is not None:
            predictions = logits[:, :-1].flatten(0, 1).float()
            loss = F.cross_entropy(predictions, labels[:, 1:].flatten(), ignore_index=IGNORE_INDEX)
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=output.get("past_key_values"),
            hidden_states=output.get("hidden_states"),
            attentions=output.get("attentions"),
        )

    @torch.no_grad()
    def generate(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        weights: Weights | None = None,
        strength: float = 1.0,
        **kwargs: Any,
    ) -> Tensor:
        """Token ids [B, T + new] as `transformers.generate` gives them for the mixed head.

        input_ids [B, T], left-padded where prompts differ in length, with their attention_mask. `weights`
        None is for policies with a single head. Every other argument is that of `transformers.generate`.
        """
        training = self.training
        weights = self._single_head() if weights is None else weights
        head = self.merged_head(weights, strength)
        self.mix(weights, strength)
        model = assemble_causal_lm(self.plain_backbone, head.weight, head.bias).eval()
        if self.generation_config is not None:
            model.generation_config = self.generation_config
        try:
            return cast(Tensor, model.generate(input_ids, attention_mask=attention_mask, **kwargs))
        finally:
            self.train(training)

    def _single_head(self) -> Weights:
        if len(self.objectives) > 1:
            raise ValueError(f"give weights: this policy has a head for each of {', '.join(self.objectives)}")
        return Weights.one(self.objectives[0])

    # -- log-probs and logits --------------------------------------------------------------------------------

    def completion_logps(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None,
        labels: Tensor,
        head_index: Tensor,
        chunk_size: int = DEFAULT_CHUNK_SIZE,
        average: bool = False,
        pair_lengths: Tensor | None = None,
    ) -> Tensor:
        """Log-probability of every row's completion under its own head, fp32 [B] in nats: sum, or mean with
        `average`.

        input_ids, attention_mask, labels [B, T]; labels are already shifted (labels[b, t] is the token after
        input_ids[b, t]) and -100 where a token does not count; head_index [B] numbers `objectives`. One
        backbone forward; every row goes through its own head only, completion tokens only, `chunk_size`
        tokens at a time. With `pair_lengths` [R, 3] the tokens [1, N] are packed pairs and head_index [2 R]
        has first all chosen, then all rejected answers (see `completion_states`). ValueError for a head that
        does not exist.
        """
        if head_index.numel() and not 0 <= int(head_index.min()) <= int(head_index.max()) < len(
            self.objectives
        ):
            raise ValueError(
                f"head_index {head_index.tolist()} names a head outside 0..{len(self.objectives) - 1}"
            )
        own = F.one_hot(head_index, len(self.objectives)).float()
        states = self._completion_states(input_ids, attention_mask, labels, pair_lengths, own)
        totals = torch.zeros(states.completions, dtype=torch.float32, device=labels.device)
        # Every head is called, in one order, even without rows: under ZeRO-3 a call gathers the head's shards
        # from all ranks, and a rank that skipped it would leave the others waiting.
        for index, head in enumerate(self._heads()):
            routed = (head_index == index)[states.sequences]
            logps = head(states.hidden[routed], states.labels[routed], chunk_size)
            totals = totals + sum_rows(logps, states.sequences[routed], states.completions, average)
        return totals

    def mixture_logps(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None,
        labels: Tensor,
        weights: Tensor,
        chunk_size: int = DEFAULT_CHUNK_SIZE,
        average: bool = False,
        pair_lengths: Tensor | None = None,
    ) -> Tensor:
        """`completion_logps` where every row has a mixture of all heads of its own: weights [B, H] in the
        order of `objectives` (with packed pairs [2 R, H], chosen answers first)."""
        states = self._completion_states(input_ids, attention_mask, labels, pair_lengths, weights)
        of_tokens = weights[states.sequences]
        logps = mixture_token_logps(self._heads(), states.hidden, states.labels, of_tokens, chunk_size)
        return sum_rows(logps, states.sequences, states.completions, average)

    def _completion_states(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None,
        labels: Tensor,
        pair_lengths: Tensor | None,
        weights: Tensor,
    ) -> CompletionStates:
        """The states that predict the completions' tokens, with every row's adapters mixed by weights
        [B, H]."""
        tokens = None  # mixing weights [B, T, H]
        if self.adapters is not None:
            tokens = weights[sequence_numbers(labels, pair_lengths)]
        read = partial(self.hidden_states, weights=tokens)
        return completion_states(read, input_ids, attention_mask, labels, pair_lengths)

    def logits(self, hidden: Tensor, weights: Weights | Tensor, strength: float | Tensor = 1.0) -> Tensor:
        """Weighted logits [..., V] of hidden [..., D].

        `weights` is one `Weights` for all, or a tensor [B, H] in the order of `objectives` that gives every
        row of hidden [B, ..., D] its own, in one pass; `strength`, one number or a tensor [B], likewise. For
        one `Weights` used many times, `merged_head` once is faster.
        """
        if isinstance(weights, Weights):
            row = torch.tensor(weights.over(self.objectives), dtype=hidden.dtype, device=hidden.device)
            weights = row.expand(hidden.shape[0], -1)
        expected = (hidden.shape[0], len(self.objectives))
        if weights.shape != expected:
            raise ValueError(f"weights are {tuple(weights.shape)}, expected {expected}: rows by objectives")
        heads, shares = self._heads(), weights
        if isinstance(strength, Tensor) or strength != 1:
            base_head = self._base_head_for(strength)
            strengths = torch.as_tensor(strength, dtype=weights.dtype, device=weights.device)
            strengths = strengths.expand(len(weights))[:, None]
            heads, shares = [base_head, *heads], torch.cat([1 - strengths, strengths * weights], dim=1)
        columns = [w.reshape(-1, *(1,) * (hidden.dim() - 1)).to(hidden.dtype) for w in shares.unbind(1)]
        return self.transform(weighted_projection(heads, hidden, columns))

    def merged_head(self, weights: Weights, strength: float = 1.0) -> FullHead:
        """One head with W_0 + s sum_i w_i (W_i - W_0) (and biases), s the strength, which is sum_i w_i W_i at
        s = 1: a module that maps hidden [..., D] to logits [..., V]. ValueError as `check_strength` says."""
        shares = weights.over(self.objectives)
        if strength == 1:
            return merge_heads(self._heads(), shares)
        base_head = self._base_head_for(strength)
        return merge_heads([base_head, *self._heads()], [1 - strength, *(strength * w for w in shares)])

    def _base_head_for(self, strength: float | Tensor) -> FullHead:
        if not isinstance(strength, Tensor):
            self.check_strength(strength)
        if self.base_head is None:
            raise ValueError("strengths need the base head: see `MultiHeadCausalLM.set_base_head`")
        return self.base_head

    def merge(self, weights: Weights, copied: bool = True, strength: float = 1.0) -> PreTrainedModel:
        """An ordinary single-head transformers causal LM whose logits are the weighted sum (before a
        soft-cap) at this `strength`.

        LoRA and the objectives' adapters are folded in. `copied=False` hands over this model's backbone
        instead of a copy: for exporting a large model, after which this one must not be used any more.
        """
        head = self.merged_head(weights, strength)
        backbone = lora.fold_adapter(self.backbone, copied)
        if self.adapters is not None:
            shares = weights.over(self.objectives)[: self.adapters.objectives]
            backbone = self.adapters.fold_into(backbone, tuple(strength * w for w in shares))
        model = assemble_causal_lm(backbone, head.weight, head.bias).eval()
        if self.generation_config is not None:
            model.generation_config = self.generation_config
        return model

    # -- folder ----------------------------------------------------------------------------------------------

    def _backbone_is_as_loaded(self) -> bool:
        return self.has_lora

    def _metadata(self) -> dict[str, Any]:
        return {
            "objectives": list(self.objectives),
            "head_kind": self.head_kind,
            "rank": self.rank,
            "keep_base_head": self.base_head is not None,
            "vocab_size": self.vocab_size,
            "hidden_size": self.hidden_size,
            "head_bias": any(name.endswith("bias") for name in self.head_file_parameters()),
            "logit_scale": self.transform.scale,
            "logit_softcap": self.transform.softcap,
            **self._adapters_metadata(),
        }

    def _adapters_metadata(self) -> dict[str, Any]:
        if self.adapters is None:
            return {}
        adapted, metadata = self.adapters.objectives, {"adapters": self.adapters.metadata()}
        return metadata if adapted == len(self.objectives) else {**metadata, "adapted_objectives": adapted}

    def _card(self) -> Card:
        return Card(
            "Multi-head policy",
            "A multi-head policy: one backbone and one vocabulary head per objective. Load it with "
            "`mahalo_ray.MultiHeadCausalLM.from_pretrained`, and merge the heads at weights of your choice "
            "with `.merge(Weights.parse(...))` into an ordinary transformers model.",
            dict.fromkeys(self.objectives, f"{self.head_kind} head"),
        )

    def _save_extras(self, folder: Path, state: Mapping[str, Tensor]) -> None:
        if self.generation_config is not None:
            self.generation_config.save_pretrained(str(folder))
        if self.adapters is not None:
            names = self.adapters.parameters()
            save_tensors(folder / ADAPTERS_FILE, {name: state[f"backbone.{name}"] for name in names})

    def _fill_extras(self, folder: Path) -> None:
        if self.adapters is not None:
            fill_parameters(folder / ADAPTERS_FILE, self.adapters.parameters())

    @classmethod
    def _from_saved(cls, saved: SavedModel) -> MultiHeadCausalLM:
        metadata = saved.metadata
        generation = saved.folder / "generation_config.json"
        return cls(
            saved.backbone,
            metadata["objectives"],
            head_kind=metadata["head_kind"],
            transform=LogitTransform(metadata["logit_scale"], metadata["logit_softcap"]),
            vocab_size=metadata["vocab_size"],
            hidden_size=metadata["hidden_size"],
            bias=metadata["head_bias"],
            dtype=next(saved.backbone.parameters()).dtype,
            rank=metadata["rank"],
            keep_base_head=metadata["keep_base_head"],
            generation_config=(
                GenerationConfig.from_pretrained(str(saved.folder)) if generation.is_file() else None
            ),
            base_name=saved.base_name,
            adapters=AdaptersConfig(**metadata["adapters"]) if metadata.get("adapters") else None,
            adapted_objectives=metadata.get("adapted_objectives"),
        )
