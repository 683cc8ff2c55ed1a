"""Log-probabilities of given tokens, in chunks, so that [tokens, vocabulary] never exists whole.

One projection serves every head: `logits = cap(scale * (h W^T + b + u A^T))`, where the low-rank part `u A^T`
and all of bias, scale and soft-cap are optional. The forward pass keeps nothing but its inputs; the backward
pass computes the logits of a chunk again and turns them into their gradient. Buffers of one chunk are made
once and used for all chunks: fresh memory of that size costs as much as the arithmetic on it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

IGNORE_INDEX = -100
DEFAULT_CHUNK_SIZE = 256


@dataclass
class _Projection:
    """Hidden states to fp32 logits, chunk by chunk, in buffers of its own. Used without autograd.

    `linear`: the product is a call of `F.linear`, for which a reader may have put a faster kernel
    (`decoding/cpu_matmul.py`); it has memory of its own.
    """

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    inner: Tensor | None
    outer: Tensor | None
    chunk_size: int
    scale: float
    softcap: float | None
    dtype: torch.dtype  # of the matrix products
    linear: bool = False

    def __post_init__(self) -> None:
        self.weight = self.weight.to(self.dtype)
        self.bias = None if self.bias is None else self.bias.to(self.dtype)
        self.outer = None if self.outer is None else self.outer.to(self.dtype)
        self._product = None if self.linear else self.buffer(self.dtype)
        self._logits = None if self.dtype == torch.float32 else self.buffer(torch.float32)

    def buffer(self, dtype: torch.dtype) -> Tensor:
        """Uninitialised memory for one chunk of logits."""
        rows = min(self.chunk_size, self.hidden.shape[0])
        return torch.empty(rows, self.weight.shape[0], dtype=dtype, device=self.hidden.device)

    def chunks(self) -> list[slice]:
        """The tokens of every chunk."""
        count = self.hidden.shape[0]
        return [slice(i, min(i + self.chunk_size, count)) for i in range(0, count, self.chunk_size)]

    def rows(self, tensor: Tensor, at: slice) -> Tensor:
        """One chunk of hidden or inner states, in the dtype of the products."""
        return tensor[at].to(self.dtype)

    def logits(self, at: slice) -> Tensor:
        """[C, V] in fp32, valid until the next call."""
        hidden = self.rows(self.hidden, at)
        if self._product is None:
            product = F.linear(hidden, self.weight)
        else:
            product = torch.mm(hidden, self.weight.T, out=self._product[: len(hidden)])
        if self.inner is not None:
            assert self.outer is not None
            product.addmm_(self.rows(self.inner, at), self.outer.T)
        if self.bias is not None:
            product += self.bias
        logits = product if self._logits is None else self._logits[: len(hidden)].copy_(product)
        if self.scale != 1.0:
            logits *= self.scale
        if self.softcap is not None:
            logits.div_(self.softcap).tanh_().mul_(self.softcap)
        return logits


class _TokenLogps(torch.autograd.Function):
    """log p(label) per token [N] with the logits recomputed in backward.

    The weights must reach `apply` as the module's own parameters: autograd then saves the parameter itself,
    not its storage, which is what lets ZeRO-3 free it after forward and gather it again before backward.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        inner: Tensor | None,
        outer: Tensor | None,
        labels: Tensor,
        chunk_size: int,
        scale: float,
        softcap: float | None,
        learns: bool,
    ) -> Tensor:
        device_type = hidden.device.type
        autocast = torch.is_autocast_enabled(device_type)
        dtype = torch.get_autocast_dtype(device_type) if autocast else weight.dtype
        ctx.options = (chunk_size, scale, softcap, dtype)
        ctx.save_for_backward(hidden, weight, bias, inner, outer, labels)
        logps = hidden.new_empty(hidden.shape[0], dtype=torch.float32)
        with torch.autocast(device_type, enabled=False):
            options = (chunk_size, scale, softcap, dtype, not learns)
            projection = _Projection(hidden, weight, bias, inner, outer, *options)
            normal = projection.buffer(torch.float32)
            for at in projection.chunks():
                logits = projection.logits(at)
                torch.log_softmax(logits, -1, out=normal[: len(logits)])
                logps[at] = normal[: len(logits)].gather(1, labels[at, None])[:, 0]
        return logps

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, inner, outer, labels = ctx.saved_tensors
        projection = _Projection(hidden, weight, bias, inner, outer, *ctx.options)
        softcap, scale = projection.softcap, projection.scale
        wants_hidden, wants_weight, wants_bias, wants_inner, wants_outer = ctx.needs_input_grad[:5]
        grad_hidden = torch.empty_like(hidden) if wants_hidden else None
        grad_inner = torch.empty_like(inner) if wants_inner else None
        grad_weight = _RowSum(weight) if wants_weight else None
        grad_outer = _RowSum(outer) if wants_outer else None
        grad_bias = torch.zeros_like(bias, dtype=torch.float32) if wants_bias else None
        gradients = projection.buffer(torch.float32)
        for at in projection.chunks():
            logits = projection.logits(at)
            # d log p(y) / d logits = onehot(y) - softmax(logits), times the gradient that arrives per token.
            g = torch.softmax(logits, -1, out=gradients[: len(logits)])
            g.mul_(-grad[at, None]).scatter_add_(1, labels[at, None], grad[at, None])
            if softcap is not None:
                g -= g * logits.div_(softcap).square_()
            if scale != 1.0:
                g *= scale
            if grad_bias is not None:
                grad_bias += g.sum(0)
            g = g.to(projection.dtype)
            if grad_hidden is not None:
                grad_hidden[at] = (g @ projection.weight).to(hidden.dtype)
            if grad_weight is not None:
                grad_weight.add(g, projection.rows(hidden, at))
            if grad_inner is not None:
                assert projection.outer is not None
                grad_inner[at] = (g @ projection.outer).to(inner.dtype)
            if grad_outer is not None:
                grad_outer.add(g, projection.rows(inner, at))
        return (
            grad_hidden,
            None if grad_weight is None else grad_weight.total(),
            None if grad_bias is None else grad_bias.to(bias.dtype),
            grad_inner,
            None if grad_outer is None else grad_outer.total(),
            *(None,) * 5,
        )


class _RowSum:
    """The gradient of a weight, summed over chunks in fp32: adding chunk after chunk in bf16 would round each
    time.
    """

    def __init__(self, like: Tensor) -> None:
        self._like = like
        self._sum: Tensor | None = None

    def add(self, g: Tensor, rows: Tensor) -> None:
        """Add g^T rows; in fp32 without a temporary of the weight's size."""
        if self._sum is None:
            self._sum = (g.T @ rows).float()
        elif g.dtype == torch.float32:
            self._sum.addmm_(g.T, rows)
        else:
            self._sum += g.T @ rows

    def total(self) -> Tensor:
        """The sum in the weight's dtype; zeros if there was nothing to add."""
        return torch.zeros_like(self._like) if self._sum is None else self._sum.to(self._like.dtype)


def token_logps(
    hidden: Tensor,
    head_weight: Tensor,
    labels: Tensor,
    chunk_size: int = DEFAULT_CHUNK_SIZE,
    logit_softcap: float | None = None,
    bias: Tensor | None = None,
    *,
    logit_scale: float = 1.0,
    low_rank: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """Natural-log probability of every label, fp32 [N].

    hidden [N, D]; head_weight [V, D]; labels [N] in 0..V-1; bias [V]. `low_rank` = (A [V, r], B [r, D]) adds
    `A B` to the head weight without forming it. At most `chunk_size` rows of logits exist at a time, forward
    and backward. N = 0 is legal and gives zero gradients. Raises ValueError on a chunk size below 1 or on
    shapes that do not fit.
    """
    if chunk_size < 1:
        raise ValueError(f"chunk_size is {chunk_size}: it counts tokens and must be at least 1")
    if hidden.dim() != 2 or labels.shape != hidden.shape[:1] or hidden.shape[1] != head_weight.shape[1]:
        raise ValueError(
            f"token_logps wants hidden [N, D], head_weight [V, D] and labels [N]; got {list(hidden.shape)}, "
            f"{list(head_weight.shape)} and {list(labels.shape)}"
        )
    outer, inner = None, None
    if low_rank is not None:
        outer = low_rank[0]
        inner = hidden.to(low_rank[1].dtype) @ low_rank[1].T
    learns = torch.is_grad_enabled()
    return _TokenLogps.apply(
        hidden, head_weight, bias, inner, outer, labels, chunk_size, logit_scale, logit_softcap, learns
    )


def completion_logps(
    hidden: Tensor,
    head_weight: Tensor,
    labels: Tensor,
    chunk_size: int = DEFAULT_CHUNK_SIZE,
    average: bool = False,
    logit_softcap: float | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """Log-probability of every row's counted tokens, fp32 [B]: their sum, or with `average` their mean.

    hidden [B, T, D]; labels [B, T], already shifted (labels[b, t] is the token that hidden[b, t] predicts),
    -100 where a token does not count. Only counted tokens touch the head. A row without any gives 0.
    """
    rows, positions = (labels != IGNORE_INDEX).nonzero(as_tuple=True)
    logps = token_logps(
        hidden[rows, positions], head_weight, labels[rows, positions], chunk_size, logit_softcap, bias
    )
    return sum_rows(logps, rows, labels.shape[0], average)


def sum_rows(logps: Tensor, rows: Tensor, count: int, average: bool = False) -> Tensor:
    """Per-row sums (or means) [count] of values [N] that belong to rows [N]; 0 for a row without values."""
    totals = logps.new_zeros(count).index_add(0, rows, logps)
    if average:
        totals = totals / torch.bincount(rows, minlength=count).clamp(min=1)
    return totals


def shift_labels(labels: Tensor) -> Tensor:
    """Labels aligned with the input ids [B, T] -> labels aligned with the states that predict them [B, T]."""
    return torch.cat([labels[:, 1:], torch.full_like(labels[:, :1], IGNORE_INDEX)], dim=1)
