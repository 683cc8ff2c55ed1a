"""Attention of the branches of a row over the prefix that they share, stored once, and over their own keys.

On a CPU in four products around one softmax. On a card, where calls cost more than copies, a single token of
each branch is attended to in one call of torch's fused kernels, over prefix and branches behind each other.

Shapes: N rows of K branches, Hq query heads in G groups of Hkv key/value heads, S new tokens, L tokens of the
prefix, T of a branch, D size of a head.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from mahalo_ray.models.attention import softcapped

_MOST_SCORES = 1 << 27  # attention scores held at once, beyond which queries are attended to in parts
_JOINING = {"cuda"}  # devices on which calls cost more than copies
_MOST_JOINED = 1 << 22  # numbers of the keys that are copied in every layer: those of 16 MiB in fp32


class JoinedKeys:
    """How single tokens of all branches attend in one call: keys and values of a row's prefix and of all its
    branches behind each other, under a bias that hides the other branches'. Made once per forward."""

    @classmethod
    def of(
        cls,
        query: Tensor,
        prefix: Tensor,
        own: Tensor,
        biases: tuple[Tensor | None, Tensor | None],
        softcap: float | None,
    ) -> JoinedKeys | None:
        """For such tensors as `shared_prefix_attention` takes; None where two products are better: on a CPU,
        for several tokens at once, for soft caps, and where copies would be large."""
        rows, heads, columns, own_length, dim = own.shape
        joined = rows * heads * (prefix.shape[2] + columns * own_length) * dim
        if query.device.type not in _JOINING or query.shape[2] > 1 or softcap or joined > _MOST_JOINED:
            return None
        return cls(query, prefix, own, biases)

    def __init__(
        self, query: Tensor, prefix: Tensor, own: Tensor, biases: tuple[Tensor | None, Tensor | None]
    ) -> None:
        rows, heads, columns, own_length, _ = own.shape
        groups, length = query.shape[1] // heads, prefix.shape[2]
        bias = query.new_zeros(rows, columns, groups, length + columns * own_length)
        to_prefix = bias[..., :length]
        to_own = bias[..., length:].view(rows, columns, groups, columns, own_length)
        same = torch.eye(columns, dtype=torch.bool, device=query.device)
        to_own.masked_fill_(~same[:, None, :, None], float("-inf"))
        if biases[0] is not None:  # [N, 1, 1, L]
            to_prefix += biases[0]
        if biases[1] is not None:  # [N, 1, 1, 1, 1, T]
            to_own += biases[1][:, :, 0]
        self._bias = bias.view(rows, 1, columns * groups, -1)

    def attend(
        self, query: Tensor, prefix: tuple[Tensor, Tensor], own: tuple[Tensor, Tensor], scaling: float
    ) -> Tensor:
        """As `shared_prefix_attention`: [N * K, Hq, 1, D] -> [N * K, 1, Hq, D]."""
        rows, heads, columns, _, dim = own[0].shape
        groups = query.shape[1] // heads
        key, value = (
            torch.cat([shared, branches.flatten(2, 3)], dim=2)
            for shared, branches in zip(prefix, own, strict=True)
        )
        # Branches and groups together are the queries of one key/value head.
        query = query.view(rows, columns, heads, groups, dim).transpose(1, 2).flatten(2, 3)
        out = F.scaled_dot_product_attention(query, key, value, attn_mask=self._bias, scale=scaling)
        out = out.view(rows, heads, columns, groups, dim).transpose(1, 2)
        return out.reshape(rows * columns, 1, heads * groups, dim)


def shared_prefix_attention(
    query: Tensor,
    prefix: tuple[Tensor, Tensor],
    own: tuple[Tensor, Tensor],
    prefix_bias: Tensor | None,
    own_bias: Tensor | None,
    scaling: float,
    softcap: float | None,
) -> Tensor:
    """Attention of K branches per row over their row's prefix, stored once, and over their own keys: one
    softmax.

    query [N * K, Hq, S, D]; prefix keys, values [N, Hkv, L, D]; own keys, values [N, Hkv, K, T, D] (this
    call's S included); prefix_bias [N, 1, 1, L] and own_bias [N, 1, 1, 1, S or 1, T] hold 0 or -inf (None:
    everything is visible). Returns [N * K, S, Hq, D]. Scores of more than 2 ** 27 numbers are never held at
    once: rows, then branches, then queries are halved.
    """
    rows, kv_heads, branches, own_length, dim = own[0].shape
    width, groups = query.shape[2], query.shape[1] // kv_heads
    length = prefix[0].shape[2]
    if query.shape[0] * query.shape[1] * width * (length + own_length) > _MOST_SCORES:
        parts = _halves(query, prefix, own, prefix_bias, own_bias)
        if parts is not None:
            halves = [shared_prefix_attention(*part, scaling, softcap) for part in parts]
            return torch.cat(halves, dim=0 if rows * branches > 1 else 1)
    # The K branches of a row, times G query heads per key/value head, times S tokens become K*G*S query rows
    # of one product [K*G*S, D] @ [D, L] with the prefix that they share, [N * Hkv, L, D]. Giving every branch
    # a copy would hold and read the prefix K times. A branch's own few keys cannot be shared, so they are a
    # second product, batched over branches.
    query = query.view(rows, branches, kv_heads, groups, width, dim).permute(0, 2, 1, 3, 4, 5) * scaling
    query = query.reshape(rows * kv_heads, branches * groups * width, dim)
    to_prefix = torch.bmm(query, prefix[0].flatten(0, 1).transpose(1, 2))
    own_keys, own_values = (tensor.flatten(0, 2) for tensor in own)
    to_own = torch.bmm(query.reshape(-1, groups * width, dim), own_keys.transpose(1, 2))
    to_prefix, to_own = softcapped(to_prefix, softcap), softcapped(to_own, softcap)
    if prefix_bias is not None:
        to_prefix = (to_prefix.view(rows, kv_heads, -1, length) + prefix_bias).flatten(0, 1)
    if own_bias is not None:
        to_own = to_own.view(rows, kv_heads, branches, groups, width, own_length) + own_bias
    to_own = to_own.reshape(rows * kv_heads, branches * groups * width, own_length)
    # Both parts are joined before the softmax, [N * Hkv, K*G*S, L + T]. Two softmaxes, averaged, would each
    # sum to 1 and give the few own tokens as much weight as the whole prefix. Merged by their log-sum-exps
    # they would be right, with more passes over the outputs and rounding of its own.
    scores = torch.cat([to_prefix, to_own], dim=-1)
    weights = torch.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype)
    out = torch.bmm(weights[..., :length], prefix[1].flatten(0, 1))
    own_weights = weights[..., length:].view(len(own_values), groups * width, own_length)
    out = out.reshape(-1, groups * width, dim) + torch.bmm(own_weights, own_values)
    out = out.view(rows, kv_heads, branches, groups, width, dim).permute(0, 2, 4, 1, 3, 5)
    return out.reshape(rows * branches, width, kv_heads * groups, dim)


_Attention = tuple[
    Tensor, tuple[Tensor, Tensor], tuple[Tensor, Tensor], Tensor | None, Tensor | None
]  # query, prefix, own, prefix_bias, own_bias


def _halves(
    query: Tensor,
    prefix: tuple[Tensor, Tensor],
    own: tuple[Tensor, Tensor],
    prefix_bias: Tensor | None,
    own_bias: Tensor | None,
) -> list[_Attention] | None:
    """The arguments of `shared_prefix_attention` for each half of the rows; of one row's branches; or of one
    branch's queries. None for a single query.
    """
    # Queries are halved, never keys: a softmax runs over all keys of one query, so halves of queries are
    # independent and their results are put behind each other. Halves of keys would have to be merged with
    # running maxima and sums. Views only: nothing is copied, and only the scores are bounded by this.
    rows, _, branches, _, _ = own[0].shape
    width = query.shape[2]
    if rows > 1:
        parts = [slice(0, rows // 2), slice(rows // 2, rows)]
        return [
            (
                query[part.start * branches : part.stop * branches],
                (prefix[0][part], prefix[1][part]),
                (own[0][part], own[1][part]),
                None if prefix_bias is None else prefix_bias[part],
                None if own_bias is None else own_bias[part],
            )
            for part in parts
        ]
    if branches > 1:
        parts = [slice(0, branches // 2), slice(branches // 2, branches)]
        return [
            (query[part], prefix, (own[0][:, :, part], own[1][:, :, part]), prefix_bias, own_bias)
            for part in parts
        ]
    if width > 1:
        parts = [slice(0, width // 2), slice(width // 2, width)]
        return [
            (
                query[:, :, part],
                prefix,
                own,
                prefix_bias,
                own_bias if own_bias is None or own_bias.shape[-2] == 1 else own_bias[..., part, :],
            )
            for part in parts
        ]
    return None
