"""Heads mixed by weights: a weighted sum of projections, and the one head that computes the same."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mahalo_ray.models.heads import FullHead, Head, LowRankHead


def weighted_projection(heads: Sequence[Head], hidden: Tensor, columns: Sequence[Tensor]) -> Tensor:
    """sum_i w_i (W_i h + b_i), [..., V]; columns[i] broadcasts against hidden [..., D]. Low-rank heads read
    W_0 once.
    """
    if isinstance(heads[0], FullHead):
        products = [w * head.project(hidden) for head, w in zip(heads, columns, strict=True)]
        return sum(products[1:], products[0])
    low_rank = [cast(LowRankHead, head) for head in heads]
    inner = torch.cat([w * F.linear(hidden, h.factor_b) for h, w in zip(low_rank, columns, strict=True)], -1)
    outer = torch.cat([head.factor_a for head in low_rank], -1)
    total = sum(columns[1:], columns[0])
    return total * F.linear(hidden, low_rank[0].base_weight, low_rank[0].base_bias) + F.linear(inner, outer)


@torch.no_grad()
def merge_heads(heads: Sequence[Head], weights: Sequence[float]) -> FullHead:
    """One frozen head with sum_i w_i W_i and sum_i w_i b_i, summed in fp32 and stored in the heads' dtype."""
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
