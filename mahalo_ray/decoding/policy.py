"""Language models for the engine: hidden states over its cache, logits with weights per sequence, loading."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    PreTrainedModel,
)

from mahalo_ray.config import ActorsConfig
from mahalo_ray.data import storage
from mahalo_ray.data.templating import ChatFormat
from mahalo_ray.decoding.cached_backbone import CachedBackbone
from mahalo_ray.decoding.cpu_matmul import OneDNNHead
from mahalo_ray.decoding.step_graph import Recorder, record_cuda_graph
from mahalo_ray.models.attention import View
from mahalo_ray.models.backbone import (
    load_causal_lm,
    load_tokenizer,
    split_causal_lm,
)
from mahalo_ray.models.classifiers import load_scorer
from mahalo_ray.models.folder import METADATA_FILE
from mahalo_ray.models.heads import FullHead
from mahalo_ray.models.multi_head import MultiHeadCausalLM
from mahalo_ray.models.reward import ProcessRewardModel
from mahalo_ray.models.scoring import StepScorer
from mahalo_ray.objectives import Weights


@dataclass(frozen=True)
class HeadMix:
    """What a conversation's logits are made of: weights over the heads (None: a policy with a single head),
    and the strength, which is 0 at the model that the policy was made from and 1 at the policy."""

    weights: Weights | None = None
    strength: float = 1.0


class LogitFunction(Protocol):
    """The logits of a batch of requests, whose mixes were given to `Policy.head`."""

    def __call__(self, hidden: Tensor, rows: Tensor) -> Tensor:
        """hidden [B, D], rows [B] (each one's number among those mixes) -> logits [B, V]."""
        ...


class StateFunction(Protocol):
    """The hidden states of a batch of requests, whose mixes were given to `Policy.reader`."""

    def __call__(self, input_ids: Tensor, position_ids: Tensor, kv_cache: View, rows: Tensor) -> Tensor:
        """[B, T] new tokens at these positions, rows [B] (each one's number among those mixes) -> final
        normalised hidden states [B, T, D]."""
        ...


class Policy(Protocol):
    """A causal language model over the decoding cache."""

    device: torch.device
    vocab_size: int
    max_context: int
    end_ids: frozenset[int]  # tokens at which the model stops, by its generation_config
    # How the token loop's forwards are recorded; None: each is run. For policies whose readers are all alike.
    recorder: Recorder | None

    def reader(self, mixes: Sequence[HeadMix]) -> StateFunction:
        """The hidden states of requests with these mixes; built once per batch, called once per token."""
        ...

    def check_mix(self, mix: HeadMix) -> None:
        """ValueError if no conversation can be decoded with these weights or at this strength."""
        ...

    def head(self, mixes: Sequence[HeadMix]) -> LogitFunction:
        """The logits of requests with these mixes; built once per batch, called once per token."""
        ...


class CausalPolicy:
    """An ordinary transformers causal language model: one head, no weights."""

    def __init__(self, model: PreTrainedModel, recorder: Recorder | None = None) -> None:
        self.recorder = recorder
        backbone, self._head, self._transform = split_causal_lm(model)
        self._backbone = CachedBackbone(backbone)
        self.device = self._backbone.device
        self.max_context = self._backbone.max_context
        text = model.config.get_text_config()
        self.vocab_size: int = text.vocab_size
        self.end_ids = _end_ids(model.generation_config)
        self._onednn_head = OneDNNHead(text.hidden_size, self.vocab_size)

    def reader(self, mixes: Sequence[HeadMix]) -> StateFunction:
        return lambda input_ids, position_ids, kv_cache, rows: self._backbone(
            input_ids, position_ids, kv_cache
        )

    @torch.no_grad()
    def logits(self, hidden: Tensor) -> Tensor:
        """[.., D] -> [.., V]."""
        with self._onednn_head():
            return self._transform(self._head(hidden))

    def check_mix(self, mix: HeadMix) -> None:
        if mix.weights is not None:
            raise ValueError(
                f"weights {mix.weights.label()} were given, but this policy is a single-head model"
            )
        if mix.strength != 1:
            raise ValueError(f"strength {mix.strength:g} was given, but this policy is a single-head model")

    def head(self, mixes: Sequence[HeadMix]) -> LogitFunction:
        for mix in mixes:
            self.check_mix(mix)
        return lambda hidden, rows: self.logits(hidden)


class MultiHeadPolicy:
    """A MultiHeadCausalLM: logits are the weighted sum of its heads, weights and strength chosen per
    conversation.

    Merged heads are kept, so the model's parameters must not change while this object is in use.
    """

    def __init__(
        self, model: MultiHeadCausalLM, merged_heads_kept: int = 8, recorder: Recorder | None = None
    ) -> None:
        if recorder is not None and model.adapters is not None:
            raise ValueError(
                "the forwards of a policy with adapters for each objective cannot be recorded: its folded "
                "weights come and go. Set cluster.cuda_graphs to false"
            )
        self.model, self.recorder = model, recorder
        model.mix(None)
        self._backbone = CachedBackbone(model.backbone)
        self.device = self._backbone.device
        self.max_context = self._backbone.max_context
        text = model.config.get_text_config()
        self.vocab_size: int = text.vocab_size
        self.end_ids = _end_ids(model.generation_config)
        self._onednn_head = OneDNNHead(text.hidden_size, self.vocab_size)
        # A batch of different mixes asks every head, and the base's for a strength.
        self._onednn_heads = OneDNNHead(text.hidden_size, self.vocab_size * (len(model.objectives) + 1))
        self._merged: OrderedDict[HeadMix, FullHead] = OrderedDict()
        self._merged_heads_kept = merged_heads_kept

    def reader(self, mixes: Sequence[HeadMix]) -> StateFunction:
        """With adapters, conversations that share weights and strength share folded layers; others get what
        the adapters add by low-rank products, row by row."""
        model = self.model
        weights: Weights | Tensor | None = None
        strength: float | Tensor = 1.0
        if model.adapters is not None and mixes:
            for mix in mixes:
                self.check_mix(mix)
            if len(set(mixes)) == 1:
                weights, strength = mixes[0].weights, mixes[0].strength
            else:
                shares = [mix.weights.over(model.objectives) for mix in mixes if mix.weights is not None]
                weights = torch.tensor(shares, device=self.device)
                strength = torch.tensor([mix.strength for mix in mixes], device=self.device)

        def read(input_ids: Tensor, position_ids: Tensor, kv_cache: View, rows: Tensor) -> Tensor:
            if isinstance(weights, Tensor) and isinstance(strength, Tensor):
                model.mix(weights[rows], strength[rows])
            else:
                model.mix(weights, strength)
            return self._backbone(input_ids, position_ids, kv_cache)

        return read

    def check_mix(self, mix: HeadMix) -> None:
        if mix.weights is None:
            raise ValueError(
                f"give weights: this policy has a head for each of {', '.join(self.model.objectives)}"
            )
        mix.weights.over(self.model.objectives)
        self.model.check_strength(mix.strength)

    def head(self, mixes: Sequence[HeadMix]) -> LogitFunction:
        """Conversations that share weights and strength share one merged head: never H heads per token for
        them."""
        for mix in mixes:
            self.check_mix(mix)
        if len(set(mixes)) == 1:
            merged = self._merged_head(mixes[0])
            return lambda hidden, rows: self._logits(merged, hidden)
        weights = [mix.weights.over(self.model.objectives) for mix in mixes if mix.weights is not None]
        table = torch.tensor(weights, device=self.device)
        if all(mix.strength == 1 for mix in mixes):
            return lambda hidden, rows: self._mixture(hidden, table[rows], 1.0)
        strengths = torch.tensor([mix.strength for mix in mixes], device=self.device)
        return lambda hidden, rows: self._mixture(hidden, table[rows], strengths[rows])

    def _merged_head(self, mix: HeadMix) -> FullHead:
        """The merged heads of the most recently used mixes."""
        assert mix.weights is not None, "check_mix refuses a policy with heads and no weights"
        head = self._merged.pop(mix, None)
        self._merged[mix] = head = self.model.merged_head(mix.weights, mix.strength) if head is None else head
        if len(self._merged) > self._merged_heads_kept:
            self._merged.popitem(last=False)
        return head

    @torch.no_grad()
    def _mixture(self, hidden: Tensor, weights: Tensor, strength: float | Tensor) -> Tensor:
        with self._onednn_heads():
            return self.model.logits(hidden, weights, strength)

    @torch.no_grad()
    def _logits(self, head: FullHead, hidden: Tensor) -> Tensor:
        with self._onednn_head():
            logits: Tensor = head(hidden)
        return logits


def _end_ids(config: GenerationConfig | None) -> frozenset[int]:
    ids = None if config is None else config.eos_token_id
    return frozenset([ids] if isinstance(ids, int) else ids or ())


def check_vocabulary(chat: ChatFormat, vocab_size: int) -> None:
    """ValueError if the tokenizer gives ids for which the model's embedding has no row.

    Markers that neither text nor the chat template can produce may lie beyond it: the image token in the
    tokenizer of Gemma's text models, for example.
    """
    tokenizer = chat.tokenizer
    beyond = {token: number for token, number in tokenizer.get_vocab().items() if number >= vocab_size}
    if not beyond:
        return
    unused = {tokenizer.convert_ids_to_tokens(number) for number in chat.unused_markers()}
    wrong = sorted((number, token) for token, number in beyond.items() if token not in unused)
    if wrong:
        number, token = wrong[0]
        raise ValueError(
            f"the tokenizer '{tokenizer.name_or_path}' and the model do not belong together: token {token!r} "
            f"has the id {number}, and the model's embedding has {vocab_size} rows. Take the model's own "
            "tokenizer, or, if tokens were added to it, call model.resize_token_embeddings(len(tokenizer)) "
            "and train them before saving"
        )


def as_policy(model: Policy | MultiHeadCausalLM | PreTrainedModel) -> Policy:
    """The adapter for a model; adapters pass through."""
    if isinstance(model, MultiHeadCausalLM):
        return MultiHeadPolicy(model)
    if isinstance(model, PreTrainedModel):
        return CausalPolicy(model)
    return model


@dataclass(frozen=True)
class DeviceConfig:
    """Where a model runs: torch device and dtype names, and whether the forwards of a token loop are recorded
    as CUDA graphs there."""

    device: str = "cpu"
    dtype: str = "float32"
    cuda_graphs: bool = False

    @classmethod
    def of(cls, cluster: ActorsConfig, dtype: str) -> DeviceConfig:
        """That of a job's workers."""
        return cls(cluster.device, dtype, cluster.cuda_graphs)

    @property
    def num_gpus(self) -> int:
        """GPUs that a process with models needs."""
        return int(self.device == "cuda")

    @property
    def torch_dtype(self) -> torch.dtype:
        found = getattr(torch, self.dtype)
        assert isinstance(found, torch.dtype)
        return found


def load_policy(url: str, placement: DeviceConfig) -> tuple[Policy, ChatFormat]:
    """A multi-head policy (folder with mahalo.json) or an ordinary causal language model, and its chat
    format.

    `url` is a local path or an fsspec URL. FileNotFoundError if nothing is there; ValueError if the tokenizer
    has more tokens than the model, or its chat template does not say where a reply ends.
    """
    folder = storage.local_copy(url)
    tokenizer = load_tokenizer(folder)
    policy: Policy
    recorder = record_cuda_graph if placement.cuda_graphs else None
    if Path(folder, METADATA_FILE).is_file():
        heads = MultiHeadCausalLM.from_pretrained(
            folder, dtype=placement.torch_dtype, device=placement.device
        )
        policy = MultiHeadPolicy(heads.eval(), recorder=recorder)
    else:
        model = load_causal_lm(folder, placement.torch_dtype)
        policy = CausalPolicy(model.to(placement.device).eval(), recorder)
    chat = ChatFormat(tokenizer, policy.end_ids)
    check_vocabulary(chat, policy.vocab_size)
    return policy, chat


def load_reward_model(url: str, placement: DeviceConfig) -> ProcessRewardModel:
    """A process reward model saved by us; raises FileNotFoundError if nothing is there."""
    folder = storage.local_copy(url)
    model = ProcessRewardModel.from_pretrained(folder, dtype=placement.torch_dtype, device=placement.device)
    _check_reward_vocabulary(model)
    return model.eval()


def load_step_scorer(url: str, placement: DeviceConfig, objective: str | None = None) -> StepScorer:
    """Any reward model that can guide decoding: ours, or a third-party sequence or token classifier,
    for which `objective` names what it scores.
    """
    scorer = load_scorer(storage.local_copy(url), objective, placement.torch_dtype, placement.device)
    if isinstance(scorer, ProcessRewardModel):
        _check_reward_vocabulary(scorer)
    return scorer


def _check_reward_vocabulary(model: ProcessRewardModel) -> None:
    if model.tokenizer is not None:
        check_vocabulary(ChatFormat(model.tokenizer), model.config.get_text_config().vocab_size)
