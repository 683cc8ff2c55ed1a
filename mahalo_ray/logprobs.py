"""Log-probabilities of given tokens, in chunks, so that logits [tokens, vocabulary] never exist whole.

Shapes: N tokens, D hidden size, V vocabulary, r rank of a low-rank head, C tokens of a chunk, B rows of T
positions. Log-probs are natural logarithms (nats) in fp32.

One projection serves every head: `logits = cap(scale * (h W^T + b + u A^T))`, where the low-rank part `u A^T`
and all of bias, scale and soft-cap are optional. The forward pass keeps nothing but its inputs; the backward
pass computes the logits of a chunk again and turns them into their gradient. Buffers of one chunk are made
once and used for all chunks: fresh memory of that size costs as much as the arithmetic on it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

IGNORE_INDEX = -100
DEFAULT_CHUNK_SIZE = 256


@dataclass
class Projection:
    """Hidden states [N, D] to fp32 logits [C, V], chunk by chunk, in buffers that are reused, and log-probs
    and gradients made of the logits. Used without autograd.

    weight [V, D]; bias [V]; inner [N, r] and outer [V, r] are the low-rank part. `linear`: multiply by
    `F.linear`, which decoding replaces with a faster kernel on some processors (`decoding/cpu_matmul.py`),
    instead of writing the product into a buffer.
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
    log_sums: Tensor | None = None  # [N] of a kernel that keeps them from forward for backward

    def __post_init__(self) -> None:
        self.weight = self.weight.to(self.dtype)
        self.bias = None if self.bias is None else self.bias.to(self.dtype)
        self.outer = None if self.outer is None else self.outer.to(self.dtype)

    @cached_property
    def _product(self) -> Tensor | None:
        return None if self.linear else self.buffer(self.dtype)

    @cached_property
    def _logits(self) -> Tensor | None:
        return None if self.dtype == torch.float32 else self.buffer(torch.float32)

    @cached_property
    def _results(self) -> Tensor:
        return self.buffer(torch.float32)

    def buffer(self, dtype: torch.dtype) -> Tensor:
        """Uninitialised memory for one chunk of logits."""
        rows = min(self.chunk_size, self.hidden.shape[0])
        return torch.empty(rows, self.weight.shape[0], dtype=dtype, device=self.hidden.device)

    def chunks(self) -> list[slice]:
        """The tokens of every chunk."""
        count = self.hidden.shape[0]
        return [slice(i, min(i + self.chunk_size, count)) for i in range(0, count, self.chunk_size)]

    def rows(self, tensor: Tensor, chunk: slice) -> Tensor:
        """One chunk of hidden or inner states, in the dtype of the products."""
        return tensor[chunk].to(self.dtype)

    def logits(self, chunk: slice) -> Tensor:
        """The logits [C, V] of one chunk, fp32; the next call overwrites them."""
        hidden = self.rows(self.hidden, chunk)
        if self._product is None:
            product = F.linear(hidden, self.weight)
        else:
            product = torch.mm(hidden, self.weight.T, out=self._product[: len(hidden)])
        if self.inner is not None:
            assert self.outer is not None
            product.addmm_(self.rows(self.inner, chunk), self.outer.T)
        if self.bias is not None:
            product += self.bias
        logits = product if self._logits is None else self._logits[: len(hidden)].copy_(product)
        if self.scale != 1.0:
            logits *= self.scale
        if self.softcap is not None:
            logits.div_(self.softcap).tanh_().mul_(self.softcap)
        return logits

    def logps(self, chunk: slice, labels: Tensor) -> Tensor:
        """log p(label) [C]."""
        logits = self.logits(chunk)
        normal = torch.log_softmax(logits, -1, out=self._results[: len(logits)])
        return normal.gather(1, labels[:, None])[:, 0]

    def gradients(self, chunk: slice, labels: Tensor, grad: Tensor) -> Tensor:
        """The gradient of the products [C, V], before scale and soft cap, in fp32 or the products' dtype, for
        a gradient [C] of the log-probs; the next call overwrites it."""
        # d log p(y) / d logits = onehot(y) - softmax(logits), times the gradient that arrives per token. A
        # soft cap z = c tanh(x / c) has dz/dx = 1 - (z / c)^2, and `logits` holds z; it is overwritten there,
        # so nothing may read it afterwards.
        logits = self.logits(chunk)
        g = torch.softmax(logits, -1, out=self._results[: len(logits)])
        g.mul_(-grad[:, None]).scatter_add_(1, labels[:, None], grad[:, None])
        if self.softcap is not None:
            g -= g * logits.div_(self.softcap).square_()
        if self.scale != 1.0:
            g *= self.scale
        return g


_projection: type[Projection] = Projection


@contextmanager
def projecting_by(kind: type[Projection]) -> Iterator[None]:
    """Inside, log-probs that are computed with gradients are projected by this class, in all threads."""
    global _projection
    before, _projection = _projection, kind
    try:
        yield
    finally:
        _projection = before


class _TokenLogps(torch.autograd.Function):
    """log p(label) per token [N], with the logits computed again in backward."""

    # Autograd would keep fp32 logits [N, V] and their softmax until backward: 2.4 GB each for 4,096 tokens of
    # a vocabulary of 150,000. So forward saves its inputs only, and backward computes each chunk's logits
    # [C, V] again and turns them into their gradient in place: one more matrix product for C / N of the
    # memory. Without chunks in backward too, the peak would merely move from forward to backward.
    #
    # The weights must reach `apply` as the module's own parameters: autograd then saves the parameter itself,
    # not its storage. ZeRO-3 frees the storage after forward and gathers it again before backward; a view or
    # a cast copy saved here would keep the whole weight alive, or be empty when backward reads it.

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
        grad_enabled: bool,
    ) -> Tensor:
        device_type = hidden.device.type
        autocast = torch.is_autocast_enabled(device_type)
        dtype = torch.get_autocast_dtype(device_type) if autocast else weight.dtype
        options = (chunk_size, scale, softcap, dtype)
        kind = _projection if grad_enabled else Projection
        logps = hidden.new_empty(hidden.shape[0], dtype=torch.float32)
        with torch.autocast(device_type, enabled=False):
            projection = kind(hidden, weight, bias, inner, outer, *options, linear=not grad_enabled)
            for chunk in projection.chunks():
                logps[chunk] = projection.logps(chunk, labels[chunk])
        ctx.kind, ctx.options = kind, options
        ctx.save_for_backward(hidden, weight, bias, inner, outer, labels, projection.log_sums)
        return logps

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, inner, outer, labels, log_sums = ctx.saved_tensors
        projection = ctx.kind(hidden, weight, bias, inner, outer, *ctx.options, log_sums=log_sums)
        needs_hidden, needs_weight, needs_bias, needs_inner, needs_outer = ctx.needs_input_grad[:5]
        grad_hidden = torch.empty_like(hidden) if needs_hidden else None
        grad_inner = torch.empty_like(inner) if needs_inner else None
        grad_weight = _RowSum(weight) if needs_weight else None
        grad_outer = _RowSum(outer) if needs_outer else None
        grad_bias = torch.zeros_like(bias, dtype=torch.float32) if needs_bias else None
        for chunk in projection.chunks():
            # Products run in the dtype of forward (bf16 under autocast); sums over chunks stay in fp32.
            g = projection.gradients(chunk, labels[chunk], grad[chunk])
            if grad_bias is not None:
                grad_bias += g.sum(0, dtype=torch.float32)
            g = g.to(projection.dtype)
            if grad_hidden is not None:
                grad_hidden[chunk] = (g @ projection.weight).to(hidden.dtype)
            if grad_weight is not None:
                grad_weight.add(g, projection.rows(hidden, chunk))
            if grad_inner is not None:
                assert projection.outer is not None
                grad_inner[chunk] = (g @ projection.outer).to(inner.dtype)
            if grad_outer is not None:
                grad_outer.add(g, projection.rows(inner, chunk))
        return (
            grad_hidden,
            None if grad_weight is None else grad_weight.total(),
            None if grad_bias is None else grad_bias.to(bias.dtype),
            grad_inner,
            None if grad_outer is None else grad_outer.total(),
            *(None,) * 5,
        )


class _RowSum:
    """The gradient of a weight [V, D] (or [V, r]), summed over chunks in fp32: a sum kept in bf16 would round
    at every chunk and lose small contributions.
    """

    def __init__(self, like: Tensor) -> None:
        self._like = like
        self._sum: Tensor | None = None

    def add(self, g: Tensor, rows: Tensor) -> None:
        """Add g^T rows for g [C, V] and rows [C, D]; in fp32 without a temporary of the weight's size."""
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
    and backward. N = 0 is legal and gives zero gradients: under ZeRO-3 every worker calls every head. Raises
    ValueError for a chunk size below 1 and for shapes that do not fit.

    >>> import torch
    >>> hidden, head_weight = torch.zeros(2, 4), torch.zeros(8, 4)
    >>> token_logps(hidden, head_weight, torch.tensor([0, 3])).exp()
    tensor([0.1250, 0.1250])
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
    grad_enabled = torch.is_grad_enabled()
    return _TokenLogps.apply(
        hidden, head_weight, bias, inner, outer, labels, chunk_size, logit_scale, logit_softcap, grad_enabled
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
    """Log-probability of every row's counted tokens, fp32 [B] in nats: their sum, or with `average` their
    mean.

    hidden [B, T, D]; labels [B, T], already shifted (labels[b, t] is the token that hidden[b, t] predicts),
    -100 where a token does not count. Only counted tokens touch the head. A row without any gives 0.
    """
    rows, positions = (labels != IGNORE_INDEX).nonzero(as_tuple=True)
    logps = token_logps(
        hidden[rows, positions], head_weight, labels[rows, positions], chunk_size, logit_softcap, bias
    )
    return sum_rows(logps, rows, labels.shape[0], average)


def sum_rows(logps: Tensor, rows: Tensor, count: int, average: bool = False) -> Tensor:
    """Sums (or means) [count] of values [N] by the row that each belongs to (`rows` [N], 0 .. count - 1); 0
    for a row without values.
    """
    totals = logps.new_zeros(count).index_add(0, rows, logps)
    if average:
        totals = totals / torch.bincount(rows, minlength=count).clamp(min=1)
    return totals


def shift_labels(labels: Tensor) -> Tensor:
    """Labels [B, T] aligned with the input ids -> labels [B, T] aligned with the states that predict them:
    one position earlier, the last one -100.
    """
    return torch.cat([labels[:, 1:], torch.full_like(labels[:, :1], IGNORE_INDEX)], dim=1)
