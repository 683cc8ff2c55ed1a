"""Log-probabilities of given tokens, in chunks, so that [tokens, vocabulary] never exists whole.

One projection serves every head: `logits = cap(scale * (h W^T + b + u A^T))`, where the low-rank part `u A^T`
and all of bias, scale and soft-cap are optional. The forward pass keeps one fp32 number per token (the log of
the normaliser); the backward pass computes the logits of a chunk again and turns them in place into their
gradient.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

IGNORE_INDEX = -100
DEFAULT_CHUNK_SIZE = 512


def _chunk_logits(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    inner: Tensor | None,
    outer: Tensor | None,
    scale: float,
    softcap: float | None,
) -> Tensor:
    """fp32 logits [C, V] of one chunk. Called without autograd, so the result may be changed in place."""
    logits = hidden @ weight.T
    if inner is not None:
        assert outer is not None
        logits.addmm_(inner, outer.T)
    if bias is not None:
        logits += bias
    logits = logits.float()
    if scale != 1.0:
        logits *= scale
    if softcap is not None:
        logits.div_(softcap).tanh_().mul_(softcap)
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
    ) -> Tensor:
        device_type = hidden.device.type
        autocast = torch.is_autocast_enabled(device_type)
        ctx.compute_dtype = torch.get_autocast_dtype(device_type) if autocast else weight.dtype
        ctx.options = (chunk_size, scale, softcap)
        logps = hidden.new_empty(hidden.shape[0], dtype=torch.float32)
        normaliser = torch.empty_like(logps)
        with torch.autocast(device_type, enabled=False):
            weight_c, bias_c, outer_c = (_cast(t, ctx.compute_dtype) for t in (weight, bias, outer))
            assert weight_c is not None
            for at in _chunks(hidden.shape[0], chunk_size):
                hidden_c, inner_c = (
                    _cast(hidden[at], ctx.compute_dtype),
                    _cast_rows(inner, at, ctx.compute_dtype),
                )
                assert hidden_c is not None
                logits = _chunk_logits(hidden_c, weight_c, bias_c, inner_c, outer_c, scale, softcap)
                normaliser[at] = logits.logsumexp(dim=-1)
                logps[at] = logits.gather(1, labels[at, None])[:, 0] - normaliser[at]
        ctx.save_for_backward(hidden, weight, bias, inner, outer, labels, normaliser)
        return logps

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, inner, outer, labels, normaliser = ctx.saved_tensors
        chunk_size, scale, softcap = ctx.options
        dtype = ctx.compute_dtype
        needed = ctx.needs_input_grad[:5]
        grad_hidden = torch.empty_like(hidden) if needed[0] else None
        grad_inner = torch.empty_like(inner) if needed[3] else None
        # Sums over chunks are kept in fp32: adding chunk after chunk in bf16 would round every time.
        grad_weight, grad_bias, grad_outer = (
            torch.zeros_like(tensor, dtype=torch.float32) if wanted else None
            for tensor, wanted in ((weight, needed[1]), (bias, needed[2]), (outer, needed[4]))
        )
        weight_c, bias_c, outer_c = (_cast(t, dtype) for t in (weight, bias, outer))
        assert weight_c is not None
        for at in _chunks(hidden.shape[0], chunk_size):
            hidden_c, inner_c = _cast(hidden[at], dtype), _cast_rows(inner, at, dtype)
            assert hidden_c is not None
            logits = _chunk_logits(hidden_c, weight_c, bias_c, inner_c, outer_c, scale, softcap)
            slope = None if softcap is None else 1 - (logits / softcap).square_()
            # d log p(y) / d logits = onehot(y) - softmax(logits), times the gradient that arrives per token.
            g = logits.sub_(normaliser[at, None]).exp_().mul_(-grad[at, None])
            g.scatter_add_(1, labels[at, None], grad[at, None])
            if slope is not None:
                g *= slope
            if scale != 1.0:
                g *= scale
            if grad_bias is not None:
                grad_bias += g.sum(0)
            g = g.to(dtype)
            if grad_hidden is not None:
                grad_hidden[at] = (g @ weight_c).to(hidden.dtype)
            _accumulate(grad_weight, g, hidden_c)
            if inner_c is not None:
                assert outer_c is not None
                if grad_inner is not None:
                    grad_inner[at] = (g @ outer_c).to(inner.dtype)
                _accumulate(grad_outer, g, inner_c)
        return (
            grad_hidden,
            _cast(grad_weight, weight.dtype),
            None if grad_bias is None else grad_bias.to(bias.dtype),
            grad_inner,
            None if grad_outer is None else grad_outer.to(outer.dtype),
            *(None,) * 4,
        )


def _chunks(count: int, size: int) -> list[slice]:
    return [slice(start, min(start + size, count)) for start in range(0, count, size)]


def _cast(tensor: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return None if tensor is None else tensor.to(dtype)


def _cast_rows(tensor: Tensor | None, rows: slice, dtype: torch.dtype) -> Tensor | None:
    return None if tensor is None else tensor[rows].to(dtype)


def _accumulate(total: Tensor | None, g: Tensor, rows: Tensor) -> None:
    """total [V, D] += g^T rows; in fp32 without a temporary of that size."""
    if total is None:
        return
    if g.dtype == torch.float32:
        total.addmm_(g.T, rows)
    else:
        total += g.T @ rows


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
    return _TokenLogps.apply(
        hidden, head_weight, bias, inner, outer, labels, chunk_size, logit_scale, logit_softcap
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
