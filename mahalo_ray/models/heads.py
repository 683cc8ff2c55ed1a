"""Vocabulary heads: one per objective, either a full matrix or a low-rank difference from the SFT head."""

from __future__ import annotations

import zlib
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PretrainedConfig

from mahalo_ray.logprobs import DEFAULT_CHUNK_SIZE, token_logps
from mahalo_ray.models.sharding import full_shape, gathered


@dataclass(frozen=True)
class LogitTransform:
    """The scale and soft cap behind a model's head: logits = softcap * tanh(scale * (W h + b) / softcap)."""

    # tanh is not linear: the weighted sum of capped logits is not the capped output of any matrix. Heads are
    # therefore mixed before it, sum_i w_i (W_i h + b_i), and the cap is applied once. Mixed behind the cap,
    # `merge` could not give an ordinary model with the same logits as the mixture.

    scale: float = 1.0
    softcap: float | None = None

    @classmethod
    def of(cls, config: PretrainedConfig) -> LogitTransform:
        """Read it from a transformers config: Gemma and nanochat soft-cap, Cohere, Granite and Falcon-H1
        scale.
        """
        values = config.get_text_config().to_dict()
        scale = 1.0
        for key, power in (("logit_scale", 1), ("lm_head_multiplier", 1), ("logits_scaling", -1)):
            if values.get(key) is not None:
                scale *= values[key] ** power
        return cls(scale=scale, softcap=values.get("final_logit_softcapping"))

    def __call__(self, logits: Tensor) -> Tensor:
        if self.scale != 1.0:
            logits = logits * self.scale
        if self.softcap is not None:
            logits = self.softcap * torch.tanh(logits / self.softcap)
        return logits


class Head(nn.Module, ABC):
    """Hidden states to logits, or to log-probs of given tokens.

    All use of the parameters happens inside `forward`, so that ZeRO-3, which gathers a module's parameters
    when the module is called, works; zero rows are legal, since every rank must call every head. `.weight` is
    the head's matrix [V, D].
    """

    weight: Tensor
    head_bias: Tensor | None

    def __init__(self, transform: LogitTransform) -> None:
        super().__init__()
        self.transform = transform

    def forward(
        self,
        hidden: Tensor | None,
        labels: Tensor | None = None,
        chunk_size: int = DEFAULT_CHUNK_SIZE,
        transformed: bool = True,
    ) -> Tensor:
        """hidden [..., D] -> logits [..., V]; with labels [N] and hidden [N, D] -> token log-probs [N],
        chunked. `transformed` False: logits before scale and soft cap, to be mixed with those of other heads.
        Without hidden states: a copy of the head as one matrix [V, D], or [V, D + 1] with its bias.
        """
        if hidden is None:
            bias = () if self.head_bias is None else (self.head_bias[:, None],)
            return torch.cat([self.weight, *bias], dim=1)
        if labels is None:
            projected = self.project(hidden)
            return self.transform(projected) if transformed else projected
        return self.token_logps(hidden, labels, chunk_size)

    @abstractmethod
    def project(self, hidden: Tensor) -> Tensor:
        """W h + b, [..., V], before scale and soft cap: heads are weighted and summed here."""

    @abstractmethod
    def token_logps(self, hidden: Tensor, labels: Tensor, chunk_size: int) -> Tensor:
        """log p(label) [N] for hidden [N, D]."""


class FullHead(Head):
    """A matrix W [V, D] and, where the base model has one, a bias [V]; parameters may be shared."""

    weight: nn.Parameter

    def __init__(self, weight: nn.Parameter, bias: nn.Parameter | None, transform: LogitTransform) -> None:
        super().__init__(transform)
        self.weight = weight
        self.bias = bias

    @classmethod
    def empty(
        cls,
        vocab_size: int,
        hidden_size: int,
        bias: bool,
        transform: LogitTransform,
        dtype: torch.dtype,
        device: torch.device | str | None = None,
    ) -> FullHead:
        """An uninitialised head, to be filled by the caller."""
        return cls(
            nn.Parameter(torch.empty(vocab_size, hidden_size, dtype=dtype, device=device)),
            nn.Parameter(torch.empty(vocab_size, dtype=dtype, device=device)) if bias else None,
            transform,
        )

    @property
    def head_bias(self) -> Tensor | None:  # type: ignore[override]
        return self.bias

    def project(self, hidden: Tensor) -> Tensor:
        return F.linear(hidden, self.weight, self.bias)

    def token_logps(self, hidden: Tensor, labels: Tensor, chunk_size: int) -> Tensor:
        return token_logps(
            hidden,
            self.weight,
            labels,
            chunk_size,
            logit_softcap=self.transform.softcap,
            logit_scale=self.transform.scale,
            bias=self.bias,
        )


class LowRankHead(Head):
    """W_0 + A B with A [V, r], B [r, D]; W_0 (and the bias) belong to the base head and are shared by all
    heads.
    """

    def __init__(self, base: FullHead, rank: int) -> None:
        super().__init__(base.transform)
        if rank < 1:
            raise ValueError(f"rank of the low-rank heads is {rank}: it must be at least 1")
        # Registered here too, so that calling this head gathers them under ZeRO-3; the objects are shared.
        self.base_weight = base.weight
        self.base_bias = base.bias
        vocab_size, hidden_size = full_shape(base.weight)
        self.factor_a = nn.Parameter(base.weight.new_empty(vocab_size, rank))
        self.factor_b = nn.Parameter(base.weight.new_empty(rank, hidden_size))

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        return self.base_weight + self.factor_a @ self.factor_b

    @property
    def head_bias(self) -> Tensor | None:  # type: ignore[override]
        return self.base_bias

    def project(self, hidden: Tensor) -> Tensor:
        return F.linear(hidden, self.base_weight, self.base_bias) + self.project_difference(hidden)

    def project_difference(self, hidden: Tensor) -> Tensor:
        """A B h, [..., V]."""
        return F.linear(F.linear(hidden, self.factor_b), self.factor_a)

    def token_logps(self, hidden: Tensor, labels: Tensor, chunk_size: int) -> Tensor:
        return token_logps(
            hidden,
            self.base_weight,
            labels,
            chunk_size,
            logit_softcap=self.transform.softcap,
            logit_scale=self.transform.scale,
            bias=self.base_bias,
            low_rank=(self.factor_a, self.factor_b),
        )


@torch.no_grad()
def initialise_full(head: FullHead, weight: Tensor, bias: Tensor | None, noise: float, seed: int) -> None:
    """W = base weight + noise * N(0, 1). Drawn on the CPU in fp32, so every device starts alike."""
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randn(weight.shape, generator=generator).mul_(noise).to(weight.device)
    head.weight.copy_((weight.float() + drawn).to(weight.dtype))
    if head.bias is not None:
        assert bias is not None
        head.bias.copy_(bias)


@torch.no_grad()
def initialise_low_rank(head: LowRankHead, noise: float, seed: int) -> None:
    """B [r, D] has rows of about unit length, A [V, r] is small: an entry of A B has standard deviation
    `noise`, as in a full head.
    """
    # Variances: 1 / D in B, noise^2 D / r in A; an entry of A B sums r products: r (noise^2 D / r) / D. The
    # usual start of LoRA, one factor at zero, is not taken: the other one would have no gradient in the first
    # step, and all heads would start as the same function. So neither is zero (for noise > 0).
    generator = torch.Generator().manual_seed(seed)
    (rank, hidden_size), vocab_size = head.factor_b.shape, head.factor_a.shape[0]
    factor_b = torch.randn(rank, hidden_size, generator=generator) / hidden_size**0.5
    factor_a = torch.randn(vocab_size, rank, generator=generator) * (noise * (hidden_size / rank) ** 0.5)
    head.factor_b.copy_(factor_b)
    head.factor_a.copy_(factor_a)


def head_seed(seed: int, objective: str) -> int:
    """A seed per objective that does not change with the order and number of the others."""
    return zlib.crc32(f"{seed}:{objective}".encode())


def initialise_heads(
    base_head: FullHead | None,
    heads: nn.ModuleDict,
    weight: nn.Parameter,
    bias: nn.Parameter | None,
    noise: float,
    seed: int,
) -> None:
    """Start every head from the base weight [V, D] (bias [V]) plus noise of standard deviation `noise`.
    ZeRO-3 gathers one head at a time.
    """
    source = [weight] if bias is None else [weight, bias]
    if base_head is not None:
        with gathered([*source, *base_head.parameters()], writable=True):
            initialise_full(base_head, weight, bias, 0.0, 0)
    for objective, head in heads.items():
        head_parameters = [parameter for parameter in head.parameters() if parameter.requires_grad]
        with gathered([*source, *head_parameters], writable=True):
            if isinstance(head, FullHead):
                initialise_full(head, weight, bias, noise, head_seed(seed, objective))
            else:
                assert isinstance(head, LowRankHead)
                initialise_low_rank(head, noise, head_seed(seed, objective))


def check_objectives(objectives: Sequence[str]) -> None:
    """ValueError unless the names are there, differ, and can name a submodule."""
    if isinstance(objectives, str) or not objectives:
        raise ValueError(f"objectives are {objectives!r}: give a list with at least one name")
    reserved = nn.ModuleDict()
    for name in objectives:
        if not name or "." in name or hasattr(reserved, name):
            raise ValueError(
                f"'{name}' cannot name an objective: it is empty, has a dot or is a reserved word"
            )
    if len(set(objectives)) < len(objectives):
        raise ValueError(f"objectives {', '.join(objectives)} name one of them twice")


def weighted_projection(heads: Sequence[Head], hidden: Tensor, columns: Sequence[Tensor]) -> Tensor:
    """sum_i w_i (W_i h + b_i), [..., V], of H heads; columns[i] broadcasts against hidden [..., D].

    The mixture of MAHALO (arXiv 2510.01167, section 3.2), before scale and soft cap.
    """
    # Weights may differ from row to row, so no merged matrix serves all; H full heads cost H products with
    # [V, D]. Low-rank heads share W_0: sum_i w_i (W_0 h + A_i B_i h) = (sum_i w_i) W_0 h + [A_1 .. A_H] u,
    # where u [..., H r] stacks w_i B_i h. That is one product with [V, D] and one with [V, H r]. Weighting u
    # instead of the outputs saves H passes over [..., V]. W_0 itself may be among the heads.
    low_rank = [(head, w) for head, w in zip(heads, columns, strict=True) if isinstance(head, LowRankHead)]
    if not low_rank:
        products = [w * head.project(hidden) for head, w in zip(heads, columns, strict=True)]
        return sum(products[1:], products[0])
    inner = torch.cat([w * F.linear(hidden, head.factor_b) for head, w in low_rank], -1)
    outer = torch.cat([head.factor_a for head, _ in low_rank], -1)
    total, first = sum(columns[1:], columns[0]), low_rank[0][0]
    return total * F.linear(hidden, first.base_weight, first.base_bias) + F.linear(inner, outer)


def mixture_token_logps(
    heads: Sequence[Head], hidden: Tensor, labels: Tensor, weights: Tensor, chunk_size: int
) -> Tensor:
    """log p(label) [N] of hidden [N, D], where token n has a mixture `weights[n]` [N, H] of the heads."""
    # sum_i w_i (W_i h + b_i) = [W_1 b_1 .. W_H b_H] [w_1 h, w_1, .. w_H h, w_H]: with the weights in the
    # states, every token reads one matrix, and the chunks of `token_logps` serve mixtures too. The matrix is
    # made of copies: under ZeRO-3 the parameters themselves are there only while their head is called.
    matrix = torch.cat([head(None) for head in heads], dim=1)
    if heads[0].head_bias is not None:
        hidden = torch.cat([hidden, hidden.new_ones(len(hidden), 1)], dim=1)
    states = (weights.to(hidden.dtype)[:, :, None] * hidden[:, None, :]).flatten(1)
    transform = heads[0].transform
    return token_logps(
        states, matrix, labels, chunk_size, logit_softcap=transform.softcap, logit_scale=transform.scale
    )


@torch.no_grad()
def merge_heads(heads: Sequence[Head], weights: Sequence[float]) -> FullHead:
    """One frozen head with sum_i w_i W_i and sum_i w_i b_i, summed in fp32 and stored in the heads' dtype.

    `weights`: one number per head; heads of weight 0 are not read.
    """
    # Summed in bf16, every addition would round to 8 significant bits: the merged head would depend on the
    # order of the heads, and a small w_i W_i could be lost. Heads are added one at a time into one fp32
    # matrix [V, D], so that H copies of it are never held.
    shares = [(head, w) for head, w in zip(heads, weights, strict=True) if w != 0]
    first = shares[0][0]
    weight = torch.zeros(first.weight.shape, dtype=torch.float32, device=first.weight.device)
    for head, w in shares:
        weight.add_(head.weight, alpha=w)
    bias = None
    if first.head_bias is not None:
        bias = torch.zeros(first.head_bias.shape, dtype=torch.float32, device=weight.device)
        for head, w in shares:
            bias.add_(cast(Tensor, head.head_bias), alpha=w)
    dtype = first.weight.dtype
    merged = FullHead(
        nn.Parameter(weight.to(dtype)),
        None if bias is None else nn.Parameter(bias.to(dtype)),
        first.transform,
    )
    merged.requires_grad_(False)
    return merged
