"""Log-probs of a vocabulary head by Triton kernels: the product with the head, the log-sum-exp and the chosen
log-prob in one, so that logits never reach memory; and in backward their gradient, straight from the product.

`logprobs.py` is the same in plain torch; the test of this file compares the two under Triton's interpreter.
These kernels have not run on a card yet: `training.logps_kernel` is "torch" unless a config says otherwise.

Shapes: C tokens of a chunk, D hidden size, V vocabulary, r rank of a low-rank head. Every program takes a
tile of tokens x vocabulary. Forward writes the log-sum-exp of each tile, [C, tiles], which torch joins, and
the logit of the label if it lies in the tile; backward computes the tile once more and writes
grad * (onehot - softmax). The products with that are torch's.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from functools import cached_property

import torch
import triton
import triton.language as tl
from torch import Tensor

from mahalo_ray.logprobs import Projection, projecting_by

_TOKENS, _WORDS, _WIDTH = 64, 128, 32  # of a tile, and how much of D (or r) is multiplied at a time


def fused_logps(device: torch.device) -> AbstractContextManager[None]:
    """Inside, log-probs with gradients are computed by these kernels. ValueError where they cannot run."""
    if device.type != "cuda" and not triton.knobs.runtime.interpret:
        raise ValueError(
            f"'training.logps_kernel: triton' runs on CUDA devices only, and this worker computes on "
            f"{device.type}: set it to 'torch'"
        )
    return projecting_by(TritonProjection)


class TritonProjection(Projection):
    """`Projection` without logits in memory."""

    def logps(self, chunk: slice, labels: Tensor) -> Tensor:
        """log p(label) [C]; keeps what the tokens' exponentials sum to for `gradients`."""
        rows, tiles = len(labels), triton.cdiv(self.weight.shape[0], _WORDS)
        sums = self.hidden.new_empty(rows, tiles, dtype=torch.float32)
        chosen = self.hidden.new_empty(rows, dtype=torch.float32)
        if self.log_sums is None:
            self.log_sums = self.hidden.new_empty(len(self.hidden), dtype=torch.float32)
        if rows > 0:
            self._run(_logps_kernel, chunk, (labels, sums, chosen, tiles))
        self.log_sums[chunk] = log_sums = torch.logsumexp(sums, -1)
        return chosen - log_sums

    def gradients(self, chunk: slice, labels: Tensor, grad: Tensor) -> Tensor:
        """The gradient [C, V] of the products, in their dtype."""
        assert self.log_sums is not None
        out = self._gradients[: len(labels)]
        if len(labels) > 0:
            self._run(_gradient_kernel, chunk, (labels, self.log_sums[chunk], grad.contiguous(), out))
        return out

    @cached_property
    def _gradients(self) -> Tensor:
        return self.buffer(self.dtype)

    def _run(self, kernel: triton.JITFunction, chunk: slice, arguments: tuple[Tensor | int, ...]) -> None:
        hidden = self.rows(self.hidden, chunk).contiguous()
        weight = self.weight.contiguous()
        inner, outer = hidden, weight  # not read without a low-rank part
        if self.inner is not None:
            assert self.outer is not None
            inner, outer = self.rows(self.inner, chunk).contiguous(), self.outer.contiguous()
        rows, (words, width) = len(hidden), weight.shape
        grid = (triton.cdiv(rows, _TOKENS), triton.cdiv(words, _WORDS))
        kernel[grid](
            hidden,
            weight,
            inner,
            outer,
            weight if self.bias is None else self.bias,
            *arguments,
            rows,
            words,
            width,
            inner.shape[1],
            float(self.scale),
            1.0 if self.softcap is None else float(self.softcap),
            LOW_RANK=self.inner is not None,
            BIAS=self.bias is not None,
            CAPPED=self.softcap is not None,
            # fp32 is multiplied as fp32: TF32, Triton's default, has three digits.
            PRECISION="ieee" if self.dtype == torch.float32 else "tf32",
            TOKENS=_TOKENS,
            WORDS=_WORDS,
            WIDTH=_WIDTH,
        )


@triton.jit
def _product(a, b, rows, columns, row_count, column_count, width, total, PRECISION, WIDTH: tl.constexpr):
    """total + a[rows] b[columns]^T for a [row_count, width], b [column_count, width]."""
    for start in range(0, width, WIDTH):
        at = start + tl.arange(0, WIDTH)
        of_a = (rows[:, None] < row_count) & (at[None, :] < width)
        of_b = (columns[None, :] < column_count) & (at[:, None] < width)
        left = tl.load(a + rows[:, None].to(tl.int64) * width + at[None, :], of_a, 0.0)
        right = tl.load(b + columns[None, :].to(tl.int64) * width + at[:, None], of_b, 0.0)
        total = tl.dot(left, right, total, input_precision=PRECISION)
    return total


@triton.jit
def _logits(
    hidden, weight, inner, outer, bias, rows, words, row_count, word_count, width, rank, scale, softcap,
    LOW_RANK: tl.constexpr, BIAS: tl.constexpr, CAPPED: tl.constexpr, PRECISION: tl.constexpr,
    TOKENS: tl.constexpr, WORDS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """A tile of logits, fp32, behind scale and soft cap; -inf beyond the vocabulary."""
    x = tl.zeros((TOKENS, WORDS), tl.float32)
    x = _product(hidden, weight, rows, words, row_count, word_count, width, x, PRECISION, WIDTH)
    if LOW_RANK:
        x = _product(inner, outer, rows, words, row_count, word_count, rank, x, PRECISION, WIDTH)
    if BIAS:
        x += tl.load(bias + words, words < word_count, 0.0)[None, :].to(tl.float32)
    x = x * scale
    if CAPPED:
        x = softcap * (1.0 - 2.0 / (tl.exp(2.0 * x / softcap) + 1.0))  # softcap * tanh(x / softcap)
    return tl.where(words[None, :] < word_count, x, -float("inf"))


@triton.jit
def _logps_kernel(
    hidden, weight, inner, outer, bias, labels, sums, chosen, tiles, row_count, word_count, width, rank,
    scale, softcap, LOW_RANK: tl.constexpr, BIAS: tl.constexpr, CAPPED: tl.constexpr, PRECISION: tl.constexpr,
    TOKENS: tl.constexpr, WORDS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    words = tl.program_id(1) * WORDS + tl.arange(0, WORDS)
    x = _logits(
        hidden, weight, inner, outer, bias, rows, words, row_count, word_count, width, rank, scale, softcap,
        LOW_RANK, BIAS, CAPPED, PRECISION, TOKENS, WORDS, WIDTH,
    )  # fmt: skip
    inside = rows < row_count
    largest = tl.max(x, 1)
    log_sum = largest + tl.log(tl.sum(tl.exp(x - largest[:, None]), 1))
    tl.store(sums + rows.to(tl.int64) * tiles + tl.program_id(1), log_sum, inside)
    label = tl.load(labels + rows, inside, 0)
    here = label // WORDS == tl.program_id(1)
    logit = tl.sum(tl.where(words[None, :] == label[:, None], x, 0.0), 1)
    tl.store(chosen + rows, logit, inside & here)


@triton.jit
def _gradient_kernel(
    hidden, weight, inner, outer, bias, labels, log_sums, grad, out, row_count, word_count, width, rank,
    scale, softcap, LOW_RANK: tl.constexpr, BIAS: tl.constexpr, CAPPED: tl.constexpr, PRECISION: tl.constexpr,
    TOKENS: tl.constexpr, WORDS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    words = tl.program_id(1) * WORDS + tl.arange(0, WORDS)
    x = _logits(
        hidden, weight, inner, outer, bias, rows, words, row_count, word_count, width, rank, scale, softcap,
        LOW_RANK, BIAS, CAPPED, PRECISION, TOKENS, WORDS, WIDTH,
    )  # fmt: skip
    inside = rows < row_count
    label = tl.load(labels + rows, inside, 0)
    log_sum = tl.load(log_sums + rows, inside, 0.0)
    one = tl.where(words[None, :] == label[:, None], 1.0, 0.0)
    g = tl.load(grad + rows, inside, 0.0)[:, None] * (one - tl.exp(x - log_sum[:, None]))
    if CAPPED:
        g = g * (1.0 - (x / softcap) * (x / softcap))
    g = g * scale
    places = out + rows[:, None].to(tl.int64) * word_count + words[None, :]
    tl.store(places, g.to(out.dtype.element_ty), inside[:, None] & (words[None, :] < word_count))
